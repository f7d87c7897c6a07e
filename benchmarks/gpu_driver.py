"""The runtime's own CUDA code on a GPU: driver calls, waits and events, and the plugins' enqueue.

Everything that the backend tensorrt and the plugins do without TensorRT is done here once, and
compared with what it should be; `driver_wrong` counts what is not. Tests do the same over a fake.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from figures import Figure
from gpu_kernels import MOST_WRONG, relative
from gpu_timing import Effort, Found, captured, finish, stream
from torch import Tensor

from vmoe import report
from vmoe.errors import EngineMismatchError
from vmoe.export.plugins import reference
from vmoe.runtime.engines import _cuda
from vmoe.runtime.engines._cuda import Gpu
from vmoe.runtime.plugins import nodes

BYTES = 1 << 22
M, K = 4, 2  # experts; routes of a row
STAND_IN = SimpleNamespace(float16="half", float32="float", int32="int32")  # for TensorRT's types


class WrongError(RuntimeError):
    """Something is not as it should be."""


def expect(ok: bool, what: str) -> None:
    """Raise WrongError unless it is so."""
    if not ok:
        raise WrongError(what)


def round_trip(gpu: Gpu) -> None:
    """New memory is zeros; what goes up comes back, also by a graph, at each launch of it."""
    up, down = gpu.pinned(BYTES), gpu.pinned(BYTES)
    memory = gpu.alloc(BYTES)
    down[:] = 1
    gpu.download(memory, down)
    gpu.wait()
    expect(not down.any(), "new memory is not zero")

    def there_and_back() -> None:
        gpu.upload(up, memory)
        gpu.download(memory, down)

    graph = gpu.capture(there_and_back)
    rng = np.random.default_rng(0)
    for _ in range(3):
        up[:] = rng.integers(0, 256, BYTES, np.uint8)
        gpu.launch(graph)
        gpu.wait()
        expect(bool((up == down).all()), "a graph's copies are not what was copied")
    gpu.drop(graph)
    gpu.free(memory)


def failed_capture(gpu: Gpu) -> None:
    """A capture that fails leaves the stream as it was."""
    held, memory = gpu.pinned(8), gpu.alloc(8)

    def broken() -> None:
        gpu.upload(held, memory)
        raise WrongError("on purpose")

    try:
        gpu.capture(broken)
    except WrongError:
        held[:] = 7
        gpu.upload(held, memory)
        gpu.wait()
        held[:] = 0
        gpu.download(memory, held)
        gpu.wait()
        expect(held.tolist() == [7] * 8, "the stream does nothing any more")
    else:
        raise WrongError("a capture hides an error")


def waits(gpu: Gpu) -> None:
    """A wait that asks, and one that sleeps, end after the work and not before."""
    up, down, memory = gpu.pinned(BYTES), gpu.pinned(BYTES), gpu.alloc(BYTES)
    asked = _cuda.SPIN_S
    try:
        for value, bound in enumerate((1.0, -1.0, asked), 1):
            _cuda.SPIN_S = bound
            up[:] = value
            for _ in range(16):
                gpu.upload(up, memory)
            gpu.download(memory, down)
            gpu.wait()
            expect(bool((down == value).all()), f"a wait of {bound:g} s ended too early")
    finally:
        _cuda.SPIN_S = asked


def events(gpu: Gpu) -> None:
    """Events tell times, inside of a graph as outside."""
    held, memory = gpu.pinned(BYTES), gpu.alloc(BYTES)
    for captures in (False, True):
        begin, end = gpu.event(), gpu.event()

        def timed(begin: Any = begin, end: Any = end) -> None:
            gpu.mark(begin)
            gpu.upload(held, memory)
            gpu.mark(end)

        if captures:
            gpu.launch(gpu.capture(timed))
        else:
            timed()
        gpu.wait()
        expect(0 < gpu.elapsed_ms(begin, end) < 1000, "events tell no time")


def refused(gpu: Gpu) -> None:
    """What the driver refuses is told by its name, and harms nothing."""
    try:
        gpu.alloc(1 << 50)
    except EngineMismatchError as e:
        expect("cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY" in str(e), str(e))
    else:
        raise WrongError("a petabyte was allocated")
    gpu.wait()


def enqueue(node: type[nodes.Node], device: str) -> None:
    """A plugin enqueues: again on the same tensors, on others, in a graph, in another batch."""
    made: Any = type(node.op_type, (node,), {"trt": STAND_IN})()
    made.setup(VALUES[node.op_type])
    for rows in (3, 1):
        _enqueue(made, *DRAW[node.op_type](rows, device))


def _enqueue(made: Any, given: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    first, second = ([torch.empty_like(answer) for answer in wanted] for _ in range(2))
    descs = [SimpleNamespace(dims=tuple(t.shape), type="float") for t in given]
    room = made.get_workspace_size([SimpleNamespace(max=desc.dims) for desc in descs], [])
    workspace = torch.empty(max(1, room), dtype=torch.uint8, device=given[0].device)
    inputs = [tensor.data_ptr() for tensor in given]

    def call(to: Sequence[Tensor]) -> None:
        outputs = [tensor.data_ptr() for tensor in to]
        made.enqueue(descs, [], inputs, outputs, workspace.data_ptr(), stream())

    made.on_shape_change(descs, [])
    _compare(lambda: call(first), first, wanted, made.op_type)
    before = made._bound
    _compare(lambda: call(second), second, wanted, made.op_type)
    bound = made._bound
    expect(bound is not before, "tensors moved, and the launches did not")
    _compare(lambda: call(second), second, wanted, made.op_type)
    expect(made._bound is bound, "the same launches were bound twice")
    _compare(captured(lambda: call(second)), second, wanted, made.op_type)


def _compare(
    call: Callable[[], object], got: Sequence[Tensor], wanted: Sequence[Tensor], name: str
) -> None:
    for answer in got:
        answer.fill_(-7)
    call()
    finish()
    for answer, exact in zip(got, wanted, strict=True):
        error = relative(answer.double(), exact.double())
        expect(error <= MOST_WRONG["fp32"], f"{name} is {error:.2g} off")


def _topk(rows: int, device: str) -> tuple[list[Tensor], list[Tensor]]:
    scores = _noise(rows, M, device=device)
    weights, route = reference.topk(scores, K)
    return [scores], [weights, route]


def _linear(rows: int, device: str) -> tuple[list[Tensor], list[Tensor]]:
    x, w, b = (_noise(*s, device=device) for s in ((rows, 40), (M, 6, 40), (M, 6)))
    expert = _routes(rows, device)
    return [x, expert, w, b], [reference.routed_linear(x, expert, w, b)]


def _convolution(rows: int, device: str) -> tuple[list[Tensor], list[Tensor]]:
    shapes = (rows, 32, 2, 6, 6), (M, 8, 32, 3, 3, 3), (M, 8)
    x, w, b = (_noise(*s, device=device) for s in shapes)
    expert = _routes(rows, device)
    strides, pads = VALUES["RoutedConv3d"]["strides"], VALUES["RoutedConv3d"]["pads"][:3]
    exact = reference.routed_conv3d(x.double(), expert, w.double(), b.double(), strides, pads)
    return [x, expert, w, b], [exact.float()]


def _noise(*shape: int, device: str) -> Tensor:
    make = torch.Generator("cpu").manual_seed(sum(shape))
    return torch.randn(shape, generator=make).to(device)


def _routes(rows: int, device: str) -> Tensor:
    return (torch.arange(rows, device=device) * 2 % M).int()


VALUES: dict[str, dict[str, Any]] = {
    "VmoeTopK": {"k": K}, "RoutedLinear": {"relu": 0},
    "RoutedConv3d": {"strides": (1, 2, 2), "pads": (1,) * 6},
}  # fmt: skip
DRAW = {"VmoeTopK": _topk, "RoutedLinear": _linear, "RoutedConv3d": _convolution}
CHECKS = (round_trip, failed_capture, waits, events, refused)


def measure(device: str, _effort: Effort) -> Found:
    """Check all of it; what fails is a row that says why."""
    torch.zeros(1, device=device)  # makes the context current
    checks: dict[str, Callable[[], None]] = {
        f"{node.op_type}.enqueue": lambda node=node: enqueue(node, device)  # type: ignore[misc]
        for node in nodes.NODES
    }
    checks |= {check.__name__: lambda check=check: _on_gpu(check) for check in CHECKS}  # type: ignore[misc]
    rows = [[name, _said(check)] for name, check in checks.items()]
    found = Found(measured={"rows": rows})
    found.tables["The runtime's own CUDA code"] = report.table(rows, ["what", "as it should be"])
    wrong = sum(said != "yes" for _, said in rows)
    found.figures.append(Figure("driver_wrong", float(wrong), "count", 0, n=len(rows)))
    return found


def _on_gpu(check: Callable[[Gpu], None]) -> None:
    gpu = Gpu()
    try:
        check(gpu)
    finally:
        gpu.close()


def _said(check: Callable[[], None]) -> str:
    try:
        check()
    except Exception as e:  # the others are to be checked all the same
        return f"{type(e).__name__}: {e}".splitlines()[0][:200]
    return "yes"
