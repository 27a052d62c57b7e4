"""Models that are told a text: padding, guidance, files, layouts, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rae import load
from rae.app.viewer import Viewer
from rae.cli.errors import compose
from rae.commands.cache_latents import cache_latents
from rae.commands.evaluate import evaluate
from rae.commands.sample import sample
from rae.commands.train import train
from rae.data import ImageFolderDataModule, PicturesDataset, ShardsDataModule
from rae.demo.picture_scores import PictureScores
from rae.flow import AutoGuidance, ClassifierFreeGuidance
from rae.generator import Generator
from rae.io.errors import ConfigError
from rae.jobs.wanted import prompt_list, wanted
from rae.metric import ClipScore
from tests.helpers.small_models import make_generator, randomise
from tests.helpers.text_runs import SMALL, make_text_generator, text_weights, train_small

PROMPTS = ["a tiger above an owl on a blue background", "an owl", "a dog to the left of a cat on a pink background"]


@pytest.fixture(scope="module")
def generator() -> Generator:
    return make_text_generator()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return train_small(tmp_path_factory.mktemp("run"))


# --- the model ----------------------------------------------------------------------------------------------------


def test_padding_never_reaches_the_image(generator: Generator):
    alone = [generator([prompt], seed=3, indices=[i]) for i, prompt in enumerate(PROMPTS)]
    torch.testing.assert_close(generator(PROMPTS, seed=3), torch.cat(alone), rtol=0, atol=1e-5)
    told = generator.conditions_of([PROMPTS[1]])
    assert told["text"].shape[1] == 2
    # Longer padding, filled with anything; and the padding in front.
    filled = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 12, dtype=torch.bool)
    for rows in (slice(0, 2), slice(10, 12)):
        longer, seen = filled.clone(), mask.clone()
        longer[:, rows], seen[:, rows] = told["text"], True
        image = generator({"text": longer, "text_mask": seen}, seed=3, indices=[1])
        torch.testing.assert_close(image, alone[1], rtol=0, atol=1e-5)
    assert (alone[0] - alone[2]).abs().max() > 1e-3


def test_a_negative_prompt_takes_the_null_texts_place(generator: Generator):
    guidance = ClassifierFreeGuidance(2.5)
    null = make_text_generator(guidance=guidance)
    away = make_text_generator(guidance=guidance, negative_prompt=PROMPTS[2])
    assert (null(PROMPTS[:2]) - away(PROMPTS[:2])).abs().max() > 1e-4
    # Steering away from what is asked for leaves the velocity as it is.
    same = make_text_generator(guidance=guidance, negative_prompt=PROMPTS[1])
    torch.testing.assert_close(same(PROMPTS[1]), generator(PROMPTS[1]), rtol=0, atol=1e-5)
    with pytest.raises(
        ValueError, match="negative_prompt='an owl' needs a model that is told a text, and guidance=cfg"
    ):
        make_text_generator(negative_prompt="an owl")


def test_a_guide_is_told_the_same_text(generator: Generator):
    itself = make_text_generator(guidance=AutoGuidance(3.0), guide=generator.denoiser)
    torch.testing.assert_close(itself(PROMPTS), generator(PROMPTS), rtol=0, atol=1e-5)
    other = copy.deepcopy(generator.denoiser)
    randomise(other, 4)
    assert (
        make_text_generator(guidance=AutoGuidance(3.0), guide=other)(PROMPTS) - generator(PROMPTS)
    ).abs().max() > 1e-3


def test_prompts_that_are_none_are_refused(generator: Generator):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generator(["an owl", " "])
    with pytest.raises(ValueError, match="told a text, not a class: give a prompt, got 3"):
        generator([3])
    with pytest.raises(ValueError, match="takes texts of 12 tokens with 16 features, text_encoder makes 24"):
        Generator(
            generator.autoencoder,
            generator.denoiser,
            generator.flow,
            generator.sampler,
            text_encoder=type(generator.text_encoder)(features=16, tokens=24, depth=1, heads=2),
        )


def test_an_export_holds_the_text_encoder(generator: Generator, tmp_path: Path):
    generator.save_pretrained(tmp_path / "export")
    again = Generator.from_pretrained(tmp_path / "export")
    assert torch.equal(again(PROMPTS, seed=1), generator(PROMPTS, seed=1))
    assert repr(again).count("texts") == 1
    weights = load_file(tmp_path / "export" / "model.safetensors")
    key = next(key for key in weights if key.startswith("text_encoder."))
    save_file({**weights, key: weights[key] + 1}, tmp_path / "export" / "model.safetensors")
    with pytest.raises(ValueError, match="is not the file that was exported"):
        Generator.from_pretrained(tmp_path / "export")


def test_the_viewer_takes_prompts(generator: Generator):
    viewer = Viewer(generator)
    assert viewer.takes_text
    assert viewer.title_of("an owl") == "“an owl”"
    images = viewer.sample("an owl", count=2, seed=4)
    assert torch.equal(images, generator(["an owl"] * 2, seed=4, output="uint8"))
    guided = viewer.sample("an owl", "cfg", 2.0, count=2, negative_prompt="a tiger")
    assert not torch.equal(guided, viewer.sample("an owl", "cfg", 2.0, count=2))
    with pytest.raises(ValueError, match="a negative prompt needs guidance=cfg"):
        viewer.sample("an owl", negative_prompt="a tiger")


# --- runs and commands ---------------------------------------------------------------------------------------------


def drawn(run: Path, output: Path, *overrides: str) -> Path:
    sample(compose("sample", [f"checkpoint={run}", "sampler.grid.points=4", f"output_dir={output}", *overrides]))
    return output


@pytest.mark.slow
def test_samples_keep_their_prompts_in_every_layout(run: Path, tmp_path: Path):
    scenes = [PROMPTS[0], "an owl above a dog on a white background", PROMPTS[2]]
    (tmp_path / "prompts.txt").write_text("\n".join(scenes) + "\n\n")
    out = drawn(run, tmp_path / "out", f"prompts={tmp_path}/prompts.txt", "samples_per_prompt=2", "shards=true")
    told = [scene for scene in scenes for _ in range(2)]
    with np.load(out / "samples.npz") as arrays:
        images = arrays["arr_0"]
        assert arrays["prompts"].tolist() == told
    expected = load(run, ["sampler.grid.points=4"], encode=False)(told, output="uint8").permute(0, 2, 3, 1)
    assert np.abs(images.astype(int) - expected.numpy()).max() <= 1
    options = {"batch_size": 6, "num_workers": 0, "image_size": 48, "num_classes": 1, "flip": False}
    folder = ImageFolderDataModule(val_path=str(out / "images"), train_path=None, captions="metadata.jsonl", **options)
    shards = ShardsDataModule(val_path=str(out / "shards"), train_path=None, captions="txt", unlabelled=True, **options)
    for data in (folder, shards):
        data.setup("validate")
        (batch,) = data.val_dataloader()
        assert batch["caption"] == told
        assert np.array_equal(batch["image"].permute(0, 2, 3, 1).numpy(), images)
    said = json.loads((out / "samples.json").read_text())
    assert said["label_rule"] == "prompts"
    assert said["negative_prompt"] is None
    assert (out / "grid.png").is_file()
    for kind in ("samples.npz", "images", "shards"):
        scored = tmp_path / f"scores_{kind}"
        evaluate(
            compose("evaluate", [f"samples={out}/{kind}", "metric=pictures", "metric.real=2", f"output_dir={scored}"])
        )
    with pytest.raises(ConfigError, match="holds other samples"):
        drawn(run, tmp_path / "out", 'prompt="an owl"')


@pytest.mark.slow
def test_layouts_of_benchmarks(run: Path, tmp_path: Path):
    lines = [{"tag": "single_object", "include": [{"class": "owl", "count": 1}], "prompt": p} for p in PROMPTS[:2]]
    (tmp_path / "geneval.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    given = [f"prompts={tmp_path}/geneval.jsonl", "layout=geneval", "samples_per_prompt=2"]
    out = drawn(run, tmp_path / "out", *given)
    with np.load(out / "samples.npz") as arrays:
        images = arrays["arr_0"]
    for number, line in enumerate(lines):
        place = out / "geneval" / f"{number:05d}"
        assert json.loads((place / "metadata.jsonl").read_text()) == line
        for one in range(2):
            pixels = np.asarray(Image.open(place / "samples" / f"{one:05d}.png"))
            assert np.array_equal(pixels, images[2 * number + one])
    folder = tmp_path / "dpg"
    folder.mkdir()
    for name, prompt in zip(("COCOval2014_3", "partiprompts9"), PROMPTS, strict=False):
        (folder / f"{name}.txt").write_text(prompt)
    out = drawn(run, tmp_path / "dpg_out", f"prompts={folder}", "layout=dpg", "samples_per_prompt=4")
    with np.load(out / "samples.npz") as arrays:
        images = arrays["arr_0"]
    picture = np.asarray(Image.open(out / "dpg" / "partiprompts9.png"))
    assert picture.shape == (96, 96, 3)
    assert np.array_equal(picture[:48, 48:], images[5])
    assert np.array_equal(picture[48:, :48], images[6])
    with pytest.raises(ConfigError, match=r"layout=dpg needs prompts=FOLDER .* samples_per_prompt=4"):
        drawn(run, tmp_path / "no", f"prompts={folder}", "layout=dpg", "samples_per_prompt=2")
    with pytest.raises(ConfigError, match=r"layout=geneval needs prompts=evaluation_metadata.jsonl"):
        drawn(run, tmp_path / "no", f"prompts={folder}", "layout=geneval")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], 'this model is told a text: prompt="…"'),
        (["prompt=' '"], "prompt '0' is empty"),
        (["classes=[3]", "prompt=owl"], r"classes=\[3\] .*are for models that are told a class"),
        (["prompt=owl", "prompts=x.txt"], "both given"),
        (
            ["prompt=owl", "negative_prompt=cat"],
            "negative_prompt='cat' needs a model that is told a text, and guidance=cfg",
        ),
        (["prompt=owl", "samples_per_prompt=0"], "samples_per_prompt=0 must be at least 1"),
    ],
)
def test_prompts_from_the_shell_that_cannot_be_drawn(run: Path, tmp_path: Path, overrides: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        drawn(run, tmp_path / "out", *overrides)


def test_a_model_of_classes_refuses_a_prompt():
    cfg = compose("sample", ["checkpoint=unused", "prompt=owl"])
    with pytest.raises(
        ConfigError, match=r"for models that are told a text; this one is told one of 10 classes: classes="
    ):
        wanted(cfg, make_generator(), prompt_list(cfg))


@pytest.mark.parametrize("key", ["batch_size", "part_size"])
def test_prompts_are_not_drawn_in_batches_of_none(key: str):
    cfg = compose("sample", ["checkpoint=unused", "prompt=owl", f"{key}=0"])
    with pytest.raises(ConfigError, match=f"{key}=0 must be at least 1"):
        wanted(cfg, make_text_generator(), prompt_list(cfg))


def test_prompts_of_files_end_with_their_lines(tmp_path: Path):
    """Neither a mark at the beginning nor a character that some take for the end of a line changes a prompt."""
    (tmp_path / "plain.txt").write_text("an owl\x0ca cat\n\na fox\u2028", "utf-8-sig")
    (tmp_path / "lines.jsonl").write_text('{"prompt": "an owl\u2028"}\n\n{"text": "a fox"}', "utf-8")
    for file, texts in {"plain.txt": ["an owl\x0ca cat", "a fox"], "lines.jsonl": ["an owl\u2028", "a fox"]}.items():
        found = prompt_list(compose("sample", ["checkpoint=unused", f"prompts={tmp_path}/{file}"]))
        assert [(prompt.text, prompt.name) for prompt in found] == [(text, str(n)) for n, text in enumerate(texts)]
    (tmp_path / "lines.jsonl").write_text('{"prompt": "an owl"}\n\n{"says": "a fox"}')
    with pytest.raises(ConfigError, match="line 3 holds no prompt"):
        prompt_list(compose("sample", ["checkpoint=unused", f"prompts={tmp_path}/lines.jsonl"]))


@pytest.mark.slow
def test_files_of_prompts_that_cannot_be_read(run: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"prompts='.*no.txt' does not exist"):
        drawn(run, tmp_path / "out", f"prompts={tmp_path}/no.txt")
    (tmp_path / "odd.jsonl").write_text('{"says": "an owl"}')
    with pytest.raises(ConfigError, match="line 1 holds no prompt"):
        drawn(run, tmp_path / "out", f"prompts={tmp_path}/odd.jsonl")
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(ConfigError, match="holds no prompt"):
        drawn(run, tmp_path / "out", f"prompts={tmp_path}/none.txt")


def test_a_run_refuses_another_text_encoder(run: Path, tmp_path: Path):
    other = load_file(text_weights(tmp_path))
    save_file({key: value + 0.1 for key, value in other.items()}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="was made with another text encoder: weights"):
        load(
            run,
            ["text_encoder=words", "text_encoder.features=16", "text_encoder.depth=1", "text_encoder.heads=2",
             f"text_encoder.checkpoint={tmp_path}/other.safetensors"],
            encode=False,
        )  # fmt: skip


@pytest.mark.slow
def test_cached_text_gives_the_same_losses_and_is_refused_for_another_encoder(tmp_path: Path):
    text = f"text_encoder.checkpoint={text_weights(tmp_path)}"
    encoder = [one for one in SMALL if one.startswith(("encoder", "+encoder", "text_encoder", "data."))]
    common = ["encoder=pictures", "data=pictures", "image_size=48", "text_encoder=words", *encoder[:-1], encoder[-1]]
    common = [one for one in common if not one.startswith("encoder.checkpoint")]
    cache_latents(
        compose(
            "cache_latents",
            [*common, "encoder.checkpoint=null", text, "text=true", "dtype=float32", "flips=none", "data.shift=0",
             f"output_dir={tmp_path}/latents"],
        )
    )  # fmt: skip
    losses = {}
    for name, data in (
        ("images", ["data.shift=0"]),
        ("latents", ["data=latents", f"data.train_path={tmp_path}/latents/train", f"data.val_path={tmp_path}/latents/val",
                     "data.num_classes=1", "data.flip=false", "data.num_workers=0"]),
    ):  # fmt: skip
        gone = ("callbacks.",) if name == "images" else ("callbacks.", "data.train", "data.val")
        kept = [one for one in SMALL if not one.startswith(gone)]
        given = [*kept, text, "decoder_checkpoint=null", "callbacks=none", "trainer.max_steps=3", *data]
        train(compose("train", [*given, f"output_dir={tmp_path}/{name}", "trainer.val_check_interval=3"]))
        table = next((tmp_path / name).rglob("metrics.csv")).read_text().splitlines()
        column = table[0].split(",").index("train/loss")
        losses[name] = [float(row.split(",")[column]) for row in table[1:] if row.split(",")[column]]
    assert len(losses["images"]) == 3
    assert losses["images"] == pytest.approx(losses["latents"], rel=1e-4)
    other = load_file(text_weights(tmp_path))
    save_file({key: value + 0.1 for key, value in other.items()}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"the text in '.*train' was made with another text encoder: weights"):
        train(
            compose(
                "train", [*given, f"text_encoder.checkpoint={tmp_path}/other.safetensors", f"output_dir={tmp_path}/x"]
            )
        )


# --- scores --------------------------------------------------------------------------------------------------------


def test_the_judge_reads_real_scenes_and_finds_swapped_things():
    scenes = PicturesDataset(24, 48, True, 1)
    samples = [scenes[number] for number in range(24)]
    images = torch.stack([one["image"] for one in samples])
    prompts = [one["caption"] for one in samples]
    scores = PictureScores(48, real=10)
    scores.update(images, prompts=prompts)
    found = scores.compute()
    assert (found["right"], found["background"], found["judge"], found["samples"]) == (1, 1, 1, 24)
    assert found["right_held_out"] == 1
    assert np.isnan(found["right_trained"])
    scores.reset()
    swapped = [scenes.scene(number).swapped.caption for number in range(24)]
    scores.update(images, prompts=swapped)
    found = scores.compute()
    assert (found["right"], found["things"]) == (0, 1)
    scores.reset()
    scores.update(torch.full_like(images, 255), prompts=prompts)
    assert scores.compute()["things"] == 0
    with pytest.raises(ValueError, match="samples without prompts cannot be judged"):
        scores.update(images)


@pytest.mark.slow
def test_clip_score_is_the_cosine_of_the_two_embeddings():
    import open_clip
    from torch.nn import functional as F

    torch.manual_seed(0)
    metric = ClipScore("ViT-B-32-quickgelu", input_size=64, pretrained=False)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    metric.update(images[:2], prompts=PROMPTS[:2])
    metric.update(images[2:], prompts=PROMPTS[2:])
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    with torch.no_grad():
        seen = metric.network.encode_image((images / 255 - mean) / std)
        told = metric.network.encode_text(open_clip.get_tokenizer("ViT-B-32-quickgelu")(PROMPTS))
    expected = 100 * F.cosine_similarity(seen, told).clamp(min=0).mean()
    assert metric.compute()["clip_score"] == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="needs a prompt for each of 3 images, got none"):
        metric.update(images)
