"""The page of rae-app, served by the command and clicked through in a headless Chromium."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae.app.command import open_viewer
from rae.flow import ClassifierFreeGuidance, EulerSampler, PublishedGrid
from rae.generator import Generator
from rae.image import to_uint8
from tests.app.test_app import configuration, generator, picture
from tests.helpers.text_runs import make_text_generator

HOW_TO_INSTALL = "on Debian: apt-get install -y chromium chromium-driver; then pip install selenium"
PROGRESS = """
window.seen = [];
new MutationObserver(() => {
    const text = document.querySelector("#samples").innerText.match(/([0-9]+)\\/([0-9]+) steps/);
    if (text) window.seen.push([Number(text[1]), Number(text[2])]);
}).observe(document.querySelector("#samples"), {childList: true, subtree: true, characterData: true});
"""
"""Notes all that the progress bar says."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(folder: Path, *arguments: str, environment: dict[str, str]):
    """The command as a process; gives the page's address, and ends it by Ctrl-C."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "rae",
        "app",
        *arguments,
        f"port={port}",
        f"output_dir={folder}/out",
        "device=cpu",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(folder), **environment}
    with open(folder / "errors.txt", "w") as errors:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        line = process.stdout.readline()  # the command says where the page is, or ends
        assert line == f"The page is at http://127.0.0.1:{port}/ until Ctrl-C.\n", (folder / "errors.txt").read_text()
        yield f"http://127.0.0.1:{port}/"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        assert "Traceback" not in (folder / "errors.txt").read_text()
        assert not list(folder.glob("rae-app-*")), "uploaded and drawn images are still there"
    finally:
        process.kill()
        process.wait()


@contextmanager
def browser(profile: Path):
    """A headless Chromium that records its requests."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.fail(f"chromium or chromedriver is not installed; {HOW_TO_INSTALL}")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    flags += ["disable-component-update", "disable-sync", "window-size=1200,900", f"user-data-dir={profile}"]
    for flag in flags:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    page = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield page
    finally:
        page.quit()


def wait_for(what, seconds: float = 60):
    """The first value of a function that is true."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, f"nothing came within {seconds} s"
        time.sleep(0.05)
    return found


def requested(page) -> set[str]:
    """Scheme and host of every request of the page."""
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    sockets = [m["params"]["url"] for m in messages if m["method"] == "Network.webSocketCreated"]
    return {"/".join(url.split("/")[:3]) for url in urls + sockets if not url.startswith(("chrome:", "data:", "blob:"))}


def images_of(page, selector: str) -> np.ndarray:
    """The pixels of the pictures on the page, N×H×W×3."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    shown = page.find_elements("css selector", f"{selector} img")
    files = [opener.open(image.get_attribute("src")).read() for image in shown]
    wait_for(lambda: all(image.get_property("naturalWidth") for image in shown))  # the browser has decoded them too
    return np.stack([np.array(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])


def dismiss(page) -> str:
    """The one message on the page, which is then closed."""
    (body,) = wait_for(lambda: page.find_elements("css selector", ".toast-body"))
    text = wait_for(lambda: body.text)  # it fades in
    page.find_element("css selector", ".toast-close").click()
    wait_for(lambda: not page.find_elements("css selector", ".toast-body"))
    return text


@pytest.mark.slow
def test_clicking_through_the_page(tmp_path):
    """Upload, reconstruction, scores, samples with progress, and faults; nothing but this machine is asked for anything."""
    model = generator().save_pretrained(tmp_path / "model")
    upload = picture(tmp_path / "photo.png")
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "notes.png").write_text("text")
    with socket.socket() as outside:  # what either process wanted from the internet would come here
        outside.bind(("127.0.0.1", 0))
        outside.listen()
        proxy = f"http://127.0.0.1:{outside.getsockname()[1]}"
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), proxy)
        environment = {**proxies, "no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost"}
        arguments = [f"checkpoint={model}", "guidance=cfg", "batch_size=4"]
        with served(tmp_path, *arguments, environment=environment) as url, browser(tmp_path / "profile") as page:
            page.get(url)
            wait_for(lambda: page.find_elements("id", "reconstruction"))
            click_through_reconstruction(page, model, upload)
            click_through_samples(page, model)
            assert requested(page) == {url.rstrip("/")}
        outside.setblocking(False)
        with pytest.raises(BlockingIOError):
            outside.accept()


