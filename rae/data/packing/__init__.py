"""Packing images into shards."""

from rae.data.packing.origin import find_sources
from rae.data.packing.pack import ShardPlan, pack

__all__ = ["ShardPlan", "find_sources", "pack"]
