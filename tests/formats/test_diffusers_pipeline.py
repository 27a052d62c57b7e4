"""Generators as pipelines of diffusers: the same images without this library, and back to the last bit."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rae import denoiser as denoisers
from rae import flow
from rae.autoencoder import RAE
from rae.condition import LabelTokens, NavigationTokens
from rae.denoiser import Denoiser, DiT, DiTDH, InContextDiTDH, RiT
from rae.encoder.text import TransformersTextEncoder
from rae.flow import (
    AdaptiveProjectedGuidance,
    AdaptiveSampler,
    ClassifierFreeGuidance,
    ComposedGuidance,
    EulerMaruyamaSampler,
    EulerSampler,
    FlowMatching,
    FullGrid,
    Guidance,
    HeunEulerSampler,
    HeunSampler,
    InternalGuidance,
    JumpSampler,
    MeanFlow,
    PublishedGrid,
    Sampler,
)
from rae.formats import save_original, save_pipeline
from rae.formats.open import load_denoiser, read
from rae.formats.single_file import single_file
from rae.generator import Generator
from rae.io.tensors import state_hash
from tests.helpers import text_runs
from tests.helpers.small_models import make_autoencoder, make_diffusers, make_generator, randomise

LABELS = [1, 9, 3]
WITHOUT_RAE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "rae":
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
"""
DRAW = """
import numpy
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
numpy.save(sys.argv[2], pipe(class_labels=[1, 9, 3], seed=5, output_type="pt").images.numpy())
assert not any(name.split(".")[0] == "rae" for name in sys.modules)
"""


def cfg_interval() -> Generator:
    denoiser = DiTDH(32, 4, 32, 2, 4, 48, 1, 4, 12)
    names = [f"class {label}, {'abcdefghijkl'[label]}" for label in range(12)]
    guidance = ClassifierFreeGuidance(1.7, (0.1, 0.9))
    return finished(denoiser, EulerSampler(PublishedGrid(5)), guidance, class_names=names)


def internal() -> Generator:
    denoiser = InContextDiTDH(32, 4, 32, 2, 4, 48, 1, 4, LabelTokens(10, 3), time_tokens=2, base_depth=1)
    flow = FlowMatching(prediction="data", shift=1.37)
    return finished(denoiser, EulerSampler(FullGrid(4)), InternalGuidance(1.5, cfg_scale=1.3), flow)


def autoguidance() -> Generator:
    return lively(make_generator())


def average_velocity() -> Generator:
    denoiser = DiT(32, 4, 32, 2, 4, 10, second_time=True)
    return finished(denoiser, JumpSampler(FullGrid(2)), ClassifierFreeGuidance(1.4), MeanFlow(shift=1.37))


def stochastic() -> Generator:
    denoiser = DiTDH(32, 4, 32, 2, 4, 48, 1, 4, 10, norm="layer", mlp="gelu", qk_norm=True)
    guidance = ComposedGuidance([AdaptiveProjectedGuidance(1.5, momentum=0.0)])
    return finished(denoiser, EulerMaruyamaSampler(PublishedGrid(4)), guidance)


def joint() -> Generator:
    denoiser = RiT(32, 4, 32, 2, 4, 10, context_tokens=3, context_start=1)
    flow = FlowMatching(prediction="data", shift=1.37)
    return finished(denoiser, HeunEulerSampler(FullGrid(3)), ClassifierFreeGuidance(1.5), flow)


def finished(denoiser, sampler, guidance, flow=None, **options) -> Generator:
    randomise(denoiser, 1)
    flow = flow or FlowMatching(shift=1.37)
    return lively(Generator(make_autoencoder(), denoiser, flow, sampler, guidance, **options).eval())


def lively(model: Generator) -> Generator:
    """The same with larger weights, so that labels and guidance show in the images."""
    weights = [*model.denoiser.parameters(), *(model.guide.parameters() if model.guide is not None else ())]
    for weight in weights:
        weight.data *= 4
    model.autoencoder.decoder.last_layer.weight.data *= 5
    return model


MODELS = [cfg_interval, internal, autoguidance, average_velocity, stochastic, joint]


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a folder with diffusers, whose copies of the code go elsewhere than to the user's cache."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))

    def from_pretrained(folder: Path):
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return from_pretrained


def export(model: Generator | RAE, folder: Path) -> dict:
    """What our own export says of a model, the hash of all weights in it."""
    return json.loads((model.save_pretrained(folder) / "config.json").read_text())


