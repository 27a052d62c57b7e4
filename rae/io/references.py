"""Published reference statistics by name: file, images and origin of each."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

FOLDER = "references"
"""Where the files are searched, relative to the working folder."""
_ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
_RAEV2 = "the data set nanovisionx/nanogen-evals-stats on the Hugging Face hub"


class Published(NamedTuple):
    """A published reference."""

    file: str
    kind: str  # training or validation
    image_size: int
    detector: str | None  # whose features it holds; None if the file itself says so
    source: str  # where it comes from


PUBLISHED = {
    "adm_imagenet256": Published(
        "VIRTUAL_imagenet256_labeled.npz", "training", 256, "inception", f"{_ADM}/256/VIRTUAL_imagenet256_labeled.npz"
    ),
    "adm_imagenet512": Published(
        "VIRTUAL_imagenet512.npz", "training", 512, "inception", f"{_ADM}/512/VIRTUAL_imagenet512.npz"
    ),
    "jit_imagenet256": Published("imagenet_256_fid_stats.npz", "training", 256, "inception", _RAEV2),
    "val256": Published("val256.npz", "validation", 256, None, "rae-reference data.val_path=/imagenet/val name=val256"),
    **{
        f"{name}_imagenet256": Published(f"{name}_in256_t{side}.npz", "training", 256, name, _RAEV2)
        for name, side in (
            ("convnext", 224),
            ("dinov2_cls", 256),
            ("mae_cls", 224),
            ("siglip_cls", 224),
            ("clip_cls", 256),
        )
    },
}
"""ADM's VIRTUAL batches; JiT's training set statistics, used for RAEv2's gFID; those that FDr6 uses besides ADM's."""


def reference_file(reference: str | Path, option: str = "reference") -> tuple[Path, Published | None]:
    """The file of a reference and, if given by name, its entry.

    Args:
        reference: A file, or a name of :data:`PUBLISHED`.
        option: Option that gives the reference, for the message.

    Raises:
        FileNotFoundError: The file does not exist.
    """
    published = PUBLISHED.get(str(reference))
    if published is None:
        file = Path(reference).expanduser()
        if not file.is_file():
            raise FileNotFoundError(
                f"{option}={reference} does not exist: it is neither a file nor one of {', '.join(PUBLISHED)}"
            )
        return file, None
    file = Path(FOLDER) / published.file
    if not file.is_file():
        raise FileNotFoundError(f"{option}={reference} is {file}, which does not exist; get it from {published.source}")
    return file, published
