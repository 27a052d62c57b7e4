"""A metric of one's own: a class with update, compute and reset is enough, and what is missing is said before any image."""

from __future__ import annotations

import pytest
from torch import nn

from rae.metric import MetricSet, ReconstructionMetrics, check_contract
from rae.metric.contract import identity_of


class Brightness:
    """Update, compute and reset, and no more."""

    def update(self, images, labels=None, index=None):
        """Adds samples."""

    def compute(self):
        return {}

    def reset(self):
        """Forgets."""


def test_a_class_without_a_base_is_a_metric():
    check_contract(Brightness)
    check_contract(Brightness())
    check_contract(ReconstructionMetrics(detector=None, perceptual=None))


def test_an_identity_may_be_left_out():
    class Part(Brightness, nn.Module):
        pass

    assert identity_of(Brightness()) is None
    assert MetricSet(part=Part()).identity == {"part": None}


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"metric str has no update and no compute and no reset"):
        check_contract("digits")

    class Named(Brightness):
        def identity(self):
            return {}

    with pytest.raises(
        ValueError, match=r"identity of metric Named is a method; make it a property that returns a dict"
    ):
        check_contract(Named())