@pytest.mark.parametrize(
    "make",
    [internal, *(pytest.param(one, marks=pytest.mark.slow) for one in MODELS if one is not internal)],
    ids=lambda make: make.__name__,
)
def test_diffusers_draws_the_same_images_and_the_folder_comes_back_to_the_last_bit(make, tmp_path, load):
    model = make()
    folder = save_pipeline(model, tmp_path / "out")
    pipe = load(folder)
    assert type(pipe.transformer.denoiser).__module__.startswith("diffusers_modules")
    ours = model(LABELS, seed=5, progress=False)
    for other in (model([2, 0, 1], seed=5, progress=False), model(LABELS, seed=5, guidance_scale=1.0, progress=False)):
        assert (other - ours).abs().amax((1, 2, 3)).min() > 3e-4
    drawn = pipe(class_labels=LABELS, seed=5, output_type="pt").images
    assert (drawn - ours).abs().max() < 1e-5
    part = pipe(class_labels=LABELS[1:], seed=5, indices=[1, 2], output_type="np").images
    assert np.abs(part.transpose(0, 3, 1, 2) - ours[1:].numpy()).max() < 1e-5
    if not model.sampler.stochastic:
        noise = model.noise(5, [0, 1, 2])
        assert (pipe(class_labels=LABELS, latents=noise, output_type="pt").images - ours).abs().max() < 1e-5
        latents = pipe(class_labels=LABELS, latents=noise, output_type="latent").images
        assert (latents - model.latents(LABELS, seed=5)).abs().max() < 1e-5
    again = Generator.from_pretrained(folder)
    assert export(again, tmp_path / "again") == export(model, tmp_path / "first")
    assert again.class_names == model.class_names