def click_through_reconstruction(page, model, upload):
    def choose(path):
        page.find_element("css selector", "#upload input[type=file]").send_keys(str(path))

    choose(upload.with_name("notes.txt"))
    assert "Invalid file type: notes.txt. Only image/* allowed." in dismiss(page)
    choose(upload.with_name("notes.png"))
    assert (
        "'notes.png' is no readable image (no image of a known format); give a PNG, JPEG, WebP or similar file"
        in dismiss(page)
    )
    page.find_element("css selector", "#upload button[aria-label='Remove Image']").click()
    wait_for(lambda: page.find_elements("css selector", "#upload input[type=file]"))
    choose(upload)
    table = wait_for(lambda: page.find_element("id", "scores").text)
    expected = open_viewer(configuration(model))[0].reconstruct(upload)
    assert np.array_equal(images_of(page, "#original")[0], expected.original.permute(1, 2, 0))
    shown = images_of(page, "#reconstruction")[0].astype(int)
    assert np.abs(shown - expected.picture.permute(1, 2, 0).numpy()).max() <= 1
    psnr, ssim = (float(number) for number in re.findall(r"-?\d+\.\d+", table))
    assert psnr == pytest.approx(expected.scores["psnr"], abs=0.02)
    assert ssim == pytest.approx(expected.scores["ssim"], abs=2e-3)


def click_through_samples(page, model):
    def fill(name, value):
        field = page.find_element("css selector", f"#{name} input[type=number]")
        field.clear()
        field.send_keys(str(value), "\t")

    def draw():
        page.find_element("id", "draw").click()

    next(tab for tab in page.find_elements("css selector", "button[role=tab]") if tab.text == "Samples").click()
    wait_for(lambda: page.find_element("id", "draw").is_displayed())
    fill("class", 9)
    draw()
    assert "class must be a whole number in 0 … 3, got 9" in dismiss(page)
    for name, value in {"class": 2, "seed": 11, "steps": 200, "count": 6, "scale": 2.5}.items():
        fill(name, value)
    page.execute_script(PROGRESS)
    draw()
    wait_for(lambda: len(page.find_elements("css selector", "#samples img")) == 6)
    progress = page.execute_script("return window.seen")
    assert {total for _, total in progress} == {400}  # two batches of 200 steps
    done = [number for number, _ in progress]
    assert len(set(done)) > 2
    assert done == sorted(done)
    assert "Class 2, samples 0 to 5 of seed 11, cfg 2.5" in page.find_element("id", "samples").text
    same = Generator.from_pretrained(model)
    same.sampler, same.guidance = EulerSampler(PublishedGrid(201)), ClassifierFreeGuidance(2.5)
    expected = to_uint8(same([2] * 6, seed=11)).permute(0, 2, 3, 1).numpy()
    assert np.abs(images_of(page, "#samples").astype(int) - expected).max() <= 1


@pytest.mark.slow
def test_drawing_what_a_sentence_says(tmp_path):
    """A prompt, a negative one, and what the page says of an empty one."""
    made = make_text_generator()
    model = made.save_pretrained(tmp_path / "model")
    arguments = [f"checkpoint={model}", "guidance=cfg", "guidance.scale=2", "encode=false"]
    with served(tmp_path, *arguments, environment={}) as url, browser(tmp_path / "profile") as page:
        page.get(url)
        wait_for(lambda: page.find_elements("css selector", "#prompt textarea"))
        draw = page.find_element("id", "draw")
        draw.click()
        assert "prompt 0 is empty: say what is to be drawn" in dismiss(page)
        page.find_element("css selector", "#prompt textarea").send_keys("a tiger above an owl")
        page.find_element("css selector", "#negative textarea, #negative input").send_keys("a dog")
        draw.click()
        wait_for(lambda: len(page.find_elements("css selector", "#samples img")) == 8)
        assert "“a tiger above an owl”, samples 0 to 7 of seed 0, cfg 2" in page.find_element("id", "samples").text
        steered = make_text_generator(guidance=ClassifierFreeGuidance(2.0), negative_prompt="a dog")
        expected = to_uint8(steered(["a tiger above an owl"] * 8)).permute(0, 2, 3, 1).numpy()
        assert np.abs(images_of(page, "#samples").astype(int) - expected).max() <= 1
