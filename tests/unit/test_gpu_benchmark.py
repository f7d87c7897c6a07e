"""benchmarks/gpu.py where there is no GPU: what it says then, and what of it a CPU can run."""

from __future__ import annotations

import gc
import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.twins import lively, random_clips
from vmoe.clips import ClipSpec

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="here it would be run in earnest")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the benchmark's module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def routing(gpu: ModuleType) -> ModuleType:
    module: ModuleType = gpu.gpu_routing
    return module


def test_without_a_gpu_every_figure_says_so(gpu: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    before = torch.is_grad_enabled()
    try:
        done = CliRunner().invoke(gpu.main, ["--json", "--out", str(out)])
    finally:
        torch.set_grad_enabled(before)
        torch.backends.cudnn.benchmark = False
        gc.unfreeze()
    assert done.exit_code == 0, done.output
    assert done.stdout.count('"value": null') == sum(map(len, gpu.UNMEASURED.values()))
    assert "no CUDA GPU that torch can use" in done.stdout
    assert "host_routing_us" in out.read_text()


def test_a_section_that_fails_leaves_its_traceback_and_no_value(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device: str, effort: object) -> None:
        raise RuntimeError("the card fell out")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(gpu.SECTIONS, "energy", broken)
    found = gpu.run_section("energy", gpu.QUICK)
    assert [figure.why for figure in found.figures] == ["RuntimeError: the card fell out"]
    assert "the card fell out" in found.tables["What went wrong in energy"]
    assert "Traceback" in found.measured["error"]


def test_host_routing_answers_as_the_twin_does(gpu: ModuleType) -> None:
    with torch.no_grad():
        twin = lively(3, 4)
        clips = torch.from_numpy(random_clips(5))
        routed = routing(gpu).Routed(twin, clips, (2, 5))
        for routes in ([0, 1, 2, 1, 0], [1] * 5):
            routed.steer(routes)
            routing(gpu)._check(routed, routed.grouped, routes)
            wanted = twin.run_routed(clips.permute(0, 4, 1, 2, 3) / 255, torch.tensor(routes))
            assert torch.allclose(routed.logits, wanted, atol=1e-5)
        one = routing(gpu).Routed(twin, clips[:1], (1,))
        one.steer([2])
        for answer in (one.one, one.polled):
            routing(gpu)._check(one, answer, [2])
        with pytest.raises(RuntimeError, match=r"host routing went to \[2\], not \[0\]"):
            routing(gpu)._check(one, one.one, [0])


def test_the_layers_that_are_timed_are_the_experts(gpu: ModuleType) -> None:
    layers = gpu.gpu_kernels.convolutions(ClipSpec(frames=4, height=16, width=16))
    assert sum(layers.values()) == 20
    assert layers[32, (4, 8, 8), 32, (3, 3, 3), (1, 1, 1), (1, 1, 1)] == 4


def test_an_error_is_relative_and_what_was_not_written_is_infinitely_wrong(
    gpu: ModuleType,
) -> None:
    exact = torch.tensor([3.0, 4.0])
    assert gpu.gpu_kernels.relative(exact, exact) == 0
    assert np.isclose(gpu.gpu_kernels.relative(exact * 1.1, exact), 0.1)
    assert gpu.gpu_kernels.relative(torch.tensor([3.0, torch.nan]), exact) == float("inf")