def test_arguments_of_a_call(tmp_path, load):
    model = cfg_interval()
    pipe = load(save_pipeline(model, tmp_path / "out"))
    chosen = model(["a", 9], steps=3, guidance_scale=1.2, seed=1, progress=False, output="uint8")
    images = pipe(["a", 9], num_inference_steps=3, guidance_scale=1.2, seed=1).images
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), chosen.permute(0, 2, 3, 1).numpy())
    first, second, other = (
        pipe(4, generator=torch.Generator().manual_seed(seed), output_type="pt").images for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    pipe.scheduler.register_to_config(shift=1.0)  # another schedule is followed
    pipe.scheduler.set_shift(1.0)
    model.flow.shift = 1.0
    assert (pipe(4, seed=2, output_type="pt").images - model(4, seed=2, progress=False)).abs().max() < 1e-5
    for given, words in (
        ({"class_labels": 12}, r"labels must lie in \[0, 11\], got \[12\]"),
        ({"class_labels": "zebra"}, "class 'zebra' is unknown"),
        ({}, "give one of class_labels, prompt"),
        ({"prompt": "a cube"}, "this model is told no text; give class_labels"),
        ({"class_labels": 1, "negative_prompt": "a"}, "negative_prompt='a' needs a model that is told a text"),
        ({"class_labels": 1, "output_type": "gif"}, "output_type='gif' is unknown; choose one of pil"),
        ({"class_labels": 1, "latents": torch.zeros(1, 2)}, r"latents \(1, 32, 4, 4\), got \(1, 2\)"),
        ({"class_labels": [1, 2], "indices": [0]}, "2 samples need as many indices, got 1"),
        ({"class_labels": 1, "num_inference_steps": 0}, "steps=0 must be"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe(**given)
    with pytest.raises(ValueError, match=r"weights are torch.bfloat16.*without torch_dtype"):
        pipe.to(torch.bfloat16)(1)


def test_diffusers_own_autoencoder_is_used_where_it_is_the_same_network(tmp_path, load):
    make_diffusers("mae").save_pretrained(tmp_path / "vae")
    loaded = RAE.from_pretrained(tmp_path / "vae")
    latent = type(loaded.latent)(loaded.latent_shape, loaded.latent.mean, loaded.latent.var)  # √(var + eps)
    denoiser = DiT(128, 4, 32, 1, 4, 10)
    randomise(denoiser, 1)
    parts = denoiser, FlowMatching(), EulerSampler(FullGrid(3)), ClassifierFreeGuidance(1.5)
    model = Generator(RAE(loaded.encoder, loaded.decoder, latent), *parts).eval()
    folder = save_pipeline(model, tmp_path / "out")
    pipe = load(folder)
    assert type(pipe.vae).__name__ == "AutoencoderRAE"
    ours = model(LABELS, seed=5, progress=False)
    assert (pipe(class_labels=LABELS, seed=5, output_type="pt").images - ours).abs().max() < 1e-5
    again = Generator.from_pretrained(folder)
    assert export(again, tmp_path / "again") == export(model, tmp_path / "first")
    pipe.save_pretrained(tmp_path / "copy")  # diffusers' own copy lacks our files, and is read all the same
    copied = Generator.from_pretrained(tmp_path / "copy")
    assert (copied(LABELS, seed=5, progress=False) - ours).abs().max() < 1e-5


@pytest.mark.slow
def test_a_copy_by_diffusers_draws_and_cannot_encode(tmp_path, load):
    model = autoguidance()
    load(save_pipeline(model, tmp_path / "out")).save_pretrained(tmp_path / "copy")
    copied = Generator.from_pretrained(tmp_path / "copy")
    assert torch.equal(copied(LABELS, progress=False), model(LABELS, progress=False))
    with pytest.raises(RuntimeError, match="without its encoder"):
        copied.autoencoder.encode(torch.rand(1, 3, 32, 32))
    load(save_pipeline(cfg_interval(), tmp_path / "named")).save_pretrained(tmp_path / "named_copy")
    assert Generator.from_pretrained(tmp_path / "named_copy").class_names == cfg_interval().class_names
    guide = load_denoiser(read(tmp_path / "copy" / "guide"), "guide_checkpoint")
    assert state_hash(guide.state_dict()) == state_hash(model.guide.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("make", [cfg_interval, internal, autoguidance], ids=lambda make: make.__name__)
def test_a_process_that_cannot_import_rae_draws_the_same(make, tmp_path):
    model = make()
    folder = save_pipeline(model, tmp_path / "out")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", WITHOUT_RAE + DRAW, str(folder), str(tmp_path / "drawn.npy")]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    drawn = torch.from_numpy(np.load(tmp_path / "drawn.npy"))
    assert (drawn - model(LABELS, seed=5, progress=False)).abs().max() < 1e-5


@pytest.mark.parametrize("component", ["transformer", "decoder", "pipeline", "text_encoder"])
def test_files_need_nothing_of_rae_and_are_always_the_same(component):
    text = single_file(f"rae.formats.components.{component}", "A file.")
    assert text == single_file(f"rae.formats.components.{component}", "A file.")
    nodes = list(ast.walk(ast.parse(text)))
    packages = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    packages |= {str(node.module).split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert packages - set(sys.stdlib_module_names) <= {"torch", "numpy", "diffusers", "PIL", "safetensors"}


def test_two_things_of_one_name_are_not_put_into_one_file(tmp_path, monkeypatch):
    package = tmp_path / "rae_parts"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text("from math import pi\n\ndef area(r):\n    return pi * r * r\n")
    (package / "two.py").write_text(
        "from rae_parts.one import area\n\npi = 3\n\ndef near(r):\n    return area(r) - pi\n"
    )
    (package / "three.py").write_text("from rae_parts.one import area\n\ndef twice(r):\n    return 2 * area(r)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("rae.formats.single_file.ROOT", "rae_parts")
    monkeypatch.setattr("rae.formats.single_file.metadata.version", lambda name: "0")
    with pytest.raises(ValueError, match=r"'pi' of rae_parts.one is something else elsewhere"):
        single_file("rae_parts.two", "Two.")
    made: dict = {}
    exec(single_file("rae_parts.three", "Three."), made)
    assert made["twice"](1) == pytest.approx(6.2831853)


def test_every_class_that_a_model_may_have_is_in_the_files():
    written = {name: single_file(f"rae.formats.components.{name}", "X.") for name in ("transformer", "pipeline")}
    for base, module, name in (
        (Denoiser, denoisers, "transformer"),
        (Sampler, flow, "pipeline"),
        (Guidance, flow, "pipeline"),
    ):
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, base) and kind is not AdaptiveSampler:
                assert f"class {kind.__name__}(" in written[name], kind


def test_what_the_folder_could_not_do_is_refused(tmp_path):
    model = cfg_interval()
    model.sampler = AdaptiveSampler()
    with pytest.raises(ValueError, match=r"AdaptiveSampler needs torchdiffeq.*sampler=euler"):
        save_pipeline(model, tmp_path / "out")

    class Mine(DiT):
        """A denoiser of one's own."""

    with pytest.raises(ValueError, match="Mine is no class of this library"):
        save_pipeline(finished(Mine(32, 4, 32, 1, 4, 10), EulerSampler(), None), tmp_path / "out")
    lifted = cfg_interval()
    lifted.autoencoder.latent.space = "decoder_input"
    with pytest.raises(ValueError, match=r"latent.space=decoder_input"):
        save_pipeline(lifted, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_pipeline(cfg_interval(), tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"model_index.json"):
        save_pipeline(cfg_interval(), tmp_path / "out")


def test_conditions_that_are_no_labels(tmp_path, load):
    denoiser = InContextDiTDH(32, 4, 32, 2, 4, 48, 1, 4, NavigationTokens(32, 4, 2), base_depth=None)
    model = finished(denoiser, HeunSampler(FullGrid(2)), ClassifierFreeGuidance(1.5))
    told = {"frames": torch.randn(2, 2, 32, 4, 4), "action": torch.randn(2, 3), "elapsed": torch.rand(2, 1)}
    pipe = load(save_pipeline(model, tmp_path / "out"))
    drawn = pipe(conditions=told, seed=3, output_type="pt").images
    assert (drawn - model(told, seed=3, progress=False)).abs().max() < 1e-5


def talkative(**options) -> Generator:
    model = lively(text_runs.make_text_generator(guidance=ClassifierFreeGuidance(2.0), **options))
    model.denoiser.condition.proj.weight.data *= 8
    return model


def test_prompts(tmp_path, load):
    model = talkative(negative_prompt="a blue ball")
    folder = save_pipeline(model, tmp_path / "out")
    pipe = load(folder)
    prompts = ["a red cube left of a ball", "ball"]
    ours = model(prompts, seed=3, progress=False)
    assert (ours[0] - model("cube", seed=3, progress=False)[0]).abs().max() > 3e-4
    assert (pipe(prompt=prompts, seed=3, output_type="pt").images - ours).abs().max() < 1e-5
    model.negative_prompt = "cube"
    other = model(prompts, seed=3, progress=False)
    assert (ours - other).abs().max() > 3e-4
    drawn = pipe(prompt=prompts, negative_prompt="cube", seed=3, output_type="pt").images
    assert (drawn - other).abs().max() < 1e-5
    again = Generator.from_pretrained(folder)
    assert again.negative_prompt == "a blue ball"
    assert export(again, tmp_path / "again") == export(model, tmp_path / "first")
    for given, words in (({"prompt": " "}, "prompt 0 is empty"), ({"prompt": 3}, "told a text, not a class")):
        with pytest.raises(ValueError, match=words):
            pipe(**given)


def test_prompts_of_a_language_model(tmp_path, load):
    language_model = text_runs.write_language_model(tmp_path / "qwen")
    text = TransformersTextEncoder(str(language_model), features=16, tokens=4)
    model = talkative()
    model.text_encoder = text
    folder = save_pipeline(model, tmp_path / "out")
    pipe = load(folder)
    prompts = ["a red cube left of a ball", "ball"]
    ours = model(prompts, seed=3, progress=False)
    assert (ours[0] - model("cube", seed=3, progress=False)[0]).abs().max() > 3e-4
    assert (pipe(prompt=prompts, seed=3, output_type="pt").images - ours).abs().max() < 1e-5
    again = Generator.from_pretrained(folder)
    assert export(again, tmp_path / "again") == export(model, tmp_path / "first")
    model.text_encoder = TransformersTextEncoder(str(language_model), features=16, tokens=4, pretrained=False)
    with pytest.raises(ValueError, match=r"text_encoder.pretrained=false leaves random weights"):
        save_pipeline(model, tmp_path / "other")


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_reading_runs_no_code_and_says_what_is_wrong(tmp_path):
    folder = save_pipeline(cfg_interval(), tmp_path / "out")
    for file in folder.rglob("*.py"):
        file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    Generator.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()
    index, network = folder / "model_index.json", folder / "transformer" / "config.json"
    kept, said = index.read_text(), network.read_text()
    for values, words in (
        ({"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.20.0"},
         r"pipeline 'StableDiffusionPipeline' of diffusers 0.20.0, which is no model of this library: read are RAEPipeline"),
        ({"rae_format": 2}, "rae_format 2, this library reads up to 1; upgrade it"),
        ({"flow": None, "encoder": {}, "id2label": {"a": "b"}}, "says nothing usable of flow, encoder, id2label"),
        ({"sampler": {"_target_": "os.system", "command": "true"}}, "'os.system' is no known class of a model"),
    ):  # fmt: skip
        change(index, **values)
        with pytest.raises(ValueError, match=words):
            Generator.from_pretrained(folder)
        index.write_text(kept)
    for values, words in (
        ({"_class_name": "DiTTransformer2DModel"}, "does not describe a RAETransformer"),
        ({"description": {"_target_": "subprocess.run", "args": "true"}}, "'subprocess.run' is no known class"),
        ({"description": json.loads(said)["description"] | {"depth": 3}}, "missing: backbone.2"),
    ):
        change(network, **values)
        with pytest.raises(ValueError, match=words):
            Generator.from_pretrained(folder)
        network.write_text(said)
    network.unlink()
    with pytest.raises(FileNotFoundError, match=r"transformer' holds no config.json"):
        Generator.from_pretrained(folder)


def as_pull_request(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of the original as RAEDiT2DModel of pull request 13231 names it."""
    out = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            for name, part in zip(("to_q", "to_k", "to_v"), value.chunk(3), strict=True):
                out[key.replace(".qkv.", f".{name}.")] = part.clone()
        elif ".mlp.w12." in key:
            gate, values = value.chunk(2)
            out[key.replace(".w12.", ".net.0.proj.")] = torch.cat([values, gate])
        else:
            for ours, theirs in ((".attn.proj.", ".attn.to_out.0."), (".mlp.w3.", ".mlp.net.2."),
                                 (".mlp.fc1.", ".mlp.net.0.proj."), (".mlp.fc2.", ".mlp.net.2.")):  # fmt: skip
                key = key.replace(ours, theirs)
            out[key] = value
    return out


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"mlp": "gelu", "norm": "layer"}], ids=["swiglu", "gelu"])
def test_folders_of_pull_request_13231_are_read(options, tmp_path):
    folder = tmp_path / "theirs"
    make_diffusers("mae").save_pretrained(folder / "vae")
    denoiser = DiTDH(128, 4, 32, 2, 4, 48, 1, 4, 3, **options)
    randomise(denoiser, 1)
    autoencoder = RAE.from_pretrained(folder / "vae")
    save_original(autoencoder, tmp_path / "original", denoiser)
    (folder / "transformer").mkdir()
    (folder / "scheduler").mkdir()
    state = as_pull_request(torch.load(tmp_path / "original" / "stage2_model.pt"))
    save_file(state, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "RAEDiT2DModel", "sample_size": 4, "in_channels": 128, "num_classes": 3, "patch_size": 1,
              "hidden_size": [32, 48], "depth": [2, 1], "num_heads": [4, 4], "use_swiglu": not options,
              "use_rmsnorm": not options, "class_dropout_prob": 0.1}  # fmt: skip
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    schedule = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.5, "use_karras_sigmas": False}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    names = {"0": "ant", "2": "cat", "1": "bee"}
    index = {"_class_name": "RAEDiTPipeline", "id2label": names, "transformer": ["diffusers", "RAEDiT2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    model = Generator.from_pretrained(folder)
    assert state_hash(model.denoiser.state_dict()) == state_hash(denoiser.state_dict())
    assert (model.flow.shift, model.class_names, model.sampler.grid.steps) == (2.5, ("ant", "bee", "cat"), 50)
    assert state_hash(model.autoencoder.decoder.state_dict()) == state_hash(autoencoder.decoder.state_dict())
    save_pipeline(model, tmp_path / "out")  # and out again, as ours
    assert load_file(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors").keys()
    network = folder / "transformer" / "config.json"
    for values, words in (
        ({"wo_shift": True}, "wo_shift=True of the original is not supported"),
        ({"class_dropout_prob": 0.0}, "leaves no row for no class"),
        ({"use_qknorm": True, "use_rmsnorm": False}, "another epsilon"),
        ({"in_channels": None}, "does not describe a RAEDiT2DModel"),
    ):
        change(network, **values)
        with pytest.raises(ValueError, match=words):
            Generator.from_pretrained(folder)
        network.write_text(json.dumps(config))
    change(folder / "scheduler" / "scheduler_config.json", use_karras_sigmas=True)
    with pytest.raises(ValueError, match="with use_karras_sigmas has no counterpart"):
        Generator.from_pretrained(folder)
    change(folder / "scheduler" / "scheduler_config.json", use_karras_sigmas=False, shift="two")
    with pytest.raises(ValueError, match="with shift='two' has no counterpart"):
        Generator.from_pretrained(folder)
    for names in (["ant"], {"a": "ant"}):
        change(folder / "model_index.json", id2label=names)
        with pytest.raises(ValueError, match=r"model_index.json.* says nothing usable of id2label"):
            Generator.from_pretrained(folder)
