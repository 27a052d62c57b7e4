"""The served page of rae-app against requests that it never sends: names, paths, bodies, uploads, many at once; seeded."""

from __future__ import annotations

import http.client
import json
import random
import re
import threading
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.app.test_app import bomb, generator, picture
from tests.app.test_app_browser import served

MEMORY = 2.5e9
"""Bytes that the server may ever have held, torch and Gradio included (0.9 GB)."""
SECRET = "a line that no visitor may read"


class Client:
    """Sends one request at a time to the served page, whatever it looks like."""

    def __init__(self, url: str) -> None:
        self.host = urlsplit(url).netloc

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, str]:
        """Status and text of the answer; headers by their names with underscores."""
        named = {"host": self.host, **{name.replace("_", "-"): value for name, value in headers.items()}}
        connection = http.client.HTTPConnection(self.host, timeout=120)
        try:
            connection.putrequest(method, path, skip_host=True)
            for name, value in {**named, "content-length": str(len(body))}.items():
                connection.putheader(name, value)
            connection.endheaders()
            with suppress(BrokenPipeError, ConnectionResetError):  # the server has heard enough
                connection.send(body)
            reply = connection.getresponse()
            return reply.status, reply.read(200_000).decode(errors="replace")
        finally:
            connection.close()

    def upload(self, content: bytes, disposition: str = 'form-data; name="files"; filename="a.png"') -> tuple[int, str]:
        head = f"--x\r\nContent-Disposition: {disposition}\r\nContent-Type: image/png\r\n\r\n".encode()
        body = head + content + b"\r\n--x--\r\n"
        return self.ask("POST", "/gradio_api/upload", body, content_type="multipart/form-data; boundary=x")

    def call(self, function: int, data: list, session: str) -> str:
        """What a function of the page answers, called as its own script would: "done", or the message of its error."""
        body = json.dumps({"data": data, "fn_index": function, "session_hash": session}).encode()
        status, text = self.ask("POST", "/gradio_api/queue/join", body, content_type="application/json")
        if status != 200:
            return text
        connection = http.client.HTTPConnection(self.host, timeout=120)
        connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
        reply = connection.getresponse()
        answer = ""
        while "close_stream" not in (line := reply.readline().decode()) and line:
            if "process_completed" in line:
                message = json.loads(line.removeprefix("data: "))
                answer = "done" if message["success"] else message["output"]["error"]
        connection.close()
        return answer


def functions(client: Client) -> dict[str, int]:
    """Numbers of the page's functions by the count of their inputs: an upload has one, a drawing seven."""
    config = json.loads(client.ask("GET", "/config")[1])
    kinds = {1: "reconstruct", 7: "sample"}
    return {kinds[len(made["inputs"])]: made["id"] for made in config["dependencies"] if len(made["inputs"]) in kinds}


def requests(folder: Path, draws: random.Random, count: int = 200):
    """Requests as their arguments, seeded: foreign names and origins, paths out of the page, bodies of all kinds."""
    paths = [
        "/",
        "/config",
        "/gradio_api/info",
        "/gradio_api/queue/join",
        "/gradio_api/upload",
        "/gradio_api/startup-events",
    ]
    secret = folder / "secret.txt"
    ways = ["/gradio_api/file={}", "/gradio_api/file=../../..{}", "/file={}", "/gradio_api/proxy=http://127.0.0.1:1/{}"]
    ways += [
        "/static/../../../../../..{}",
        "/static/%2e%2e/%2e%2e/%2e%2e{}",
        "/assets/..%2f..%2f..{}",
        "/svelte/../..{}",
    ]
    ways += ["/gradio_api/file=/proc/self/root{}", "/gradio_api/file=file://{}", "/gradio_api/file=C:%5C..{}"]
    values = [
        "NaN",
        "Infinity",
        "1e999",
        "null",
        '"x"',
        "[]",
        "{}",
        "-1",
        "1e12",
        '"\\ud800"',
        "true",
        '"' + "9" * 5000 + '"',
    ]
    for _ in range(count):
        kind = draws.randrange(4)
        if kind == 0:
            name = draws.choice(
                ["evil.example", "127.0.0.1.evil.example", "", "localhost@evil.example", "[::1", "a" * 300]
            )
            yield draws.choice(["GET", "POST"]), draws.choice(paths), b"{}", {"host": name}
        elif kind == 1:
            origin = draws.choice(["null", "http://evil.example", "http://127.0.0.1:1", "file://", "http://localhost"])
            yield draws.choice(["GET", "POST", "OPTIONS"]), draws.choice(paths), b"{}", {"origin": origin}
        elif kind == 2:
            yield "GET", draws.choice(ways).format(secret), b"", {}
        else:
            inside = ", ".join(draws.choice(values) for _ in range(draws.randrange(8)))
            text = f'{{"data": [{inside}], "fn_index": {draws.choice(values)}, "session_hash": {draws.choice(values)}}}'
            if draws.random() < 0.3:
                text = text[: draws.randrange(len(text))]
            kinds = ["application/json", "text/plain", "multipart/form-data; boundary=x", "multipart/form-data", ""]
            yield "POST", draws.choice(paths), text.encode(), {"content-type": draws.choice(kinds)}


