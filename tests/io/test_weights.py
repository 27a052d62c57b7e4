"""Weight files: what is read, and how a module takes it over."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rae.io.tensors import load_strict, read_file


def write(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=draws).to(dtype) for name, shape in {"weight": (3, 2), "bias": (3,)}.items()
    }
    save_file(state, path)
    return state


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_mapped_tensors_are_the_files(tmp_path: Path, dtype):
    others = {"count": torch.tensor(7), "none": torch.zeros(0, 4), "flags": torch.tensor([True, False, True])}
    path = tmp_path / "w.safetensors"
    expected = write(path, dtype) | others
    save_file(expected, path)
    read = read_file(path, mapped=True)
    assert read.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(read[key], value)
        assert read[key].dtype == value.dtype


def test_a_truncated_file_is_refused_before_it_is_mapped(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    write(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="it may be truncated"):
        read_file(path, mapped=True)


def test_each_mapping_is_of_its_own_bytes(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    # 16 MiB; 64 mappings of the whole file would be 1 GiB.
    save_file({str(number): torch.zeros(2**16) for number in range(64)}, path)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    kept = read_file(path, mapped=True)
    more = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() - used
    assert len(kept) == 64
    assert more < 2**28


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
    load_strict(layer, read_file(tmp_path / "w.safetensors", mapped=True), "a file", adopt=True)
    with torch.no_grad():
        layer.weight.add_(1)
        layer.bias.add_(1)
    assert all(torch.equal(value, expected[key]) for key, value in read_file(tmp_path / "w.safetensors").items())
