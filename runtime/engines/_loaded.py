"""One plan on the GPU: a context, a CUDA graph and its answers' memory, for each batch size.

All plans of a bundle share what only one of them needs at a time (`Shared`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vmoe.bundle import Part, Port
from vmoe.errors import EngineMismatchError

from . import Outputs, _plan, _trt
from ._clock import Clock
from ._cuda import Gpu
from ._trt import checked

if TYPE_CHECKING:
    import tensorrt as trt

log = logging.getLogger("vmoe.runtime")

CLIP = "clip"
DEFAULTS = {"force_route": -1}  # of inputs that may be left out: -1 routes freely
TYPES = {"uint8": "UINT8", "float32": "FLOAT", "int64": "INT64"}  # of ports, as TensorRT has them


@dataclass
class Shared:
    """What the plans of a bundle have in common on the device.

    Attributes:
        trt: the module tensorrt.
        gpu: with the one stream that all run on.
        log: TensorRT's words.
        shape: of a clip, (T, H, W, 3).
        clips: address of the clips that were uploaded.
        arena: address of the memory that the plan that runs works in.
        arena_bytes: its size.
        clock: what calls take is noted by it; None where nobody asked.
        graphs: run as CUDA graphs.
    """

    trt: Any
    gpu: Gpu
    log: Any
    shape: tuple[int, ...]
    clips: int = 0
    arena: int = 0
    arena_bytes: int = 0
    clock: Clock | None = None
    graphs: bool = True

    def mark(self, what: str) -> None:
        """Let the stream note the time, where somebody asked for times."""
        if self.clock is not None:
            self.clock.mark(what)


class Prepared(NamedTuple):
    """One batch size of a plan, ready to run.

    Attributes:
        context: held here, as a graph runs on memory that it owns.
        graph: the CUDA graph; None where it could not be captured.
        enqueue: gives the stream the same without a graph.
    """

    context: Any
    graph: Any
    enqueue: Callable[[], None]


class Both(NamedTuple):
    """The same values in pinned memory and on the device.

    Attributes:
        host: uint8, all bytes of them.
        device: the address.
    """

    host: NDArray[np.uint8]
    device: int


class Loaded:
    """One plan: its answers' memory, and how each batch size of it is launched."""

    def __init__(
        self, shared: Shared, engine: trt.ICudaEngine, part: Part, batch: tuple[int, int, int]
    ) -> None:
        """Compare a deserialised plan with the manifest, and make room for its answers."""
        self.name, self.engine = part.file, engine
        self._shared = shared
        self._least, _, self._most = batch
        self._ports = part.outputs
        self._check_ports(part)
        gpu = shared.gpu

        def both(size: int) -> Both:
            return Both(gpu.pinned(size), gpu.alloc(size))

        self._answers = {p.name: both(self._most * _row_bytes(p)) for p in self._ports}
        self._given = {
            p.name: both(np.dtype(p.dtype).itemsize) for p in part.inputs if p.name != CLIP
        }
        self._prepared: dict[int, Prepared] = {}  # by batch
        self.captured: dict[int, bool] = {}

    def forget(self) -> None:
        """Drop what was prepared with memory that is about to go."""
        for prepared in self._prepared.values():
            if prepared.graph is not None:
                self._shared.gpu.drop(prepared.graph)
        self._prepared.clear()

    def answer(self, n: int, given: Mapping[str, Any]) -> Outputs:
        """Run the first n clips that are on the device; n is at most the plan's largest batch.

        Args:
            n: how many.
            given: the other inputs, numbers; one that is left out is as DEFAULTS has it.
        """
        if n > self._most:  # another part takes more at once
            raise EngineMismatchError(
                f"{self.name} takes at most {self._most} clips at once, other parts more. "
                "Build all parts with one --max-batch."
            )
        size = _plan.bucket(n, self._least, self._most)
        prepared = self._prepared.get(size)
        if prepared is None:
            prepared = self._prepared[size] = self._prepare(size)
        for name, held in self._given.items():
            held.host.view(np.int64)[0] = given.get(name, DEFAULTS[name])
        begin = time.perf_counter()
        if prepared.graph is None:
            prepared.enqueue()
        else:
            self._shared.gpu.launch(prepared.graph)
        enqueued = time.perf_counter() - begin
        self._shared.gpu.wait()
        if self._shared.clock is not None:
            self._shared.clock.add(enqueued * 1e3)
        return {
            port.name: self._answers[port.name]
            .host[: n * _row_bytes(port)]
            .view(port.dtype)
            .reshape(n, *port.shape[1:])
            .copy()
            for port in self._ports
        }

    def _prepare(self, size: int) -> Prepared:
        """Make a context for one batch size, and a graph that runs it and brings answers back.

        A context of its own for each size: a graph stays true while its context's shapes do.
        """
        shared, context = self._shared, self._context(size)
        gpu = shared.gpu
        self._must(context.set_tensor_address(CLIP, shared.clips), "set_tensor_address(clip)")
        for name, held in (self._answers | self._given).items():
            self._must(context.set_tensor_address(name, held.device), f"set_tensor_address({name})")

        def enqueue() -> None:
            for held in self._given.values():
                gpu.upload(held.host, held.device)
            shared.mark("begin")
            self._must(context.execute_async_v3(gpu.stream), "execute_async_v3")
            shared.mark("computed")
            for port in self._ports:
                held = self._answers[port.name]
                gpu.download(held.device, held.host[: size * _row_bytes(port)])
            shared.mark("end")

        enqueue()  # what is set up at a first run cannot be captured
        gpu.wait()
        graph = None
        try:
            graph = gpu.capture(enqueue) if shared.graphs else None
        except EngineMismatchError as e:
            log.warning("%s, batch %d: runs without a CUDA graph: %s", self.name, size, e)
        self.captured[size] = graph is not None
        return Prepared(context, graph, enqueue)

    def _context(self, size: int) -> trt.IExecutionContext:
        shared, gpu = self._shared, self._shared.gpu
        strategy = shared.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = checked(self.engine.create_execution_context(strategy),
                          f"{self.name}: create_execution_context", shared.log)  # fmt: skip
        context.set_device_memory(shared.arena, shared.arena_bytes)
        self._must(context.set_optimization_profile_async(0, gpu.stream),
                   "set_optimization_profile_async")  # fmt: skip
        gpu.wait()
        self._must(context.set_input_shape(CLIP, (size, *shared.shape)), "set_input_shape")
        _trt.shapes(context, self.name, shared.log)
        return context

    def _must(self, ok: bool, what: str) -> None:
        checked(ok, f"{self.name}: {what}", self._shared.log)

    def _check_ports(self, part: Part) -> None:
        """Refuse a plan whose inputs and outputs are not what the manifest says."""
        engine, trt = self.engine, self._shared.trt
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = trt.TensorIOMode.INPUT
        has = {
            name: (
                engine.get_tensor_mode(name) == inputs,
                engine.get_tensor_dtype(name),
                tuple(engine.get_tensor_shape(name))[1:],
            )
            for name in names
        }
        wanted = {
            port.name: (port in part.inputs, getattr(trt.DataType, TYPES[port.dtype]),
                        tuple(port.shape[1:]))
            for port in (*part.inputs, *part.outputs)
            if port.dtype in TYPES
        }  # fmt: skip
        clip = next((port for port in part.inputs if port.name == CLIP), None)
        others = [port for port in part.inputs if port.name != CLIP]
        known = all(port.name in DEFAULTS and port.dtype == "int64" for port in others)
        if has != wanted or not known or clip is None or clip.shape[1:] != self._shared.shape:
            raise EngineMismatchError(
                f"{self.name} has the inputs and outputs {_told(has)}; the manifest says "
                f"{_told(wanted)}. {_plan.REBUILD}"
            )
        for port in others:
            if engine.get_tensor_location(port.name) != trt.TensorLocation.DEVICE:
                raise EngineMismatchError(
                    f"{self.name}: TensorRT reads {port.name} on the host, where a CUDA graph does "
                    "not look again. Use --lowering split."
                )


def _told(ports: Mapping[str, tuple[bool, Any, tuple[Any, ...]]]) -> str:
    return ", ".join(
        f"{name} {getattr(kind, 'name', kind)} [N{''.join(f', {d}' for d in shape)}]"
        for name, (_, kind, shape) in sorted(ports.items())
    )


def _row_bytes(port: Port) -> int:
    """Return the bytes of one clip's answer."""
    return np.dtype(port.dtype).itemsize * math.prod(n or 1 for n in port.shape[1:])
