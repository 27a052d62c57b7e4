"""Fully sharded runs, and checkpoints that are a folder with a share of every process: equal to plain ones, safe to open."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import rae
from rae.cli.errors import compose
from rae.cli.models import open_model
from rae.commands.train import readable
from rae.flow import AdaptiveSampler
from rae.formats.run import check_whole, content_hash, read_checkpoint, trained_weights
from rae.formats.shares import Shared, changed, read_shares, write_rest, write_share
from rae.training.checkpoint import RunCheckpoint
from rae.training.checkpoint_io import StreamedCheckpointIO
from rae.training.ema import EMA
from rae.training.scores import ScoreSamples
from rae.training.strategy import FullyShardedStrategy
from tests.attacks.files import write_run
from tests.helpers.small_models import make_generator
from tests.helpers.small_runs import script, train, watched
from tests.training.test_training import assert_same


def state(run: Path) -> dict[str, Any]:
    """All tensors of a run's last checkpoint, by number; weights are trained, so they differ."""
    found: list[Any] = []
    content = StreamedCheckpointIO().load_checkpoint(run / "last.ckpt", weights_only=True)
    for part in ("state_dict", "optimizer_states", "callbacks"):
        changed(content[part], torch.Tensor, found.append)
    assert len(found) > 100
    return {str(number): value for number, value in enumerate(found)}


def scores(run: Path) -> list[dict[str, float]]:
    return [json.loads(file.read_text())["scores"] for file in sorted((run / "evaluation").iterdir())]


@pytest.mark.slow
def test_fully_sharded_runs_are_the_plain_one(tmp_path: Path):
    """Validated, drawn and scored; continued by as many processes, by one, and after one."""
    torch.set_num_threads(1)
    watched(tmp_path / "one")
    script("sharded", tmp_path)

    plain = state(tmp_path / "one")
    for name in ("full", "shares"):
        run = tmp_path / name
        assert (run / "last.ckpt").is_dir() == (name == "shares")
        assert_same(plain, state(run), atol=2e-6, rtol=1e-5)
        first, second = (torch.load(place / "losses.pt") for place in (tmp_path / "one", run))
        assert second == pytest.approx(first, rel=1e-5)
        assert len(first) == len(scores(run)) == 3
        for own, other in zip(scores(tmp_path / "one"), scores(run), strict=True):
            assert other == pytest.approx(own, rel=2e-3)  # a grey level here and there
            assert own["eval/fd_pooled"] != own["eval/live/fd_pooled"]
        for picture in (tmp_path / "one" / "previews").iterdir():
            pair = [np.asarray(Image.open(place / "previews" / picture.name)) for place in (tmp_path / "one", run)]
            assert np.abs(pair[0].astype(int) - pair[1]).max() <= 1
            assert pair[0].std() > 1
        assert_same(state(run), state(tmp_path / f"{name}_rest"))
        assert scores(run)[1:] == scores(tmp_path / f"{name}_rest")
    assert_same(state(tmp_path / "shares"), state(tmp_path / "full_from_shares"))
    assert_same(plain, state(tmp_path / "full_from_one"), atol=2e-6, rtol=1e-5)
    for name in ("full", "shares"):
        watched(tmp_path / f"one_from_{name}", checkpoint=tmp_path / name / "step_00000003.ckpt")
        assert_same(plain, state(tmp_path / f"one_from_{name}"), atol=2e-6, rtol=1e-5)
    live = trained_weights(tmp_path / "shares" / "last.ckpt", "denoiser", averaged=False)
    whole = torch.load(tmp_path / "full" / "last.ckpt", weights_only=True)
    assert_same(live, {key.removeprefix("denoiser."): value for key, value in whole["state_dict"].items()})
    averages = trained_weights(tmp_path / "shares" / "last.ckpt", "denoiser")
    assert_same({**live, **whole["callbacks"]["EMA"]["averages"]}, averages)


