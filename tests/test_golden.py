"""Every golden case against the library, within the tolerance the case states.

The folder is ``tests/golden``, or the one that ``RAE_GOLDEN_DIR`` names. The check of a case is chosen by its name: the
longest name in the table that the case's name begins with. A case without a check fails.
"""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.golden_checks import Case, Check, data, decoder, denoiser, encoder, flow, metric, training

CHECKS: dict[str, Check] = {
    name: check
    for module in (data, decoder, denoiser, encoder, flow, metric, training)
    for name, check in module.CHECKS.items()
}
FOLDER = Path(os.environ.get("RAE_GOLDEN_DIR") or Path(__file__).parent / "golden")
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def test_the_folder_holds_cases():
    assert NAMES, f"no golden case in {FOLDER}"


def check_of(name: str) -> Check:
    """The check of a case, by the longest name that the case's begins with."""
    matching = [key for key in CHECKS if name.startswith(key)]
    assert matching, f"golden case {name!r} has no check; checks exist for {sorted(CHECKS)}"
    return CHECKS[max(matching, key=len)]


@cache
def computed_by_us(name: str) -> dict[str, Tensor]:
    """The outputs of a case as the library computes them from its inputs."""
    with torch.random.fork_rng():
        return check_of(name)(Case(FOLDER, name))


def compare(case: Case, computed: dict[str, Tensor], name: str) -> None:
    """Fails where an output of a case is further from ours than the case's tolerance."""
    assert case.outputs, f"golden case {name!r} holds no outputs"
    assert computed.keys() >= case.outputs.keys(), f"not computed: {sorted(case.outputs.keys() - computed.keys())}"
    for key, expected in case.outputs.items():
        actual = computed[key]
        assert actual.shape == expected.shape, f"{key}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        error = (actual.double() - expected.double()).abs().max().item()
        assert error <= case.tolerance[key], f"{key}: error {error:.3g} exceeds {case.tolerance[key]:.3g}"


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str):
    compare(Case(FOLDER, name), computed_by_us(name), name)


def tampered(folder: Path, name: str) -> Path:
    """A copy of the folder with one output moved by twice its tolerance."""
    case = Case(FOLDER, name)
    key = min(case.outputs)
    values = case.outputs[key].double().flatten()
    values[0] += max(2 * case.tolerance[key], 1e-5 * values[0].abs().item())
    tensors = {**case.tensors, key: values.reshape(case.outputs[key].shape)}
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)  # a case may read another's weights
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_tampered_case_fails(name: str, tmp_path: Path):
    case = Case(tampered(tmp_path, name), name)
    with pytest.raises(AssertionError, match=r"exceeds|outputs/"):
        compare(case, computed_by_us(name), name)


def test_a_case_without_a_check_fails():
    with pytest.raises(AssertionError, match="has no check"):
        check_of("something_new")
