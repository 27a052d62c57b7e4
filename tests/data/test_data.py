"""Data modules: who sees which sample when, augmentation, resuming."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from rae.data import ImageDataModule, SeededDataset, ShardedBatchSampler
from rae.rng import uniform


def indices(batches):
    return [index for batch in batches for _, index in batch]


# --- sampler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("length", [6, 23, 24, 25])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_evaluation_covers_everything_exactly_once(replicas, length, batch_size):
    samplers = [ShardedBatchSampler(length, batch_size, 0, False, replicas, rank, False) for rank in range(replicas)]
    parts = [list(sampler) for sampler in samplers]
    assert sorted(index for part in parts for index in indices(part)) == list(range(length))
    assert len({len(part) for part in parts}) == 1  # nobody waits for a batch that never comes
    assert all(len(part) == len(sampler) for part, sampler in zip(parts, samplers, strict=True))
    assert all(1 <= len(batch) <= batch_size + 1 for part in parts for batch in part)


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_training_batches_do_not_depend_on_the_number_of_processes(replicas):
    whole = list(ShardedBatchSampler(40, 6, seed=5, position=lambda: (3, 0)))
    parts = [
        list(ShardedBatchSampler(40, 6 // replicas, 5, True, replicas, rank, position=lambda: (3, 0)))
        for rank in range(replicas)
    ]
    assert len(whole) == 6
    assert [[*itertools.chain(*batches)] for batches in zip(*parts, strict=True)] == whole
    assert len(set(indices(whole))) == 36


def test_order_depends_on_seed_and_epoch():
    orders = [ShardedBatchSampler(50, 1, seed=seed).permutation(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert ShardedBatchSampler(50, 1, seed=0).permutation(1) == orders[1]


def test_start_skips_what_was_seen_and_the_length_stays():
    whole = list(ShardedBatchSampler(20, 3, seed=1))
    sampler = ShardedBatchSampler(20, 3, seed=1, position=lambda: (0, 4))
    assert list(sampler) == whole[4:]
    assert len(sampler) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_replicas": 2, "rank": 2}, r"rank must be in 0\.\.1 with num_replicas 2, got 2"),
        ({"num_replicas": 3}, r"batch_size 4 on 3 process\(es\) needs at least 12 samples.*holds 10"),
        ({"num_replicas": 11, "drop_last": False}, "needs at least 11 samples.*fewer processes"),
    ],
)
def test_sampler_names_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ShardedBatchSampler(**{"length": 10, "batch_size": 4, **arguments})


# --- batches -----------------------------------------------------------------------------------------------------


class Draws(SeededDataset):
    """Images that are nothing but the draws of their augmentation."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def load(self, index, seed):
        return {"image": uniform([seed], (3, 2, 2))[0].mul(256).byte(), "label": index % 3, "index": index}


class DrawsModule(ImageDataModule):
    def __init__(self, length=23, **arguments):
        super().__init__(**{"batch_size": 4, "image_size": 2, "num_classes": 3, **arguments})
        self.length = length

    def train_dataset(self):
        return Draws(self.length)

    def val_dataset(self):
        return Draws(7)


def by_key(loader):
    return {
        (epoch, index): image
        for batch in loader
        for epoch, index, image in zip(batch["epoch"].tolist(), batch["index"].tolist(), batch["image"], strict=True)
    }


def test_batch_contents():
    batch = next(iter(DrawsModule().train_dataloader()))
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "image": ((4, 3, 2, 2), torch.uint8),
        "label": ((4,), torch.int64),
        "index": ((4,), torch.int64),
        "epoch": ((4,), torch.int64),
    }
    assert torch.equal(batch["label"], batch["index"] % 3)