def test_what_does_not_go_with_shares_is_refused(tmp_path: Path):
    ema, saver = EMA(0.9, "denoiser", device="cpu"), RunCheckpoint(str(tmp_path), background=True)
    whole, shares = (trainer_of(FullyShardedStrategy(sharded_checkpoints=kind)) for kind in (False, True))
    with pytest.raises(
        ValueError, match=r"ema\.device=cpu does not go with trainer=fsdp.*set callbacks\.ema\.device=null"
    ):
        ema.setup(whole, None, "fit")
    with pytest.raises(ValueError, match=r"background=true does not go with strategy\.sharded_checkpoints=true"):
        saver.setup(shares, None, "fit")
    metric: Any = SimpleNamespace(update=print, compute=dict, reset=print)
    with pytest.raises(
        ValueError, match=r"evaluation\.sampler=AdaptiveSampler takes as many steps as .* sampler=euler, or"
    ):
        ScoreSamples(metric, AdaptiveSampler()).on_fit_start(whole, None)


def trainer_of(strategy: Any) -> Any:
    return type("Trainer", (), {"strategy": strategy})()


# --- folders of shares ---------------------------------------------------------------------------------------------


def write(folder: Path, content: dict[str, Any], count: int = 3, **beside: Any) -> Path:
    """Shares the rows of every tensor of at least two dimensions out among a number of processes."""
    shares: list[list[torch.Tensor]] = [[] for _ in range(count)]

    def place(value: torch.Tensor) -> torch.Tensor:
        if value.ndim < 2:
            return value
        size = -(-len(value) // count)
        for number, share in enumerate(shares):
            share.append(value[number * size : (number + 1) * size].clone())
        return value.to("meta")

    rest = changed(content, torch.Tensor, place)
    for number, share in enumerate(shares):
        write_share(folder, number, share)
    write_rest(folder, {**rest, **beside}, count)
    return folder


@pytest.fixture(scope="module")
def model():
    return make_generator()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """A run of stage 2 whose last checkpoint is in shares; what is beside its tensors is what a file holds."""
    file = write_run(model, tmp_path)
    content = torch.load(file, weights_only=True)
    file.unlink()
    return write(file, content, encoder=content.pop("encoder"))


def test_shares_are_joined_as_they_were(tmp_path: Path):
    draws = torch.Generator().manual_seed(0)
    tensors = [torch.randn(rows, 4, generator=draws) for rows in (1, 2, 3, 7, 9)]
    content = {"a": tensors[:2], "b": {"c": (tensors[2], 5), 0: tensors[3]}, "d": torch.arange(3), "e": [tensors[4]]}
    found = read_shares(write(tmp_path / "a.ckpt", content))
    torch.testing.assert_close(changed(found, Shared, Shared.join), content, rtol=0, atol=0)
    nine = found["e"][0]
    for begin in range(10):
        for end in range(begin, 10):
            assert torch.equal(nine.rows(begin, end), tensors[4][begin:end])


def test_a_folder_of_shares_is_a_checkpoint(model, folder: Path):
    check_whole(folder)
    found = rae.load(folder)
    assert_same(model.denoiser.state_dict(), found.denoiser.state_dict())
    assert readable(folder) == folder
    before = content_hash(folder)
    pieces = torch.load(folder / "share_00001.pt", weights_only=True)
    pieces[0][0, 0] += 1
    write_share(folder, 1, pieces)
    assert content_hash(folder) != before


def test_damaged_shares_are_refused(folder: Path):
    share = folder / "share_00001.pt"
    whole = share.read_bytes()
    pieces = torch.load(share, weights_only=True)
    name = next(name for name, value in read_checkpoint(folder)["state_dict"].items() if isinstance(value, Shared))
    damaged = bytearray(whole)
    damaged[whole.index(pieces[0].numpy().tobytes()) + 1] ^= 4
    share.write_bytes(damaged)
    assert name.startswith("denoiser.")
    for call in (lambda: trained_weights(folder, "denoiser", averaged=False), lambda: check_whole(folder)):
        with pytest.raises(ValueError, match=r"share_00001.pt' is damaged"):
            call()
    share.unlink()
    with pytest.raises(ValueError, match=r"is damaged: it holds 2 of 3 shares.*There is no other one"):
        readable(folder)


class Hostile:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.canary}",))


