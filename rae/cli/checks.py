"""Checks that run before torch is imported, networks are built and weights are loaded."""

from __future__ import annotations

import difflib
import re
from importlib.util import find_spec
from pathlib import Path

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from rae.cli.compose import walk
from rae.io.describe import targets_of
from rae.io.errors import ConfigError, no_train_path
from rae.io.references import reference_file


def check_metric(node: DictConfig | None) -> bool:
    """Rejects a metric, or a set with a metric, whose reference is missing, before its detector's weights are loaded.

    Returns:
        Whether it compares reconstructions with their originals.

    Raises:
        ValueError: It needs a reference and names none.
        FileNotFoundError: The reference does not exist.
    """
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return False
    kind = get_object(node["_target_"])
    pairs = [check_metric(inner) for name, inner in node.items() if name not in ("detector", "perceptual")]
    reference = node.get("reference")
    for one in reference.values() if isinstance(reference, DictConfig) else [reference]:
        if isinstance(one, str):
            reference_file(one, node._get_full_key("reference"))
    if hasattr(kind, "check_reference") and "metrics" in node:
        kind.check_reference(node["metrics"], reference)
    return bool(getattr(kind, "takes_originals", False)) or any(pairs)


MODELS = (
    *("checkpoint", "decoder_checkpoint", "guide_checkpoint", "init_checkpoint", "teacher_checkpoint"),
    *("discriminator_checkpoint", "callbacks.evaluation.guide"),
)
"""Keys that name trained models."""
_IMAGES = "an .npz file, a folder of images or of tar shards"
GIVEN = {
    **dict.fromkeys(("samples", "originals", "neighbours_of"), _IMAGES),
    "prompts": "a text file, a .jsonl file, or a folder of text files",
    "captions": "a .jsonl or .csv file",
    "scores": "a scores.json of rae-evaluate or rae-reconstruct",
}
"""What keys for files and folders accept."""
_FROZEN = ("alignment", "callbacks.evaluation", "detector", "discriminator", "encoder", "metric", "text_encoder")
"""Sections of a configuration that hold frozen networks."""
_WITHOUT_WEIGHTS = ("cost", "download", "convert_config")
"""Commands that read no weights."""
_TRAINS_ON = ("train", "stats", "cache_latents")
"""Commands that read the training images."""


def _check_packages(cfg: DictConfig, config: str) -> None:
    """Raises ConfigError if a command needs an optional package that is not installed."""
    if config == "app" and find_spec("gradio") is None:
        raise ConfigError('rae-app needs Gradio, which is not installed: pip install "rae[app]"')
    if config == "convert" and cfg.to == "onnx" and None in map(find_spec, ("onnx", "onnxscript")):
        raise ConfigError('to=onnx needs onnx and onnxscript, which are not installed: pip install "rae[onnx]"')


def weight_files(cfg: DictConfig) -> list[str]:
    """Keys that name local weight files of frozen networks."""
    keys = [key for key, _ in walk(cfg)]
    frozen = [key for key in keys if key.startswith(_FROZEN) and key.endswith(".checkpoint")]
    return [*frozen, *(key for key in keys if key.endswith("vgg_checkpoint"))]


def _check_weights(cfg: DictConfig) -> None:
    """Raises FileNotFoundError if a named trained model or weight file of a frozen network does not exist."""
    for key in MODELS:
        value = OmegaConf.select(cfg, key, throw_on_missing=False)
        if isinstance(value, str) and not Path(value).expanduser().exists() and not _may_be_on_the_hub(value):
            folder = Path(value).expanduser().parent
            near = difflib.get_close_matches(Path(value).name, [one.name for one in folder.glob("*")], 3)
            hint = f" ({folder} holds {', '.join(near)})" if near else ""
            raise FileNotFoundError(
                f"{key}: checkpoint {value!r} does not exist{hint}: give a trained run's folder or a .ckpt file"
            )
    for key in weight_files(cfg):
        value = OmegaConf.select(cfg, key, throw_on_missing=False)
        if isinstance(value, str) and not Path(value).expanduser().is_file():
            raise FileNotFoundError(
                f"{key}={value}: weight file {value!r} does not exist; give the path of an existing file"
            )


def check_files(cfg: DictConfig, config: str) -> None:
    """Rejects named files and folders that do not exist, unnamed training data, and commands whose packages are missing.

    Raises:
        ConfigError: Training data are unnamed or missing, or published files or packages are missing.
        FileNotFoundError: A model, images or statistics do not exist.
    """
    _check_packages(cfg, config)
    if config != "download" and "collection" in cfg:
        check_published(cfg)
    check_denoiser(cfg)
    if config == "evaluate" and [cfg.samples, cfg.checkpoint, cfg.latents, cfg.report].count(None) != 3:
        raise ConfigError(
            f"samples={cfg.samples}, checkpoint={cfg.checkpoint}, latents={cfg.latents}, report={cfg.report}: give one of them, "
            "samples=… (an .npz, a folder of images or of tar shards), checkpoint=… (a model that makes them), latents=… "
            "decoders=[…] or report=… (training runs)"
        )
    if config not in _WITHOUT_WEIGHTS:
        _check_weights(cfg)
    for key, kinds in GIVEN.items():
        value = cfg.get(key)
        if isinstance(value, str) and not Path(value).expanduser().exists():
            raise FileNotFoundError(f"{key}={value} does not exist: give {kinds}")
    of_images = config == "reference" and cfg.get("source") is None
    if config in _TRAINS_ON or of_images:
        split = cfg.split if of_images else "train"
        for key, one in data_sets(cfg.get("data")).items():
            if not str(one.get("_target_")).startswith("rae.data."):
                continue
            if split == "val" and one.get("val_path", "") is None:
                raise ConfigError(
                    f"{key}.val_path is not given; add {key}.val_path=/path/to/imagenet/val, or choose split=train"
                )
            if (split == "train" and one.get("train_path", "") is None) or one.get("repo", "") is None:
                raise no_train_path(str(one["_target_"]).rpartition(".")[2], key)
        check_paths(cfg.get("data"))


