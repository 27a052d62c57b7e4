"""What can be refused before networks are built and weights looked for."""

from __future__ import annotations

from pathlib import Path

from hydra.utils import get_object
from omegaconf import DictConfig


def check_metric(node: DictConfig | None) -> bool:
    """Refuses a metric whose reference is not there, before its detector's weights are looked for.

    Args:
        node: The configuration of a metric, or of a set of them.

    Returns:
        Whether it takes reconstructions with their originals.

    Raises:
        ValueError: It needs a reference and names none.
        FileNotFoundError: The reference does not exist.
    """
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return False
    kind = get_object(node["_target_"])
    pairs = [check_metric(inner) for name, inner in node.items() if name not in ("detector", "perceptual")]
    if isinstance(reference := node.get("reference"), str) and not Path(reference).expanduser().exists():
        raise FileNotFoundError(f"{node._get_full_key('reference')}={reference} does not exist")
    if hasattr(kind, "check_reference") and "metrics" in node:
        kind.check_reference(node["metrics"], reference)
    return bool(getattr(kind, "takes_originals", False)) or any(pairs)
