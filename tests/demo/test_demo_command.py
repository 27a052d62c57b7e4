"""The demos' command line."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from rae.demo import command


@pytest.mark.parametrize(("given", "scale"), [([], 1.5), (["--guidance=0"], 0.0), (["--guidance=3"], 3.0)])
def test_the_scale_of_the_guidance_is_the_one_that_is_given(given, scale, monkeypatch, tmp_path):
    seen = []

    def commands(folder, guidance):
        seen.append((folder, guidance))
        return {}

    demo = SimpleNamespace(GUIDANCE=1.5, NOTE="", PICTURES=(), commands=commands, table=lambda *_: [("a", "b", "c")])
    monkeypatch.setitem(command.DEMOS, "digits", demo)
    monkeypatch.setattr(sys, "argv", ["rae-demo", "--output", str(tmp_path), *given])
    command.main()
    assert seen == [(tmp_path, scale)]
