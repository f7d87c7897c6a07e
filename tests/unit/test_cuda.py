"""CUDA's driver as plans are run by it: over a fake, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.cuda_fake import CUresult, Driver
from vmoe.errors import EngineMismatchError, MissingDependencyError
from vmoe.runtime.engines import _cuda
from vmoe.runtime.engines._cuda import Gpu


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    """Return a GPU: ours, and the machine's own."""
    if request.param == "fake":
        request.getfixturevalue("gpu")
    try:
        made = Gpu()
    except MissingDependencyError as e:
        pytest.skip(str(e))
    yield made
    made.close()


def test_what_goes_up_comes_back_and_a_graph_says_it_again(device: Gpu) -> None:
    size = 1 << 16
    up, down = device.pinned(size), device.pinned(size)
    memory, other = device.alloc(size), device.alloc(size)
    device.download(memory, down)
    device.wait()
    assert not down.any()  # new memory is all zeros

    def round_trip() -> None:
        device.upload(up, memory)
        device.download(memory, down)

    graph = device.capture(round_trip)
    device.wait()
    assert not down.any()  # nothing ran while it was captured
    rng = np.random.default_rng(0)
    for _ in range(3):
        up[:] = rng.integers(0, 256, size, np.uint8)
        device.launch(graph)
        device.wait()
        np.testing.assert_array_equal(down, up)
    device.free(other)
    device.drop(graph)
    facts = device.facts()
    assert facts.name
    assert facts.memory_bytes > 1 << 28
    assert float(facts.capability) > 5
    assert float(facts.driver) >= 12


def test_a_capture_that_fails_leaves_the_stream_as_it_was(device: Gpu) -> None:
    held = device.pinned(8)
    memory = device.alloc(8)

    def broken() -> None:
        device.upload(held, memory)
        raise EngineMismatchError("no")

    with pytest.raises(EngineMismatchError, match=r"^no$"):
        device.capture(broken)
    held[:] = 7
    device.upload(held, memory)
    device.wait()
    held[:] = 0
    device.download(memory, held)
    device.wait()
    assert held.tolist() == [7] * 8


def test_a_wait_ends_when_the_stream_does_and_events_tell_when(device: Gpu) -> None:
    size = 1 << 20
    held, memory = device.pinned(size), device.alloc(size)
    begin, end = device.event(), device.event()

    def timed() -> None:
        device.mark(begin)
        device.upload(held, memory)
        device.mark(end)

    timed()
    device.wait()
    assert device.elapsed_ms(begin, end) > 0
    graph = device.capture(timed)
    for _ in range(2):
        device.launch(graph)
        device.wait()
        assert device.elapsed_ms(begin, end) > 0


def test_a_stream_is_asked_until_it_is_done_and_no_longer_than_the_bound(
    gpu: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter(range(100))
    monkeypatch.setattr(_cuda.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(_cuda, "SPIN_S", 2.5)  # asked at 1, 2 and 3: the last is too late
    made = Gpu()
    for busy, asked, slept in ((0, 1, 0), (2, 3, 0), (3, 3, 1), (9, 3, 1)):
        gpu.busy = busy
        gpu.calls.clear()
        made.wait()
        assert gpu.calls.count("cuStreamQuery") == asked
        assert gpu.calls.count("cuStreamSynchronize") == slept
    gpu.busy, gpu.fail = 0, {"cuStreamQuery": CUresult.CUDA_ERROR_ILLEGAL_ADDRESS}
    why = r"^CUDA: cuStreamQuery failed: CUDA_ERROR_ILLEGAL_ADDRESS\.$"
    with pytest.raises(EngineMismatchError, match=why):
        made.wait()
    gpu.busy, gpu.fail = 9, {"cuStreamSynchronize": CUresult.CUDA_ERROR_NO_DEVICE}
    with pytest.raises(EngineMismatchError, match="cuStreamSynchronize failed: CUDA_ERROR_NO_DEV"):
        made.wait()
    made.close()


def test_a_call_that_fails_is_named(gpu: Driver) -> None:
    made = Gpu()
    gpu.fail = {"cuMemAlloc": CUresult.CUDA_ERROR_OUT_OF_MEMORY}
    with pytest.raises(EngineMismatchError, match=r"^CUDA: cuMemAlloc failed: CUDA_ERROR_OUT_OF_M"):
        made.alloc(1 << 40)
    made.close()
    made.close()
    assert gpu.left() == {}


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:2", 2)])
def test_the_number_of_a_device(device: str, index: int) -> None:
    assert _cuda.index(device) == index
