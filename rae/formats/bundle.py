"""The common form of all sources of weights: a model's description and tensors. Nothing is built before ``assemble``."""

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
"""The parts of a model."""
_MAY_DIFFER = ("input_size",)  # decoders work on other grids too
_OF_THE_GRID = ("grid", "position_scale")
_LOADERS: dict[str, Callable[..., None]] = {"decoder": load_decoder, "denoiser": load_denoiser, "guide": load_denoiser}

States = Mapping[str, Callable[[], Mapping[str, Tensor]]]
Make = Callable[..., Any]
KINDS = (Described, dimension_shift)
"""What an untrusted description may build or call."""


@dataclass(frozen=True)
class Bundle:
    """A model that has not been built yet."""

    source: str
    """Where it comes from, for messages."""
    description: dict[str, Any] = field(default_factory=dict)
    """Each of :data:`PARTS` as ``_target_`` and arguments, or None; also the other entries of a run's configuration."""
    states: States = field(default_factory=dict)
    """Functions that read the state dicts of the networks and of ``latent``, in any known naming."""
    records: tuple[tuple[str, dict[str, Any] | None], ...] = ()
    """Each source's record of its encoder, see :meth:`rae.encoder.Encoder.record`; ``states`` has the first one's weights."""
    text_record: Mapping[str, Any] | None = None
    """Fingerprint of the text encoder, see :meth:`rae.encoder.text.TextEncoder.fingerprint`."""
    mapped: bool = False
    """Whether tensors are memory-mapped from a file and not shared, so that networks may own them."""

    def override(self, changes: Mapping[str, Any]) -> Bundle:
        """Replaces parts; None in ``changes`` keeps the current one."""
        given = {key: value for key, value in changes.items() if value is not None or key not in self.description}
        return replace(self, description={**self.description, **given})

    def with_decoder(self, other: Bundle) -> Bundle:
        """Uses the decoder of another source, built from its description; the grid stays.

        Args:
            other: The source of the decoder; a weight file, which does not describe it, must fit this description.

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
        """Uses the denoiser of another source as the guide of autoguidance.

        Args:
            other: Its source; a weight file, which does not describe it, must fit this description's ``guide``.

        Raises:
            ConfigError: It holds no denoiser, or neither source describes how to build it.
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
        """Removes parts."""
        states = {key: value for key, value in self.states.items() if key not in parts}
        return replace(self, description={**self.description, **dict.fromkeys(parts)}, states=states)

    @property
    def wants_guide(self) -> bool:
        """Whether autoguidance is chosen, alone or as part of a composition."""
        return any(name.endswith(".AutoGuidance") for name in targets_of(self.description.get("guidance")))

    def fill(self, part: str, network: Any) -> None:
        """Loads a network's weights, strictly.

        Args:
            part: ``decoder``, ``denoiser`` or ``guide``.
            network: The network.

        Raises:
            ValueError: There are none, or they do not fit; lists all keys.
        """
        if part not in self.states:
            raise ValueError(f"{self.source!r} holds no {part}; it holds {', '.join(self.states) or 'no weights'}")
        _LOADERS[part](network, self.states[part](), f"{part} of {self.source!r}", assign=self.mapped)


def make_part(part: str, description: Any, **objects: Any) -> Any:
    """Builds one part of a model; None stays None.

    Args:
        part: Its name.
        description: Its description; only classes of this library or imported or named by the user are built.
        objects: Arguments that are already objects.
    """
    return None if description is None else rebuild(description, KINDS, **objects)


def assemble(bundle: Bundle, encode: bool = True, make: Make = make_part) -> RAE | Generator:
    """Builds a model and loads its weights, strictly.

    Args:
        bundle: The model.
        encode: Whether to build and load the encoder; sampling and decoding do not need it.
        make: Builds one part, see :func:`make_part`.

    Returns:
        A generator if there is a denoiser, else an autoencoder, in evaluation mode. torch's global generator is not advanced.

    Raises:
        ValueError: The weights do not fit, the sources used a different encoder, or the description is invalid.
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
    """Builds only the autoencoder, like :func:`assemble`; its decoder is untrained if the bundle holds none."""
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
    """Builds the text encoder with its weights, if described; it must be the one that the source was made with."""
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
    """Checks that the sources used this encoder; if none was built, compares the sources' encoders with each other.

    An encoder with random weights gets those stored by the first source. The input size may differ.

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
        both = {key: value for key, value in described.items() if key in first}  # an export records less than a run
        if found := differences(both, first, _MAY_DIFFER):
            raise ValueError(f"{source} was made with another encoder than {known[0][0]}: {found}")


@contextlib.contextmanager
def _in_words(source: str) -> Iterator[None]:
    """Turns errors of an invalid description into ValueError, naming the source."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"{source!r} describes no model that could be built ({type(error).__name__}); save or export it again"
        ) from error
