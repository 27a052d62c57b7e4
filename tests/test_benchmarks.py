"""The benchmarks' shared parts, and the script for GPUs run whole with small networks on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import on_gpu

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "tests" / "benchmarks"


@pytest.fixture
def beside(monkeypatch):
    """Scripts import one another by their bare names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_both_sides_take_turns_and_results_are_compared(beside):
    from side_by_side import Comparison, measure

    turns = []

    def side(name: str, result: int):
        return lambda: lambda: turns.append(name) or result

    def same(ours: int, peer: int) -> None:
        assert ours == peer

    row = measure("", "sum", Comparison(side("ours", 3), side("peer", 3), 2, 1.5, same, memory=False), 2, 1)
    assert turns == ["ours", "peer", "ours", "peer", "peer", "ours"]
    assert (row["name"], row["images"], row["goal"]) == ("sum", 2, 1.5)
    assert len(row["ours_laps"]) == len(row["peer_laps"]) == 2
    with pytest.raises(AssertionError):
        measure("", "sum", Comparison(side("ours", 3), side("peer", 4), check=same, memory=False), 1, 1)


def test_a_batch_that_does_not_fit_leaves_the_following_ones_right(beside):
    """The count of FLOPs ends with the step that runs out of memory."""
    import lightning as L
    import torch
    from gpu_parts import Clock, Device
    from torch.utils.data import DataLoader

    class Step(L.LightningModule):
        def __init__(self, room):
            super().__init__()
            self.layer, self.room = torch.nn.Linear(8, 8, bias=False), room

        def training_step(self, batch, batch_idx):
            if len(batch) > self.room:
                raise torch.OutOfMemoryError("no room")
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def steps(size):
        clock = Clock(Device("cpu", tiny=True), count=True)
        quiet = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        trainer = L.Trainer(accelerator="cpu", max_steps=clock.total, callbacks=[clock], **quiet)
        trainer.fit(Step(room=4), DataLoader([torch.ones(size, 8)] * clock.total, batch_size=None))
        return clock

    with pytest.raises(torch.OutOfMemoryError):
        steps(5)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert steps(4).flops == 2 * 2 * 4 * 8 * 8  # forward, and the weight's gradient


def test_one_table_of_all_files(beside, tmp_path: Path):
    from table import table

    rows = [{"name": "decode", "ours_s": 0.5, "peer_s": 12.0, "ratio": 24.0, "goal": 1.1, "ours_mb": 10, "peer_mb": 20}]
    where = {"device": "CPU, 2 threads", "torch": "2.9", "date": "2030-01-02"}
    (tmp_path / "a.json").write_text(json.dumps({**where, "rows": rows}))
    (tmp_path / "b.json").write_text(json.dumps({"torch": "2.9", "stage 1": {"torchvision": 50.0, "shards": 125.0}}))
    lines = table(tmp_path).splitlines()
    assert lines[2:] == [
        "| decode | 500 ms | 12.0 s | × 24.00 | ≥ 1.10 | 10 / 20 MB |",
        "| loader of stage 1, shards | 125 images/s | 50 images/s | × 2.50 |  |  |",
        "",
        "CPU, 2 threads, PyTorch 2.9, 2030-01-02",
    ]
    with pytest.raises(FileNotFoundError, match="make bench writes them"):
        table(tmp_path / "none")


@pytest.mark.slow
def test_the_gpu_script_runs_whole_on_a_cpu(tmp_path: Path):
    file = tmp_path / "gpu.json"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--tiny", "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(file.read_text())
    rows = {(row["name"], row["precision"], row["variant"], row["batch"]) for row in found["gpu"]}
    networks = [f"training {name}" for name in ("DiT-DH-S", "DiT-DH-B", "DiT-DH-XL", "ViT-XL")]
    wanted = {(name, p, v, 2) for name in networks for p in ("bf16", "tf32") for v in ("eager", "compiled")}
    kinds = ("none", "cfg", "autoguidance")
    variants = ("eager", "compiled", "CUDA graphs")
    wanted |= {(f"sampling, 4 points, {kind}", "bf16", v, b) for kind in kinds for v in variants for b in (1, 2)}
    wanted |= {("decoding", "bf16", v, b) for v in ("eager", "compiled") for b in (1, 2)}
    assert rows == wanted
    for row in found["gpu"]:
        assert row["images_per_s"] > 0
        assert row["flops_per_image"] > 0
        assert row["ratio"] == pytest.approx(row["images_per_s"] / row["plain_images_per_s"])
        measured = row["name"].startswith("training") and (row["precision"], row["variant"]) == ("bf16", "eager")
        assert ("checkpoint_s" in row) == measured
    assert found["ceilings_tflops"].keys() == {"bf16", "tf32"}
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(wanted)  # its head and the rule below it
    assert "Matrix products: " in done.stdout


def test_rows_are_begun_in_time_and_one_that_does_not_fit_leaves_the_others(beside, capsys):
    import torch
    from gpu import Bench

    def large():
        raise torch.OutOfMemoryError("no room")

    found = []
    rows = [("large", large), ("small", lambda: found.append("small"))]
    bench = Bench("cpu", tiny=True)
    bench.run(rows, seconds=60)
    assert found == ["small"]
    bench.run(rows, seconds=-1)
    assert found == ["small"]
    assert capsys.readouterr().out.splitlines() == [
        "| large | out of memory |",
        "The time is over; 2 rows are left out, from 'large' on.",
    ]
    first = [name for name, _ in bench.order()][:4]
    assert first == ["training DiT-DH-XL", "training ViT-XL", "sampling, 4 points, cfg", "sampling, 4 points, cfg"]


@pytest.mark.parametrize("code", [0, 1])
def test_without_a_gpu_the_tests_with_fake_tensors_are_run(code, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(on_gpu, "run", lambda arguments, seconds: started.append(arguments[-1]) or code)
    monkeypatch.setattr(on_gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["on_gpu"])
    with pytest.raises(SystemExit) as ended:
        on_gpu.main()
    assert ended.value.code == code
    assert started == ["tests/test_fake_cuda.py"]
    assert capsys.readouterr().out.startswith("There is no CUDA device: ")


@pytest.mark.slow
def test_the_tests_for_a_gpu_run_on_a_cpu():
    """All but those that compile; of the encoders two kinds."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/test_gpu.py"]
    variables = {**os.environ, "TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-k", "not compiled and not cpus and (not test_encoders or dinov3_l_k7 or clip_l14)"],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
def test_the_gpu_script_says_that_there_is_no_gpu():
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # where there is one
    command = [sys.executable, BENCHMARKS / "gpu.py"]
    done = subprocess.run(command, env=hidden, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--device cpu --tiny" in done.stderr
