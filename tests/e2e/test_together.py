"""Several processes train as one does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import two_processes
from vmoe import checkpoint

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    script = [str(ROOT / "tests" / "two_processes.py"), str(folder)]
    for how in ([], TORCHRUN):
        done = subprocess.run(
            [sys.executable, *how, *script],
            capture_output=True, text=True, timeout=300, check=False, cwd=ROOT,
            env=two_processes.environment(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("method", two_processes.METHODS)
def test_two_processes_end_where_one_does(trained: Path, method: str) -> None:
    one, told = checkpoint.read_tensors(trained / f"{method}-1.safetensors")
    two, also = checkpoint.read_tensors(trained / f"{method}-2.safetensors")
    assert one.keys() == two.keys()
    for name in one:  # float64: what differs is the order of sums
        torch.testing.assert_close(one[name], two[name], rtol=1e-8, atol=1e-9)
    assert told == pytest.approx(also, rel=1e-9)


def test_the_command_trains_resumes_and_talks_once(tmp_path: Path) -> None:
    small = ["--arch", "tsm", "--width", "0.1", "--frames", "2", "--size", "16", "--clips", "12",
             "--val-clips", "4", "--batch", "6", "--val-steps", "0", "--no-report"]  # fmt: skip
    out = tmp_path / "run"

    def train(*more: str, code: int = 0) -> str:
        command = [*TORCHRUN, "-m", "vmoe.train.cli", "--out", str(out), *more]
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=300, check=False,
            cwd=ROOT, env=two_processes.environment(),
        )  # fmt: skip
        assert done.returncode == code, done.stderr[-3000:]
        return done.stderr

    said = train(*small, "--method", "standard", "--epochs", "1")
    assert said.count("next: vmoe-export") == 1
    assert (out / "best.safetensors").exists()
    rows = (out / "results.csv").read_text().splitlines()
    assert len(rows) == 2
    assert "resumed after epoch 1" in train("--no-report", "--resume")
    said = train(*small, "--method", "standard", "--epochs", "1", code=1)
    assert "exists. Choose another --out" in said
    ours = said.partition("torch/distributed/elastic")[0]  # torchrun's own report stands below
    assert "Traceback" not in ours
