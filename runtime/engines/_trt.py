"""How TensorRT says no: None, False, a TypeError, a RuntimeError, and what it gave its logger."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vmoe.errors import EngineMismatchError

if TYPE_CHECKING:
    import tensorrt as trt

log = logging.getLogger("vmoe.runtime")
T = TypeVar("T")
_loggers: dict[Any, Any] = {}  # by the module tensorrt


def logger(trt: Any) -> Any:
    """Return the logger of a TensorRT: it keeps the last error, and tells -v the warnings.

    There is one in a process, and it is never freed. TensorRT keeps the address of the first that
    it was given while any builder, runtime or refitter lives, and writes to that one what is said
    at others, also when the object that it came with, and it, are gone.

    `logger.said()` gives the last error, and forgets it.
    """
    if trt not in _loggers:
        _loggers.setdefault(trt, _made(trt))  # another thread's, if that was sooner
    return _loggers[trt]


def _made(trt: Any) -> Any:
    severity = trt.ILogger.Severity

    class Log(trt.ILogger):  # type: ignore[misc]  # a class of TensorRT's, known when it is there
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.error = ""

        def log(self, level: Any, message: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                self.error = " ".join(message.split())[:300]
            elif level == severity.WARNING:
                log.debug("TensorRT: %s", message)

        def said(self) -> str:
            held, self.error = self.error, ""
            return held.rstrip(".") or "TensorRT says no more"

    return Log()


def checked(value: T | None, what: str, logger: Any) -> T:
    """Return what TensorRT answered, unless it is a refusal.

    Raises:
        EngineMismatchError: it is False or None; with TensorRT's own words.
    """
    if value is None or value is False:
        raise EngineMismatchError(f"{what} failed: {logger.said()}.")
    return value


def constructed(make: Callable[[], T], what: str, logger: Any) -> T:
    """Construct an object of TensorRT's.

    Raises:
        EngineMismatchError: TensorRT gives none, which its bindings say by a TypeError.
    """
    try:
        return make()
    except TypeError as e:
        raise EngineMismatchError(f"TensorRT: {what} cannot be made: {logger.said()}.") from e


def shapes(context: trt.IExecutionContext, name: str, logger: Any) -> None:
    """Let a context settle all shapes, by those of its inputs.

    Raises:
        EngineMismatchError: an input has none, or a layer refuses them, which its bindings say by a
            RuntimeError.
    """
    try:
        unknown = context.infer_shapes()
    except RuntimeError as e:
        raise EngineMismatchError(f"{name}: infer_shapes failed: {logger.said()}.") from e
    checked(not unknown, f"{name}: infer_shapes ({', '.join(unknown)})", logger)


def refit(trt: Any, engine: trt.ICudaEngine, graph: Path | bytes, name: str, logger: Any) -> None:
    """Give a stripped plan its weights, from the graph that it was built from.

    Args:
        trt: the module tensorrt.
        engine: without weights.
        graph: the ONNX, or the file that holds it.
        name: for messages.
        logger: TensorRT's words.

    Raises:
        EngineMismatchError: TensorRT refuses.
    """
    refitter = constructed(lambda: trt.Refitter(engine, logger), "Refitter", logger)
    parser = constructed(
        lambda: trt.OnnxParserRefitter(refitter, logger), "OnnxParserRefitter", logger
    )
    if isinstance(graph, bytes):
        checked(parser.refit_from_bytes(graph), f"{name}: refit_from_bytes", logger)
    else:
        checked(parser.refit_from_file(str(graph)), f"{name}: refit_from_file", logger)
    checked(refitter.refit_cuda_engine(), f"{name}: refit_cuda_engine", logger)