def hostile_folders(folder: Path, canary: Path) -> dict[str, str]:
    """Makes a folder hostile in one way after the other; what each is to be answered."""
    rest, share = folder / "meta.pt", folder / "share_00001.pt"
    kept = {file: file.read_bytes() for file in (rest, share)}
    content, pieces = (torch.load(file, weights_only=True) for file in kept)
    wide = next(number for number, piece in enumerate(pieces) if piece.ndim == 2)

    def pickled(file: Path) -> None:
        file.write_bytes(pickle.dumps(Hostile(canary)))

    def saved(file: Path) -> None:
        torch.save({**content, "global_step": Hostile(canary)} if file == rest else [Hostile(canary)], file)

    def of_torch() -> None:
        torch.save({key: value for key, value in content.items() if key != "shares"}, rest)
        pickled(folder / ".metadata")

    def piece(value: Any) -> None:
        torch.save([*pieces[:wide], value, *pieces[wide + 1 :]], share)

    far = torch.zeros(1).expand(10**9, *pieces[wide].shape[1:])
    ways = {
        "the format of torch.distributed.checkpoint is not read": of_torch,
        r"meta.pt' is refused: it is no file of tensors": lambda: pickled(rest),
        r"meta.pt' is refused": lambda: saved(rest),
        r"share_00001.pt' is refused: it is no file of tensors": lambda: pickled(share),
        r"share_00001.pt' is refused": lambda: saved(share),
        "do not make up the tensors": lambda: piece(far),
        "do not make up the tensors that meta.pt": lambda: piece(pieces[wide].double()),
        "its shares do not make up": lambda: piece("text"),
        r"its shares are not of \d+ tensors each": lambda: torch.save(pieces[1:], share),
        "its shares are not of": lambda: torch.save({"a": 1}, share),
        r"it holds 3 of 1000000000000 shares": lambda: torch.save({**content, "shares": 10**12}, rest),
        "does not say of how many shares": lambda: torch.save({**content, "shares": "2"}, rest),
        "meta.pt does not say": lambda: torch.save([content], rest),
    }
    for answer, way in ways.items():
        for file, before in kept.items():
            file.write_bytes(before)
        (folder / ".metadata").unlink(missing_ok=True)
        way()
        yield answer


@pytest.mark.slow
def test_folders_of_strangers_run_nothing(folder: Path, tmp_path: Path):
    """As rae.load, rae-sample and a run that continues read them."""
    cfg = compose("sample", [f"checkpoint={folder}", "device=cpu", "sampler=euler"])
    canary = tmp_path / "canary"
    for answer in hostile_folders(folder, canary):
        for call in (lambda: rae.load(folder), lambda: open_model(cfg, encode=True), lambda: readable(folder)):
            with pytest.raises(ValueError, match=answer) as caught:
                call()
            assert "\n" not in str(caught.value)
        assert not canary.exists()
    pickle.loads(pickle.dumps(Hostile(canary)))
    assert canary.exists()  # had any of them run, it would show


def test_a_plain_run_continues_from_shares(tmp_path: Path):
    saver = RunCheckpoint(str(tmp_path / "whole"), every_n_steps=3, keep=9)
    train(2, tmp_path, steps=5, callbacks=(EMA(0.9, "denoiser"), saver))
    content = torch.load(tmp_path / "whole" / "step_00000003.ckpt", weights_only=True)
    folder = write(tmp_path / "shares.ckpt", content)
    rest = RunCheckpoint(str(tmp_path / "rest"))
    train(2, tmp_path, steps=5, callbacks=(EMA(0.9, "denoiser"), rest), checkpoint=str(folder))
    assert_same(state(tmp_path / "whole"), state(tmp_path / "rest"))
