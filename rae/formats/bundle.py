"""What every source of weights becomes: the description of a model, and its tensors. Nothing is built before ``assemble``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rae.autoencoder import RAE
from rae.condition import readable_names
from rae.encoder import Encoder, differences
from rae.flow import dimension_shift
from rae.formats.decoder import load_decoder
from rae.formats.denoiser import load_denoiser
from rae.generator import Generator
from rae.io.describe import Described, rebuild, targets_of
from rae.io.errors import ConfigError
from rae.io.tensors import load_strict

PARTS = ("encoder", "decoder", "latent", "flow", "denoiser", "sampler", "guidance", "guide", "text_encoder")
"""What a model is made of."""
_MAY_DIFFER = ("input_size",)  # decoders serve other grids
_OF_THE_GRID = ("grid", "position_scale")
_LOADERS: dict[str, Callable[..., None]] = {"decoder": load_decoder, "denoiser": load_denoiser, "guide": load_denoiser}

States = Mapping[str, Callable[[], Mapping[str, Tensor]]]
Make = Callable[..., Any]
KINDS = (Described, dimension_shift)
"""What a description from elsewhere may build or call."""


@dataclass(frozen=True)
class Bundle:
    """A model that is not built yet."""

    source: str
    """Where it comes from, for messages."""
    description: dict[str, Any] = field(default_factory=dict)
    """Each of :data:`PARTS` as ``_target_`` and arguments, or None; beside them what else a run's configuration says."""
    states: States = field(default_factory=dict)
    """State dicts of the networks and of ``latent``, each read when it is called; in any naming that is known."""
    records: tuple[tuple[str, dict[str, Any] | None], ...] = ()
    """What each source says of its encoder, see :meth:`rae.encoder.Encoder.record`; ``states`` has the first one's weights."""
    text_record: Mapping[str, Any] | None = None
    """What tells the text encoder, see :meth:`rae.encoder.text.TextEncoder.fingerprint`."""
    mapped: bool = False
    """Whether tensors are mapped from a file and nobody else's, so that networks may take them over."""

    def override(self, changes: Mapping[str, Any]) -> Bundle:
        """With other parts: what is None in ``changes`` stays."""
        given = {key: value for key, value in changes.items() if value is not None or key not in self.description}
        return replace(self, description={**self.description, **given})

    def with_decoder(self, other: Bundle) -> Bundle:
        """With the decoder of another source, built as that one says; the grid stays.

        Args:
            other: What holds the decoder; one that does not describe it, a weight file, must fit this description.

        Raises:
            ConfigError: It holds no decoder.
        """
        if "decoder" not in other.states:
            raise ConfigError(
                f"decoder_checkpoint={other.source} holds no decoder; give a stage-1 run, an export or a weight file"
            )
        own, described = self.description.get("decoder"), other.description.get("decoder")
        if own and described and own.get("grid") != described.get("grid"):
            described = {**described, **{key: own[key] for key in _OF_THE_GRID if key in own}}
        encoder = {"encoder": other.states["encoder"]} if not self.records and "encoder" in other.states else {}
        return replace(
            self,
            description={**self.description, "decoder": described or own},
            states={**encoder, **self.states, "decoder": other.states["decoder"]},
            records=(*self.records, *other.records),
        )

    def with_guide(self, other: Bundle) -> Bundle:
        """With the denoiser of another source as the guide of autoguidance.

        Args:
            other: What holds it; one that does not describe it, a weight file, must fit this description's ``guide``.

        Raises:
            ConfigError: It holds no denoiser, or nothing says how it is built.
        """
        if "denoiser" not in other.states:
            raise ConfigError(f"guide_checkpoint={other.source} has no denoiser; give a run of stage 2 or its export")
        described = other.description.get("denoiser") or self.description.get("guide")
        if described is None:
            raise ConfigError(
                f"guide_checkpoint={other.source} holds weights alone: add +denoiser@guide=… to say of what"
            )
        states = {**self.states, "guide": other.states["denoiser"]}
        return replace(self, description={**self.description, "guide": described}, states=states)

    def without(self, *parts: str) -> Bundle:
        """Without some parts."""
        states = {key: value for key, value in self.states.items() if key not in parts}
        return replace(self, description={**self.description, **dict.fromkeys(parts)}, states=states)

    @property
    def wants_guide(self) -> bool:
        """Whether autoguidance is chosen, alone or as a part."""
        return any(name.endswith(".AutoGuidance") for name in targets_of(self.description.get("guidance")))

    def fill(self, part: str, network: Any) -> None:
        """Loads a network's weights, strictly.

        Args:
            part: ``decoder``, ``denoiser`` or ``guide``.
            network: The network.

        Raises:
            ValueError: There are none, or they do not fit; all keys are listed.
        """
        if part not in self.states:
            raise ValueError(f"{self.source!r} holds no {part}; it holds {', '.join(self.states) or 'no weights'}")
        _LOADERS[part](network, self.states[part](), f"{part} of {self.source!r}", assign=self.mapped)


