"""benchmarks/gpu.py where there is no GPU: what it says then, and what of it a CPU can run."""

from __future__ import annotations

import ctypes
import gc
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests import cuda_fake
from tests.cuda_fake import CUresult, Driver
from tests.twins import lively, random_clips
from vmoe.clips import ClipSpec
from vmoe.export.plugins import reference
from vmoe.runtime.plugins import launch, nodes
from vmoe.runtime.plugins.calls import Call

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="here it would be run in earnest")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the benchmark's module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


@pytest.fixture
def fake_driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Let the benchmark find a driver that is none."""
    return cuda_fake.install(monkeypatch, Driver())


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
        for answer in (one.one, one.blocked):
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


def test_the_driver_is_checked_as_the_backend_uses_it(
    gpu: ModuleType, fake_driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks, driver = gpu.gpu_driver, fake_driver
    monkeypatch.setattr(checks, "BYTES", 1 << 10)
    monkeypatch.setattr(driver, "cuMemAlloc", lambda size, take=driver.cuMemAlloc: (
        take(size) if size < 1 << 40 else (CUresult.CUDA_ERROR_OUT_OF_MEMORY, None)
    ))  # fmt: skip
    monkeypatch.setattr(launch, "shared", lambda: SimpleNamespace(prepare=len, bind=on_cpu))
    found = checks.measure("cpu", gpu.QUICK)
    assert found.measured["rows"] == [[name, "yes"] for name, _ in found.measured["rows"]]
    assert len(found.measured["rows"]) == 8
    assert [(figure.figure, figure.value) for figure in found.figures] == [("driver_wrong", 0)]
    assert driver.left() == {}


@pytest.mark.parametrize(
    ("function", "check", "says"),
    [
        ("cuMemcpyDtoHAsync", "round_trip", "new memory is not zero"),
        ("cuGraphLaunch", "round_trip", "a graph's copies are not what was copied"),
        ("cuMemcpyDtoHAsync", "failed_capture", "the stream does nothing any more"),
        ("cuMemcpyHtoDAsync", "waits", "a wait of 1 s ended too early"),
        ("cuGraphLaunch", "events", "cuEventElapsedTime failed: CUDA_ERROR_INVALID_HANDLE"),
        ("cuEventRecordWithFlags", "events", "CUDA_ERROR_INVALID_HANDLE"),
    ],
)
def test_a_driver_that_does_nothing_is_found_out(
    gpu: ModuleType, fake_driver: Driver, monkeypatch: pytest.MonkeyPatch, function: str,
    check: str, says: str,
) -> None:  # fmt: skip
    checks = gpu.gpu_driver
    monkeypatch.setattr(checks, "BYTES", 1 << 10)
    monkeypatch.setattr(fake_driver, function, lambda *_: (CUresult.CUDA_SUCCESS,))
    assert says in checks._said(lambda: checks._on_gpu(getattr(checks, check)))


def test_an_enqueue_that_is_wrong_is_found_out(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = gpu.gpu_driver
    for bind, says in ((lambda _: len, "TypeError"), (lambda _: lambda stream: None, "off")):
        monkeypatch.setattr(
            launch, "shared", lambda bind=bind: SimpleNamespace(prepare=len, bind=bind)
        )
        assert says in checks._said(lambda: checks.enqueue(nodes.Linear, "cpu"))


def on_cpu(call: Call) -> Callable[[int], None]:
    """Bind a launch on tensors of this process, computed by torch."""

    def at(address: int, *shape: int, dtype: str = "float32") -> torch.Tensor:
        size = int(np.prod(shape)) * 4
        held = (ctypes.c_uint8 * size).from_address(address)
        return torch.from_numpy(np.frombuffer(held, dtype).reshape(shape))

    def go(stream: int) -> None:
        args, m = call.args, 4
        if call.kernel == "topk":
            scores, weights, route, experts, k = args
            rows = call.grid[0]
            made = reference.topk(at(scores, rows, experts), k)
            at(weights, rows, k)[:], at(route, rows, k, dtype="int32")[:] = made
        elif call.kernel.startswith("routed_linear"):
            x, expert, w, b, y, inner, outer, _ = args
            rows = call.grid[0]
            at(y, rows, outer)[:] = reference.routed_linear(
                at(x, rows, inner), at(expert, rows, dtype="int32"), at(w, m, outer, inner),
                at(b, m, outer),
            )  # fmt: skip
        elif call.kernel.startswith("routed_conv3d"):
            x, expert, w, b, y, _, channels, *sizes = args
            size, outputs, out = sizes[:3], sizes[3], sizes[4:7]
            kernel, strides, pads = sizes[7:10], sizes[10:13], sizes[13:16]
            rows = call.grid[2] // sizes[17]
            at(y, rows, outputs, *out)[:] = reference.routed_conv3d(
                at(x, rows, channels, *size), at(expert, rows, dtype="int32"),
                at(w, m, outputs, channels, *kernel), at(b, m, outputs), strides, pads,
            )  # fmt: skip

    return go
