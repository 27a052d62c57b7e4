"""ONNX export: ``decoder.onnx``, ``denoiser.onnx``, ``guide.onnx``, and ``onnx.json`` with all that a sampler needs.

The decoder takes normalised latents and undoes the normalisation itself. A denoiser returns velocities, whatever it was trained
to predict, so a sampler needs neither the path nor the prediction. Encoder and text encoder are not exported.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rae.autoencoder import RAE
from rae.denoiser import Denoiser
from rae.flow import FlowMatching
from rae.formats.original import refuse_existing
from rae.generator import Generator
from rae.io.describe import describe
from rae.io.files import write_json
from rae.rng import normal, sample_seeds

CONFIG = "onnx.json"
FORMAT, VERSION = "rae-onnx", 1
PARTS = ("decoder", "denoiser", "guide")
FILES = (CONFIG, *(f"{part}.onnx{end}" for part in PARTS for end in ("", ".data")))
"""All possible output files; ``.data`` holds the weights of networks too large for one file."""
OPSET = 20
"""The first opset with a GELU operator; onnxruntime supports it from 1.17."""
TOLERANCE = 1e-4
"""Maximum difference from PyTorch's output, relative to its largest absolute value if that exceeds 1."""
_LARGEST = 1_900_000_000  # bytes of weights in one file; protobuf's limit is 2 GiB
_ROWS = 3  # samples to compare
log = logging.getLogger(__name__)
for _name in ("onnx_ir", "onnxscript"):  # they would log every rule that they try
    logging.getLogger(_name).setLevel(logging.WARNING)


class Images(nn.Module):
    """The decoder as exported: undoes the normalisation and clamps the images.

    Args:
        autoencoder: The autoencoder; its encoder is not used.
    """

    def __init__(self, autoencoder: RAE) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        """Normalised latents B×C×h×w => images B×3×H×W in [0, 1]."""
        return self.autoencoder.decode(latents).clamp(0, 1)


class Velocities(nn.Module):
    """A denoiser as exported: returns velocities instead of its predictions.

    Args:
        denoiser: The denoiser.
        flow: Converts predictions to velocities.
    """

    def __init__(self, denoiser: Denoiser, flow: FlowMatching) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.flow = flow
        self.names = (["r"] if denoiser.second_time else []) + list(denoiser.condition.names)

    def forward(self, x_t: Tensor, t: Tensor, *told: Tensor) -> Any:
        """x_t B×…, t B and the other inputs, in the order of ``names`` => velocity B×…, or the pair with the base head's."""
        options: dict[str, Any] = {"base": True} if self.denoiser.has_base else {}
        return self.flow.velocity_model(self.denoiser)(x_t, t, **options, **dict(zip(self.names, told, strict=True)))


def save_onnx(model: RAE | Generator, folder: str | Path) -> Path:
    """Exports a model's networks to ONNX, float32, any batch size; checks them against PyTorch if onnxruntime is installed.

    Args:
        model: Autoencoder, of which only the decoder is exported, or generator.
        folder: Folder to write into.

    Returns:
        The folder.

    Raises:
        FileExistsError: One of the files already exists.
        ValueError: A network cannot be exported, or its output differs by more than :data:`TOLERANCE`.
    """
    folder = Path(folder).expanduser()
    refuse_existing(folder, *FILES)
    folder.mkdir(parents=True, exist_ok=True)
    autoencoder = model.autoencoder if isinstance(model, Generator) else model
    latents = {"latents": _draws(_ROWS, autoencoder.latent_shape)}
    networks: dict[str, Any] = {"decoder": write("decoder", Images(autoencoder), latents, ["images"], folder)}
    config: dict[str, Any] = {
        "format": FORMAT,
        "format_version": VERSION,
        "library_version": metadata.version("rae"),
        "opset": OPSET,
        "image_size": autoencoder.image_size,
        "latent_shape": list(autoencoder.latent_shape),
    }
    if isinstance(model, Generator):
        for part, network in (("denoiser", model.denoiser), ("guide", model.guide)):
            if network is not None:
                outputs = ["velocity", "base"] if network.has_base else ["velocity"]
                networks[part] = write(part, Velocities(network, model.flow), _inputs(network), outputs, folder)
        config |= describe_sampling(model)
        if model.text_encoder is not None:
            log.warning("the text encoder is not written: make the features of prompts with this library")
    write_json(folder / CONFIG, {**config, "networks": networks})
    return folder


def describe_sampling(model: Generator) -> dict[str, Any]:
    """What a sampler in another language needs to know: state, times, guidance, classes and null conditions."""
    told = {name: value.flatten()[0].item() for name, value in model.denoiser.condition.nothing(1).items()}
    return {
        "state_shape": list(model.denoiser.state_shape),
        "class_token": model.denoiser.takes_class_token,
        "num_classes": model.num_classes,
        "class_names": list(model.class_names),
        "null": told,
        "negative_prompt": model.negative_prompt,
        "prediction": model.flow.prediction,
        "shift": model.flow.shift,
        "times": model.sampler.grid.times(1.0 if model.sampler.second_time else model.flow.shift).tolist(),
        "sampler": describe(model.sampler),
        "guidance": describe(model.guidance),
    }


