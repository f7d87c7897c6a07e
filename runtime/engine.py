"""A loaded bundle that answers clips: route, group by expert, run, scatter; written once here.

A backend (engines/) runs single graphs; which graphs there are and how they make one answer
is the lowering's matter and stands in this file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vmoe import bundle as bundles
from vmoe import registry
from vmoe.bundle import Bundle, Part
from vmoe.clips import Clips, check_clips
from vmoe.errors import EngineMismatchError, SettingError, UnknownNameError

from . import online
from .backends import ENGINES, choose
from .engines import SERVER, Backend, BackendSettings, Outputs, Run, Times
from .online import States
from .threads import of_engine

TRITON = "triton"  # what --server is for
MOST_THREADS = 256  # a thousand take minutes to start


class Prediction(NamedTuple):
    """What an engine answers.

    Attributes:
        logits: float32 [N, K], of the routed expert.
        scores: float32 [N, M], the router's logits; zeros [N, 1] of a model without a router.
        route: int64 [N], the expert that answered.
    """

    logits: NDArray[np.float32]
    scores: NDArray[np.float32]
    route: NDArray[np.int64]


def load(
    bundle: Path | str | Bundle,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    *,
    streams: int = 0,
    all_parts: bool = False,
    cache: Path | None = None,
    trust: bool = False,
    server: str | None = None,
    stopping: Callable[[], bool] = lambda: False,
    compiled: bool = False,
    cuda_graph: bool | None = None,
) -> Engine:
    """Load a bundle: prove it whole, and open a backend for it.

    Args:
        bundle: the folder, or a manifest that `vmoe.bundle.read` gave.
        backend: a file of engines/, or auto: the fastest here of those that the bundle was
            verified for at export; where that is not known, the first that reads its parts.
        device: auto, cpu or cuda:N.
        threads: CPU threads of one run; None is the backend's own choice.
        streams: sources that are decoded beside it, where `threads` is None: it takes the cores
            that they leave (threads.py).
        all_parts: load every part now; else an expert is loaded when it is first routed to.
        cache: a folder for what a backend makes of parts, so that the next load is faster; the
            commands' own is `vmoe.cli.cache_folder()`. None keeps nothing.
        trust: load parts that are code (TensorRT plans) though they were built elsewhere.
        server: HOST:PORT of a Triton server that has the parts; backend auto is then triton.
        stopping: asked while a server that was lost is waited for: whether to give up.
        compiled: of backend torch: compile the twin (torch.compile).
        cuda_graph: whether parts run as CUDA graphs; None is the backend's own choice.

    Raises:
        BundleError: no bundle, or one that is not what its manifest says.
        UnknownNameError: no such backend.
        MissingDependencyError: the backend is not installed.
        ServerError: the server does not answer.
    """
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise SettingError(f"--threads is {threads}; it must be from 1 to {MOST_THREADS}.")
    if threads is None and streams:
        threads = of_engine(streams)
    read = bundle if isinstance(bundle, Bundle) else bundles.read(Path(bundle))
    name = choose(TRITON if server and backend == "auto" else backend, read, device)
    module = registry.load(ENGINES, name, "backend")
    if server and SERVER not in module.FORMATS:
        raise SettingError(f"--server is for --backend {TRITON}; {name} runs here. Leave one out.")
    if cuda_graph and not getattr(module, "CUDA_GRAPHS", False):
        raise SettingError(f"--cuda-graph: backend {name} runs no CUDA graphs. Leave it out.")
    settings = BackendSettings(
        read.path,
        device,
        threads,
        read,
        cache,
        trust,
        server=server,
        stopping=stopping,
        compiled=compiled,
        cuda_graph=cuda_graph,
    )
    opened = module.open(settings)
    read = module.served(read) if SERVER in module.FORMATS else read
    engine = Engine(read, opened, name)
    try:
        engine.load_parts(
            None if all_parts else [bundles.part_names(read.lowering, read.experts)[0]]
        )
    except BaseException:
        engine.close()
        raise
    return engine


class Engine:
    """A loaded bundle. Use it as a context manager, or call `close`.

    Attributes:
        bundle: the manifest.
        backend_name: what runs its graphs.
    """

    def __init__(self, bundle: Bundle, backend: Backend, backend_name: str) -> None:
        """Take an open backend; `load` is the way to make one."""
        self.bundle = bundle
        self.backend_name = backend_name
        self._backend = backend
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()
        self._closed = False

    def infer(self, clips: Clips, force_route: int | Sequence[int] | None = None) -> Prediction:
        """Answer clips.

        Args:
            clips: uint8 [N, T, H, W, 3], RGB, as the bundle's clip spec has them; N may be 0.
            force_route: the expert to take, for all clips or for each; None routes freely.

        Raises:
            SettingError: clips of another shape, an expert that does not exist, or a closed engine.
            CorruptBundleError: an expert is first routed to, and is not the one that was read.
        """
        self._check(clips)
        forced = self._forced(force_route, len(clips))
        if not len(clips):
            k, m = len(self.bundle.labels), self.bundle.experts
            return Prediction(*_empty(k, m), np.zeros(0, np.int64))
        if self.bundle.lowering == "split":
            return self._split(clips, forced)
        return self._one_file(clips, forced)

    def expert_logits(self, clips: Clips, route: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits of clips by an expert given for each, [N, K].

        A router with a part of its own is not run; where one graph holds all, it is.
        """
        self._check(clips)
        forced = self._forced(route, len(clips))
        if forced is None or self.bundle.lowering != "split":
            return self.infer(clips, force_route=route).logits
        return self._by_expert(clips, forced, None)

    def run_part(self, name: str, clips: Clips) -> Outputs:
        """Run one part alone; return its outputs by name, each [N, ...].

        Raises:
            UnknownNameError: the bundle has no such part.
        """
        self._check(clips)
        return self._run(name, clips)

    def run_all(self, clips: Clips) -> NDArray[np.float32]:
        """Run every expert on every clip; return the logits, float32 [N, M, K]."""
        logits = [self.infer(clips, force_route=i).logits for i in range(self.bundle.experts)]
        return np.stack(logits, axis=1)

    def scores(self, clips: Clips) -> NDArray[np.float32]:
        """Return the router's scores of clips, [N, M]; zeros [N, 1] without a router.

        Raises:
            UnknownNameError: the bundle routes inside of its one part.
        """
        self._check(clips)
        return self._scores(clips, None)

    def follow(
        self, expert: int, frames: Clips, states: States | None = None
    ) -> tuple[NDArray[np.float32], States]:
        """Give an expert of an online bundle the next frames of some streams.

        Args:
            expert: which one.
            frames: uint8 [N, S, H, W, 3], any S from 1.
            states: as the call before gave them; None before a stream's first frame.

        Returns:
            The logits of the clips that end with the last frame, [N, K], and the next states.
            They mean something once a whole clip went in.

        Raises:
            SettingError: the bundle is not online, or the frames have another shape.
        """
        part = self.bundle.parts.get(f"expert{expert}")
        if self._closed or part is None or not online.state_ports(part):
            raise SettingError(
                f"{self.bundle.path} has no expert {expert} that follows a stream, or is closed. "
                "Export a causal model in its online form."
            )
        _, *size = self.bundle.spec.shape
        right = frames.dtype == np.uint8 and frames.ndim == 5 and frames.shape[1] > 0
        if not right or list(frames.shape[2:]) != size:
            raise SettingError(
                f"frames are {frames.dtype} {list(frames.shape)}; this model takes uint8 "
                f"[N, S, {', '.join(map(str, size))}], S from 1."
            )
        out = self._run(f"expert{expert}", frames, None, states)
        logits = self._output(out, "logits", (len(frames), len(self.bundle.labels)))
        return logits, {p.name: out[online.after(p.name)] for p in online.state_ports(part)}

    @property
    def retries(self) -> int:
        """How many requests were repeated, because the server that runs the parts was away."""
        return int(getattr(self._backend, "retries", 0))

    def time_calls(self) -> bool:
        """Let the backend note what runs take; return whether it can."""
        begin = getattr(self._backend, "time_calls", None)
        if begin is not None:
            begin()
        return begin is not None

    def last_times(self) -> Times | None:
        """Return what all runs took since it was asked last; None of a backend that cannot tell."""
        told = getattr(self._backend, "last_times", None)
        return told() if told is not None else None

    def load_parts(self, names: Sequence[str] | None = None) -> None:
        """Load parts now; None is all of them.

        Raises:
            CorruptBundleError: the folder changed since the bundle was read.
        """
        lowering, experts = self.bundle.lowering, self.bundle.experts
        for name in bundles.part_names(lowering, experts) if names is None else names:
            self._run_of(name)

    def close(self) -> None:
        """Free the backend; a second call does nothing."""
        with self._lock:
            was_open, self._closed = not self._closed, True
            self._runs.clear()
        if was_open:  # outside of the lock: it may wait for what a backend still writes
            self._backend.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check(self, clips: Clips) -> None:
        self._check_open()
        check_clips(clips, self.bundle.spec)

    def _check_open(self) -> None:
        if self._closed:
            raise SettingError("this engine is closed; load the bundle again.")

    def _forced(self, force_route: int | Sequence[int] | None, n: int) -> NDArray[np.int64] | None:
        if force_route is None:
            return None
        experts = self.bundle.experts
        route = np.asarray(force_route, dtype=np.int64)
        if route.ndim > 1 or (route.ndim == 1 and len(route) != n):
            raise SettingError(
                f"force_route has shape {list(route.shape)} for {n} clips; give one."
            )
        if ((route < 0) | (route >= experts)).any():
            raise SettingError(
                f"force_route is {force_route}; this model has experts 0 to {experts - 1}."
            )
        return np.broadcast_to(route, (n,)).copy()

    def _split(self, clips: Clips, forced: NDArray[np.int64] | None) -> Prediction:
        """Route on the host; one upload serves the router and, where all agree, the expert."""
        put = self._backend.put(clips)
        scores = self._scores(clips, put)
        route = forced if forced is not None else scores.argmax(axis=1).astype(np.int64)
        return Prediction(self._by_expert(clips, route, put), scores, route)

    def _by_expert(self, clips: Clips, route: NDArray[np.int64], put: Any) -> NDArray[np.float32]:
        """Run each expert once on the clips of its route; return the logits, [N, K]."""
        n = len(clips)
        logits = np.empty((n, len(self.bundle.labels)), np.float32)
        for expert in np.unique(route):
            rows = np.flatnonzero(route == expert)
            every = len(rows) == n
            some = clips if every else clips[rows]
            out = self._run(f"expert{expert}", some, put if every else None)
            logits[rows] = self._output(out, "logits", (len(rows), logits.shape[1]))
        return logits

    def _scores(self, clips: Clips, put: Any) -> NDArray[np.float32]:
        if self.bundle.experts == 1:
            return np.zeros((len(clips), 1), np.float32)
        shape = (len(clips), self.bundle.experts)
        return self._output(self._run("router", clips, put), "scores", shape)

    def _one_file(self, clips: Clips, forced: NDArray[np.int64] | None) -> Prediction:
        """Let the graph route; where routes are forced, one run for each that occurs."""
        if forced is None:
            return self._answer(self._run("moe", clips), len(clips))
        k, m = len(self.bundle.labels), self.bundle.experts
        logits, scores = (
            np.empty((len(clips), k), np.float32),
            np.empty((len(clips), m), np.float32),
        )
        for expert in np.unique(forced):
            rows = np.flatnonzero(forced == expert)
            extra = {"force_route": np.asarray(expert, np.int64)} if m > 1 else {}
            got = self._answer(self._run("moe", clips[rows], None, extra), len(rows))
            if (got.route != expert).any():
                raise EngineMismatchError(
                    f"{self.bundle.path} does not follow force_route {expert}. Export it again."
                )
            logits[rows], scores[rows] = got.logits, got.scores
        return Prediction(logits, scores, forced)

    def _answer(self, out: Outputs, n: int) -> Prediction:
        return Prediction(
            self._output(out, "logits", (n, len(self.bundle.labels))),
            self._output(out, "scores", (n, self.bundle.experts)),
            self._output(out, "route", (n,)).astype(np.int64, copy=False),
        )

    def _output(self, out: Outputs, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        value = out.get(name)
        if value is None or value.shape != shape:
            has = "nothing" if value is None else list(value.shape)
            raise EngineMismatchError(
                f"{self.bundle.path} gives {has} as {name}; its manifest means {list(shape)}. "
                "Export it again."
            )
        return value

    def _run(
        self,
        name: str,
        clips: Clips,
        put: Any = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Outputs:
        """Run a part on clips, in pieces where the part was made for a fixed batch.

        A part with states that are not given starts from its first ones: it answers whole clips.
        """
        run = self._run_of(name)
        part = self.bundle.parts[name]
        size = _batch(part)
        extra = extra or online.first(part, size or len(clips))
        if size is None or size == len(clips):
            put = self._backend.put(clips) if put is None else put
            return run({"clip": put, **extra})
        pieces = []
        for start in range(0, len(clips), size):
            piece = clips[start : start + size]
            filled = np.concatenate([piece, np.repeat(piece[-1:], size - len(piece), axis=0)])
            out = run({"clip": self._backend.put(filled), **extra})
            pieces.append({key: value[: len(piece)] for key, value in out.items()})
        return {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}

    def _run_of(self, name: str) -> Run:
        """Return a part ready to run; a backend proves what it reads of one that is loaded now."""
        with self._lock:
            self._check_open()
            run = self._runs.get(name)
            if run is None:
                if name not in self.bundle.parts:
                    raise UnknownNameError("part", name, self.bundle.parts)
                run = self._runs[name] = self._backend.load(self.bundle.parts[name])
            return run


def _batch(part: Part) -> int | None:
    """Return the batch that a part was made for, or None where it is free."""
    return next((port.shape[0] for port in part.inputs if port.name == "clip"), None)


def _empty(k: int, m: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    return np.zeros((0, k), np.float32), np.zeros((0, m), np.float32)
