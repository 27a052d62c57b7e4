"""Weight files: what is read, and how a module takes it over."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rae.weights import load_strict, read_file


def write(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=draws).to(dtype) for name, shape in {"weight": (3, 2), "bias": (3,)}.items()
    }
    save_file(state, path)
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copied", [None, re.compile("bias"), re.compile("weight|bias"), re.compile("nothing")])
def test_copied_and_mapped_tensors_are_the_same(tmp_path: Path, copied, dtype):
    expected = write(tmp_path / "w.safetensors", dtype)
    read = read_file(tmp_path / "w.safetensors", copied)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], expected[key]) and read[key].dtype == dtype for key in expected)


def test_a_module_adopts_tensors_of_its_type_and_converts_others(tmp_path: Path):
    expected = write(tmp_path / "w.safetensors", torch.float16)
    read = read_file(tmp_path / "w.safetensors")
    read["weight"] = read["weight"].float()
    layer = nn.Linear(2, 3).requires_grad_(False)
    layer.bias.requires_grad_(True)
    load_strict(layer, read, "a file", adopt=True)
    assert layer.weight.data_ptr() == read["weight"].data_ptr()
    assert layer.weight.dtype == layer.bias.dtype == torch.float32
    assert torch.equal(layer.weight, expected["weight"].float())
    assert torch.equal(layer.bias, expected["bias"].float())
    assert layer.bias.requires_grad
    assert not layer.weight.requires_grad
    other = nn.Linear(2, 3)
    load_strict(other, read, "a file")
    assert other.weight.data_ptr() != read["weight"].data_ptr()
    assert torch.equal(other.weight, layer.weight)


def test_changes_of_adopted_weights_stay_out_of_the_file(tmp_path: Path):
    expected = write(tmp_path / "w.safetensors")
    layer = nn.Linear(2, 3)
    load_strict(layer, read_file(tmp_path / "w.safetensors", re.compile("bias")), "a file", adopt=True)
    with torch.no_grad():
        layer.weight.add_(1)
        layer.bias.add_(1)
    assert all(torch.equal(value, expected[key]) for key, value in read_file(tmp_path / "w.safetensors").items())
