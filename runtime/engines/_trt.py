"""How TensorRT says no: by None, False or a TypeError, and by what it gave its logger."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from vmoe.errors import EngineMismatchError

log = logging.getLogger("vmoe.runtime")
T = TypeVar("T")


def logger(trt: Any) -> Any:
    """Return a TensorRT logger that keeps its errors, for our own messages, and tells -v the rest.

    `logger.said()` gives the last error, and forgets all.
    """
    severity = trt.ILogger.Severity

    class Log(trt.ILogger):  # type: ignore[misc]  # a class of TensorRT's, known when it is there
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, level: Any, message: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                self.errors.append(" ".join(message.split())[:300])
            elif level == severity.WARNING:
                log.debug("TensorRT: %s", message)

        def said(self) -> str:
            held, self.errors = self.errors, []
            return held[-1].rstrip(".") if held else "TensorRT says no more"

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