def make_part(part: str, description: Any, **objects: Any) -> Any:
    """Builds one part of a model; None for none.

    Args:
        part: Its name.
        description: What it is; only classes of this library and such as the user named are built.
        objects: Ready-made arguments.
    """
    return None if description is None else rebuild(description, KINDS, **objects)


def assemble(bundle: Bundle, encode: bool = True, make: Make = make_part) -> RAE | Generator:
    """Builds a model and fills it, strictly.

    Args:
        bundle: The model.
        encode: Whether the encoder is built and loaded; sampling and decoding do without.
        make: Builds one part, see :func:`make_part`.

    Returns:
        A generator where there is a denoiser, else an autoencoder, in evaluation mode. torch's global generator is left as it is.

    Raises:
        ValueError: The weights do not fit, another encoder is meant, or the description makes no model.
    """
    with _in_words(bundle.source), torch.random.fork_rng(devices=[]):
        autoencoder = assemble_autoencoder(bundle, encode, make)
        if autoencoder.encoder is not None and autoencoder.latent.encoder is not None:
            autoencoder.encoder.check(
                autoencoder.latent.encoder, f"latent.stats={bundle.description['latent']['stats']}"
            )
        if bundle.description.get("denoiser") is None:
            return autoencoder.eval()
        parts = {name: make(name, bundle.description[name]) for name in ("flow", "sampler", "guidance")}
        guide = (
            _network(bundle, "guide", make) if bundle.description.get("guide") and "guide" in bundle.states else None
        )
        denoiser = _network(bundle, "denoiser", make)
        names = readable_names(bundle.description.get("class_names") or ())
        known = names if len(names) == denoiser.num_classes else ()
        text_encoder = _text_encoder(bundle, make)
        return Generator(
            autoencoder,
            denoiser,
            **parts,
            guide=guide,
            class_names=known,
            text_encoder=text_encoder,
            negative_prompt=bundle.description.get("negative_prompt"),
        ).eval()


def assemble_autoencoder(bundle: Bundle, encode: bool = True, make: Make = make_part) -> RAE:
    """The autoencoder alone; its decoder is untrained where the bundle holds none. As :func:`assemble` else."""
    encoder = make("encoder", bundle.description["encoder"]) if encode else None
    if "decoder" in bundle.states:
        decoder = _network(bundle, "decoder", make)
    else:
        decoder = make("decoder", bundle.description["decoder"])
    moments = bundle.states["latent"]() if "latent" in bundle.states else {}
    autoencoder = RAE(encoder, decoder, make("latent", bundle.description.get("latent"), **moments))
    _settle(autoencoder, bundle)
    return autoencoder


def _text_encoder(bundle: Bundle, make: Make) -> Any:
    """The text encoder with its weights, where a description names one; it must be the one that the source was made with."""
    described = bundle.description.get("text_encoder")
    if described is None:
        return None
    encoder = make("text_encoder", described)
    if "text_encoder" in bundle.states:
        load_strict(encoder, bundle.states["text_encoder"](), f"text_encoder of {bundle.source!r}")
    if bundle.text_record is not None:
        encoder.check(bundle.text_record, bundle.source)
    return encoder


def _network(bundle: Bundle, part: str, make: Make) -> Any:
    network = make(part, bundle.description[part])
    if network is None:
        raise ConfigError(
            f"{part} of {bundle.source!r}: its weights do not say how it is built; add +{part}=… (conf/{part})"
        )
    bundle.fill(part, network)
    return network


def _settle(autoencoder: RAE, bundle: Bundle) -> None:
    """Makes the encoder that of the bundle's sources, and refuses another; without one, compares the sources.

    Random weights become those that the first source keeps. The side that images are resized to may differ.

    Raises:
        ValueError: Names what differs.
    """
    encoder: Encoder | None = autoencoder.encoder
    if encoder is not None:
        for number, (source, record) in enumerate(bundle.records):
            if number == 0:
                weights = {"weights": bundle.states["encoder"]()} if "encoder" in bundle.states else {}
                encoder.take(None if record is None else {**record, **weights}, source, _MAY_DIFFER, bundle.mapped)
            elif record is not None and "fingerprint" in record:
                encoder.check(record["fingerprint"], source, _MAY_DIFFER)
        return
    autoencoder.encoder_entry = next(
        (record["entry"] for _, record in bundle.records if record and "entry" in record), None
    )
    known = [(source, record["fingerprint"]) for source, record in bundle.records if record and "fingerprint" in record]
    for source, described in known[1:]:
        first = known[0][1]
        both = {key: value for key, value in described.items() if key in first}  # an export says less than a run
        if found := differences(both, first, _MAY_DIFFER):
            raise ValueError(f"{source} was made with another encoder than {known[0][0]}: {found}")


@contextlib.contextmanager
def _in_words(source: str) -> Iterator[None]:
    """Says of values that make no model where they stand."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"{source!r} describes no model that could be built ({type(error).__name__}); save or export it again"
        ) from error
