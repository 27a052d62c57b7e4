"""Signals at random moments: the same command again ends as if nothing had been."""

from __future__ import annotations

import pytest

from tests.attacks.signals import attack


@pytest.mark.slow
def test_a_disturbed_training_ends_as_an_undisturbed_one(tmp_path):
    """A share of ``python -m tests.attacks.signals``; sampling is killed in test_online."""
    command = "train stage 2"
    counts = attack(1, 5, tmp_path, command)
    assert counts[command]["trials"] == 1
    assert not counts[command]["differ"]
