"""Weight files: what is read, and how a module takes it over."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rae.formats import diffusers
from rae.formats.original import read_original
from rae.io.files import write_text
from rae.io.hub import read_weights
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
    read = read_file(path)
    assert read.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(read[key], value)
        assert read[key].dtype == value.dtype


def test_a_truncated_file_is_refused_before_it_is_mapped(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    write(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="it may be truncated"):
        read_file(path)


def test_many_tensors_take_neither_memory_nor_open_files(tmp_path: Path):
    """1,200 tensors in one mapping: a process may have 1,024 files open by default, and a published pipeline has more tensors."""
    path = tmp_path / diffusers.WEIGHTS
    save_file({str(number): torch.zeros(2**12) for number in range(1200)}, path)
    before, files = address_space(), len(os.listdir("/proc/self/fd"))
    kept = diffusers.read_weights(tmp_path)
    assert len(kept) == 1200
    assert address_space() - before < 2**26  # the file has 19 MiB
    assert len(os.listdir("/proc/self/fd")) == files


def address_space() -> int:
    """Bytes of memory and mappings of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def test_a_module_adopts_tensors_of_its_type_and_converts_others(tmp_path: Path):
    expected = write(tmp_path / "w.safetensors", torch.float16)
    read = read_file(tmp_path / "w.safetensors")
    read["weight"] = read["weight"].float()
    layer = nn.Linear(2, 3).requires_grad_(False)
    layer.bias.requires_grad_(True)
    load_strict(layer, read, "a file", assign=True)
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
    load_strict(layer, read_file(tmp_path / "w.safetensors"), "a file", assign=True)
    with torch.no_grad():
        layer.weight.add_(1)
        layer.bias.add_(1)
    assert all(torch.equal(value, expected[key]) for key, value in read_file(tmp_path / "w.safetensors").items())


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), {0: torch.zeros(2)}, {"model": {"a": 1}}, 7])
def test_a_file_of_something_else_holds_no_state_dict(tmp_path: Path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(
        ValueError, match=r"w\.pt holds no state dict: encoder\.checkpoint needs a file of named tensors"
    ):
        read_weights(str(tmp_path / "w.pt"), None, None)
    with pytest.raises(ValueError, match=r"w\.pt' holds no state dict: named tensors are needed"):
        read_original(tmp_path / "w.pt")


def test_files_are_made_with_the_permissions_that_the_user_gives_all(tmp_path: Path, monkeypatch):
    """The umask is never set, not even for a moment: other threads would make files that anybody may change."""
    before = os.umask(0o027)
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
    try:
        file = write_text(tmp_path / "a.txt", "text")
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