def check_space(cfg: DictConfig) -> None:
    """Refuses to train a denoiser on a decoder's input if that decoder, or the statistics that name it, is not given.

    Raises:
        ConfigError: Says what to give.
    """
    if cfg.get("denoiser") is None or OmegaConf.select(cfg, "latent.space") != "decoder_input":
        return
    for key in ("decoder_checkpoint", "latent.stats"):
        if (value := OmegaConf.select(cfg, key)) in (None, "none"):
            raise ConfigError(
                f"latent.space=decoder_input with {key}={value}: such latents belong to one decoder; give "
                "decoder_checkpoint=…, and latent.stats=… of rae-stats latent.space=decoder_input decoder_checkpoint=…"
            )


def check_denoiser(cfg: DictConfig) -> None:
    """Rejects a condition or a guidance that the configuration's denoiser does not support.

    Raises:
        ConfigError: Names both.
    """
    denoiser, condition = cfg.get("denoiser"), cfg.get("condition")
    if denoiser is None:
        return
    in_context = denoiser.get("condition") is not None
    kind = "" if condition is None else str(condition.get("_target_")).rpartition(".")[2]
    if not in_context and kind not in ("", "LabelTokens") and str(denoiser.get("_target_")).startswith("rae."):
        raise ConfigError(
            f"condition is a {kind}, but {denoiser._target_} is told a class label alone; choose denoiser=in_context_dit_dh_xl"
        )
    if _guides_by(cfg, "InternalGuidance") and denoiser.get("base_depth") is None:
        raise ConfigError(
            f"internal guidance needs a base head, which {denoiser._target_} is without: choose denoiser=in_context_dit_dh_xl with "
            "denoiser.base_depth, or guidance=cfg"
        )


def _may_be_on_the_hub(source: str) -> bool:
    """Whether a source may be a hub id, ``owner/name``; if a local folder has the owner's name, it is a path."""
    owner, slash, _ = source.partition("/")
    return bool(slash) and not Path(source).expanduser().is_absolute() and not Path(owner).is_dir()


def data_sets(data: DictConfig | None) -> dict[str, DictConfig]:
    """Configurations of a data set and of all that it mixes, by key; empty if there is none."""
    if not isinstance(data, DictConfig) or data._is_none():
        return {}
    sources = data.get("sources")
    inner = sources.items() if isinstance(sources, DictConfig) and not sources._is_none() else ()
    mixed = {f"data.sources.{name!s}.data": one.get("data") for name, one in inner if isinstance(one, DictConfig)}
    return {"data": data} | {key: one for key, one in mixed.items() if isinstance(one, DictConfig)}


def check_paths(data: DictConfig | None) -> None:
    """Rejects data that do not exist, before networks are built and their weights loaded.

    URLs and glob patterns are left to the data set, and so are all paths of third-party data sets, where they may mean
    something else.

    Raises:
        ConfigError: A path does not exist.
    """
    for name, one in data_sets(data).items():
        if not str(one.get("_target_")).startswith("rae.data."):
            continue
        for key in ("train_path", "val_path"):
            path = one.get(key)
            if isinstance(path, str) and not re.search(r"://|[{*?\[]", path) and not Path(path).expanduser().exists():
                raise ConfigError(f"{name}.{key}={path} does not exist; give the path of the images, shards or latents")


def refuse_existing(cfg: DictConfig, *files: Path) -> None:
    """Applies the rule of all commands that existing results (``files``) are replaced only with ``force=true``.

    Raises:
        ConfigError: One of them exists.
    """
    for file in files:
        if file.exists() and not cfg.force:
            raise ConfigError(f"{str(file)!r} exists: force=true replaces it, name=… or output_dir=… writes elsewhere")


def _guides_by(cfg: DictConfig, kind: str) -> bool:
    """Whether a kind of guidance is chosen, alone or as part of a composition."""
    node = cfg.get("guidance")
    described = OmegaConf.to_container(node) if isinstance(node, DictConfig) else None
    return any(name.endswith(f".{kind}") for name in targets_of(described))


def check_published(cfg: DictConfig) -> None:
    """Rejects a published model whose files are missing.

    Raises:
        ConfigError: Names them, and the command that fetches them.
    """
    wanted = ["checkpoint", "decoder_checkpoint", "latent.stats"]
    encoder = OmegaConf.select(cfg, "encoder.checkpoint", throw_on_missing=False)
    if encoder is not None and Path(encoder).is_relative_to(cfg.collection):
        wanted.append("encoder.checkpoint")
    if _guides_by(cfg, "AutoGuidance"):  # needs a guide
        wanted.append("guide_checkpoint")
    found = {key: OmegaConf.select(cfg, key) for key in wanted}
    absent = [
        f"{key}={value}"
        for key, value in found.items()
        if value not in (None, "none") and not Path(value).expanduser().exists()
    ]
    if absent:
        raise ConfigError(
            f"{', '.join(absent)} does not exist: rae-download model=… collection={cfg.get('collection')} fetches the files of a "
            "published model; collection=… says where they are"
        )
