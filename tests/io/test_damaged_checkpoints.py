"""A checkpoint with one flipped bit is refused by whatever reads it; without checksums it is read as before."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from rae.commands.train import readable
from rae.formats.run import check_whole, content_hash, read_config, trained_weights
from rae.io.tensors import read_file


def write(file: Path, value: float = 0.0) -> Path:
    """A checkpoint with weights, their averages and an optimiser's state."""
    generator = torch.Generator().manual_seed(3)
    draw = [torch.randn(50, 40, generator=generator) + value for _ in range(3)]
    file.parent.mkdir(parents=True, exist_ok=True)
    average = {"network": "network", "averages": {"weight": draw[1]}}
    content = {"state_dict": {"network.weight": draw[0]}, "callbacks": {"EMA": average}}
    torch.save({**content, "optimizer_states": [draw[2]], "global_step": 4, "config": {"stage": 9}}, file)
    return file


def places(file: Path) -> dict[str, int]:
    """Where each tensor's bytes are in the file."""
    whole = file.read_bytes()
    content = torch.load(file, weights_only=True)
    tensors = {
        "live": content["state_dict"]["network.weight"],
        "average": content["callbacks"]["EMA"]["averages"]["weight"],
        "optimizer": content["optimizer_states"][0],
    }
    return {name: whole.index(tensor.numpy().tobytes()) for name, tensor in tensors.items()}


def flip(file: Path, place: int, bit: int) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[place] ^= 1 << bit
    file.write_bytes(damaged)


def test_one_flipped_bit_is_refused(tmp_path):
    older = write(tmp_path / "checkpoints" / "step_00000002.ckpt")
    file = write(tmp_path / "checkpoints" / "step_00000004.ckpt")
    (file.parent / "last.ckpt").symlink_to(file.name)
    whole, begins, draw = file.read_bytes(), places(file), random.Random(0)
    assert readable(file.parent / "last.ckpt") == file.parent / "last.ckpt"
    for _ in range(44):
        tensor = draw.choice(sorted(begins))
        flip(file, begins[tensor] + draw.randrange(50 * 40 * 4), draw.randrange(8))
        with pytest.raises(ValueError, match=rf"last.ckpt' is damaged.*of step 4, can be read: resume={older}"):
            readable(file.parent / "last.ckpt")
        with pytest.raises(ValueError, match=r"step_00000004.ckpt' is damaged"):
            read_file(file)
        for averaged, name in ((True, "average"), (False, "live")):
            if tensor == name:
                with pytest.raises(ValueError, match=r"last.ckpt' is damaged"):
                    trained_weights(tmp_path, "network", averaged)
            else:
                trained_weights(tmp_path, "network", averaged)  # it reads nothing of what is damaged
        file.write_bytes(whole)
    assert torch.equal(
        trained_weights(tmp_path, "network")["weight"], read_file(older)["callbacks"]["EMA"]["averages"]["weight"]
    )


def test_a_flipped_bit_beside_the_tensors_is_refused(tmp_path):
    file = write(tmp_path / "a.ckpt")
    flip(file, file.read_bytes().index(b"stage") + 1, 0)
    with pytest.raises(ValueError, match=r"a.ckpt' is damaged"):
        read_config(file)


def test_a_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        file = write(tmp_path / "a.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    check_whole(file)
    assert trained_weights(file, "network")["weight"].shape == (50, 40)
    assert readable(file) == file


def test_the_hash_tells_contents(tmp_path):
    first, same, other = write(tmp_path / "a.ckpt"), write(tmp_path / "b.ckpt"), write(tmp_path / "c.ckpt", value=1.0)
    assert content_hash(first) == content_hash(same) != content_hash(other)


@pytest.mark.parametrize("state", [None, [torch.zeros(1)], {0: torch.zeros(1)}, {"network.weight": 3}])
def test_what_holds_no_weights_is_no_checkpoint(tmp_path, state):
    torch.save({"state_dict": state, "global_step": 1, "config": {}}, tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match=r"a\.ckpt' is no checkpoint of a training run: its '(state_dict|network)' holds"
    ):
        trained_weights(tmp_path / "a.ckpt", "network")