def most_memory(pattern: str) -> int:
    """Bytes that the newest process whose command line holds a text has ever held."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if pattern in (folder / "cmdline").read_bytes().decode(errors="replace"):
                found.append(int(re.search(r"VmHWM:\s+(\d+)", (folder / "status").read_text())[1]) * 1024)
        except (OSError, TypeError):
            continue
    return max(found)


@pytest.mark.slow
def test_the_served_page_withstands_foreign_and_damaged_requests(tmp_path):
    model = generator().save_pretrained(tmp_path / "model")
    (tmp_path / "secret.txt").write_text(SECRET)
    good = picture(tmp_path / "good.png").read_bytes()
    arguments = [f"checkpoint={model}", "guidance=cfg", "batch_size=4", "max_count=6"]
    with served(tmp_path, *arguments, environment={}) as url:
        client, draws = Client(url), random.Random(0)
        for method, path, body, headers in requests(tmp_path, draws):
            status, text = client.ask(method, path, body, **headers)
            shown = f"{method} {path} {headers} {body[:200]!r}: {status} {text[:200]}"
            assert SECRET not in text, shown
            assert status < 500, shown
            assert "Traceback" not in text, shown
            if "host" in headers or "origin" in headers:
                assert status == 403, shown
        # Uploads: without a name, of other places, damaged, too large, and a small file of 13,300² pixels.
        for disposition in ('form-data; name="files"', "form-data", "", 'form-data; name="files"; filename=""'):
            assert client.upload(good, disposition)[0] < 500
        assert client.upload(bytes(65 * 2**20))[0] == 413
        numbers = functions(client)
        for number, (content, reason) in enumerate(
            [
                (good[: len(good) // 2], "is no readable image"),
                (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage", "no image of a known format"),
                (bomb(tmp_path / "bomb.png", 13_300).read_bytes(), "pixels are more than the 89,478,485 allowed"),
                (good, "done"),
            ]
        ):
            status, text = client.upload(content)
            assert status == 200, text
            (path,) = json.loads(text)
            payload = {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
            assert reason in client.call(numbers["reconstruct"], [payload], f"u{number}")
        for other in (tmp_path / "secret.txt", "/etc/passwd", f"{path}/../../../secret.txt"):
            assert "only an image that was uploaded" in client.call(numbers["reconstruct"], [{"path": str(other)}], "p")
        # Settings beyond the sliders.
        for number, (settings, reason) in enumerate(
            [
                ([1, "", "cfg", 1.5, 2, 7, 0], "count must be a whole number in 1 … 6, got 7"),
                ([1, "", "cfg", 1.5, 2, 10**12, 0], "count must be a whole number in 1 … 6"),
                ([1, "", "cfg", 1.5, 10**9, 1, 0], "steps must be a whole number in 1 … 250"),
                ([1, "", "cfg", 1e9, 2, 1, 0], "guidance scale must be a number in 1 … 5"),
                ([9, "", "cfg", 1.5, 2, 1, 0], "class must be a whole number in 0 … 3, got 9"),
                ([1, "", "cfg", 1.5, 2, 2, 0], "^done$"),
            ]
        ):
            assert re.search(reason, answer := client.call(numbers["sample"], settings, f"s{number}")), answer
        # Many at once, all served.
        done = []
        threads = [
            threading.Thread(
                target=lambda i=i: done.append(client.call(numbers["sample"], [1, "", "none", 1, 1, 1, i], f"m{i}"))
            )
            for i in range(50)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert done == ["done"] * 50
        assert most_memory(f"checkpoint={model}") < MEMORY