def test_augmentation_does_not_depend_on_batch_size_or_workers():
    reference = by_key(DrawsModule(length=24).train_dataloader())
    assert len(reference) == 24
    for arguments in ({"batch_size": 6}, {"batch_size": 1}, {"batch_size": 3, "num_workers": 2}):
        found = by_key(DrawsModule(length=24, **arguments).train_dataloader())
        assert found.keys() == reference.keys()
        assert all(torch.equal(image, reference[key]) for key, image in found.items())
    other = by_key(DrawsModule(length=24, seed=1).train_dataloader())
    assert not any(torch.equal(image, reference[key]) for key, image in other.items())


def test_validation_sees_everything_once_in_order():
    assert [index for _, index in by_key(DrawsModule().val_dataloader())] == list(range(7))


@pytest.mark.parametrize("workers", [0, 2])
def test_ranges_are_read_in_order_and_no_batch_reaches_over_an_end(workers):
    module = DrawsModule(batch_size=4, num_workers=workers)
    loader = module.range_dataloader("train", [range(16, 23), range(0, 8)])
    assert [batch["index"].tolist() for batch in loader] == [[16, 17, 18, 19], [20, 21, 22], [0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(loader) == 4
    assert (module.samples("train"), module.samples("val")) == (23, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "data.batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "data.num_workers must be at least 0, got -1"),
        ({"max_bad_share": 1.0}, r"data.max_bad_share must be in \[0, 1\), got 1.0"),
    ],
)
def test_module_names_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DrawsModule(**arguments)


# --- with a Trainer ----------------------------------------------------------------------------------------------


class Recorder(L.LightningModule):
    """Notes the keys of every training batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches = []
        self.val_batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append(tuple(zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True)))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.val_batches.append(tuple(batch["index"].tolist()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEverywhere(L.Callback):
    """Saves after every batch, every validation and every epoch; knows how many batches were trained on by then."""

    def __init__(self, folder):
        self.folder = folder
        self.saved = []

    def save(self, trainer, module, event):
        path = self.folder / f"{len(self.saved)}_{event}.ckpt"
        trainer.save_checkpoint(path)
        self.saved.append((event, len(module.batches), path))

    def on_train_batch_end(self, trainer, module, *_):
        self.save(trainer, module, "batch")

    def on_validation_end(self, trainer, module):
        self.save(trainer, module, "validation")

    def on_train_epoch_end(self, trainer, module):
        self.save(trainer, module, "epoch")

    def on_train_end(self, trainer, module):
        self.save(trainer, module, "end")


def trainer(tmp_path, callbacks=(), **options):
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 3,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
            "callbacks": list(callbacks),
            **options,
        }
    )


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"val_check_interval": 2}, marks=pytest.mark.slow),
        pytest.param({"limit_train_batches": 4}, marks=pytest.mark.slow),
        {"max_epochs": -1, "max_steps": 13, "check_val_every_n_epoch": None, "val_check_interval": 3},
        pytest.param({"limit_val_batches": 0, "accumulate_grad_batches": 2}, marks=pytest.mark.slow),
    ],
    ids=["plain", "validation within", "limited", "by steps", "accumulated"],
)
def test_a_continued_run_sees_exactly_what_was_not_seen(tmp_path, options):
    save, whole = SaveEverywhere(tmp_path), Recorder()
    trainer(tmp_path, [save], **options).fit(whole, datamodule=DrawsModule())
    per_epoch = options.get("limit_train_batches", 5)
    assert [batch[0][0] for batch in whole.batches] == [number // per_epoch for number in range(len(whole.batches))]
    for epoch in {batch[0][0] for batch in whole.batches}:
        seen = [key for batch in whole.batches for key in batch if key[0] == epoch]
        assert len(set(seen)) == len(seen)
    assert {event for event, _, _ in save.saved} >= {"batch", "epoch", "end"}
    for event, done, path in save.saved:
        if "max_steps" in options and done == len(whole.batches):
            continue  # there is nothing left to do
        rest = Recorder()
        trainer(tmp_path, **options).fit(rest, datamodule=DrawsModule(), ckpt_path=path, weights_only=True)
        assert rest.batches == whole.batches[done:], f"from {path.name} ({event})"


@pytest.mark.slow
def test_continuing_with_workers_and_without_a_warning(tmp_path, recwarn):
    save, whole = SaveEverywhere(tmp_path), Recorder()
    trainer(tmp_path, [save]).fit(whole, datamodule=DrawsModule(num_workers=2))
    for _, done, path in [save.saved[index] for index in (1, 4, 5, 9)]:
        rest = Recorder()
        trainer(tmp_path).fit(rest, datamodule=DrawsModule(num_workers=2), ckpt_path=path, weights_only=True)
        assert rest.batches == whole.batches[done:]
    assert not [warning for warning in recwarn if "resumable" in str(warning.message)]


def test_continuing_with_another_order_is_refused_within_an_epoch_only(tmp_path):
    save = SaveEverywhere(tmp_path)
    trainer(tmp_path, [save], max_epochs=1).fit(Recorder(), datamodule=DrawsModule())
    middle, end = save.saved[1][2], save.saved[-1][2]
    with pytest.raises(ValueError, match=r"of the middle of an epoch with global_batch_size=4.*now 2"):
        trainer(tmp_path).fit(Recorder(), datamodule=DrawsModule(batch_size=2), ckpt_path=middle, weights_only=True)
    rest = Recorder()
    trainer(tmp_path, max_epochs=2).fit(rest, datamodule=DrawsModule(batch_size=2), ckpt_path=end, weights_only=True)
    assert len(rest.batches) == 11
    assert {batch[0][0] for batch in rest.batches} == {1}


def test_a_position_loaded_for_validation_does_not_shift_a_new_run(tmp_path):
    save = SaveEverywhere(tmp_path)
    trainer(tmp_path, [save]).fit(Recorder(), datamodule=DrawsModule())
    module, recorder = DrawsModule(), Recorder()
    trainer(tmp_path).validate(recorder, datamodule=module, ckpt_path=save.saved[8][2], weights_only=True)
    trainer(tmp_path, max_epochs=1).fit(recorder, datamodule=module)
    assert {batch[0][0] for batch in recorder.batches} == {0}
    assert len(recorder.batches) == 5


def test_overfitting_repeats_the_same_batches(tmp_path):
    recorder = Recorder()
    trainer(tmp_path, overfit_batches=2).fit(recorder, datamodule=DrawsModule())
    assert [[index for _, index in batch] for batch in recorder.batches] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 3


class Writer(Recorder):
    """Writes what its process saw into the trainer's folder."""

    def on_train_end(self):
        folder = Path(self.trainer.default_root_dir)
        torch.save((self.batches, self.val_batches), folder / f"{self.global_rank}.pt")


def fit_on_two_processes(folder):
    # Lightning's own sampler replacement is left on: it must not matter.
    two = trainer(folder, [SaveEverywhere(folder)], devices=2, strategy="ddp_fork", max_epochs=2)
    two.fit(Writer(), datamodule=DrawsModule(batch_size=2))


@pytest.mark.slow
def test_two_processes_share_exactly(tmp_path):
    # In a process of its own: where autograd has started threads, it refuses to work in a fork.
    line = (
        f"from pathlib import Path; from tests.data.test_data import *; fit_on_two_processes(Path({str(tmp_path)!r}))"
    )
    subprocess.run([sys.executable, "-c", line], check=True, cwd=Path(__file__).parents[2])
    (first, first_val), (second, second_val) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = Recorder()
    trainer(tmp_path, max_epochs=2).fit(alone, datamodule=DrawsModule())
    assert [a + b for a, b in zip(first, second, strict=True)] == alone.batches
    seen = [index for batch in first_val + second_val for index in batch]
    assert sorted(seen) == sorted(list(range(7)) * 2)
    rest = Recorder()
    middle = tmp_path / "2_batch.ckpt"
    trainer(tmp_path, max_epochs=2).fit(rest, datamodule=DrawsModule(), ckpt_path=middle, weights_only=True)
    assert rest.batches == alone.batches[3:]