def _draws(rows: int, shape: tuple[int, ...], purpose: str = "state") -> Tensor:
    return normal(sample_seeds(0, purpose, [0] * rows, range(rows)), shape)


def _inputs(denoiser: Denoiser) -> dict[str, Tensor]:
    """Inputs by name, with no two samples alike."""
    t = torch.linspace(1.0, 0.1, _ROWS)
    given = {"x_t": _draws(_ROWS, denoiser.state_shape), "t": t}
    given |= {"r": t / 2} if denoiser.second_time else {}
    for name, nothing in denoiser.condition.nothing(_ROWS).items():
        numbers = torch.arange(nothing[0].numel()).reshape(nothing.shape[1:]) + torch.arange(_ROWS).reshape(
            -1, *(1,) * (nothing.ndim - 1)
        )
        if nothing.dtype == torch.bool:
            given[name] = numbers > 1
        elif nothing.is_floating_point():
            given[name] = _draws(_ROWS, tuple(nothing.shape[1:]), name)
        else:
            given[name] = numbers % (nothing + 1)  # nothing is the largest value, the null label
    return given


@torch.no_grad()
def write(part: str, network: nn.Module, inputs: dict[str, Tensor], outputs: list[str], folder: Path) -> dict[str, Any]:
    """Exports one network, checks it and returns its entry for ``onnx.json``.

    Raises:
        ValueError: See :func:`save_onnx`.
    """
    file = folder / f"{part}.onnx"
    network.eval()
    batch = torch.export.Dim("batch")
    names = list(inputs)
    shapes: list[Any] = [{0: batch} for _ in names]
    if isinstance(network, Velocities):
        shapes = [*shapes[:2], tuple(shapes[2:])]  # the rest is one argument, *told
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # e.g. that all inputs share one batch size
            program: Any = torch.onnx.export(
                network,
                tuple(inputs.values()),
                input_names=names,
                output_names=outputs,
                opset_version=OPSET,
                dynamic_shapes=tuple(shapes),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter's errors have no other common base
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"to=onnx: the {part} cannot be expressed in ONNX ({reason}); write the network with torch's own operations, or use "
            "to=rae and sample with this library"
        ) from error
    values = [*program.model.graph.inputs, *program.model.graph.outputs]
    if fixed := [str(value.name) for value in values if isinstance(value.shape[0], int)]:
        raise ValueError(
            f"to=onnx: the {part} works for a batch of {_ROWS} alone ({', '.join(fixed)}): somewhere it reads the batch's size as "
            "a number, as len(x) does; write x.shape[0] instead"
        )
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    program.save(str(file), external_data=size > _LARGEST)
    tensors = {value.name: [str(value.shape[0]), *map(int, value.shape[1:])] for value in values}
    return {
        "file": file.name,
        "inputs": {name: {"shape": tensors[name], "dtype": str(inputs[name].dtype)[6:]} for name in names},
        "outputs": {name: {"shape": tensors[name], "dtype": "float32"} for name in outputs},
        "difference": compare(part, network, inputs, file),
    }


def compare(part: str, network: nn.Module, inputs: dict[str, Tensor], file: Path) -> float | None:
    """Largest difference between PyTorch's and onnxruntime's outputs, for one sample and several; None without onnxruntime.

    Args:
        part: Name of the network, for messages.
        network: The network in PyTorch.
        inputs: Its inputs B×… by name, in order.
        file: The network in ONNX.

    Raises:
        ValueError: The difference exceeds :data:`TOLERANCE`.
    """
    if find_spec("onnxruntime") is None:
        log.warning('%s: not compared with PyTorch, since onnxruntime is not installed: pip install "rae[onnx]"', part)
        return None
    session = importlib.import_module("onnxruntime").InferenceSession(file, providers=["CPUExecutionProvider"])
    worst = 0.0
    for rows in (1, _ROWS):
        given = {name: value[:rows] for name, value in inputs.items()}
        found = network(*given.values())
        ours = found if isinstance(found, tuple) else (found,)
        theirs = session.run(None, {name: value.numpy() for name, value in given.items()})
        for one, other in zip(ours, theirs, strict=True):
            difference = (one - torch.from_numpy(other)).abs().max() / one.abs().max().clamp(min=1)
            worst = max(worst, float(difference))
    if not worst <= TOLERANCE:
        raise ValueError(
            f"to=onnx: {file.name} differs from PyTorch by {worst:.2g}, more than {TOLERANCE:g}: use to=rae and sample with this "
            "library"
        )
    log.info("%s: differs from PyTorch by at most %.1g", part, worst)
    return worst
