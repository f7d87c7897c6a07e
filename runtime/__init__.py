"""vmoe-run and vmoe-bench: serving; never torch, never onnx.

A bundle answers clips:

    from vmoe.runtime import load
    with load("runs/bundle") as engine:
        logits, scores, route = engine.infer(clips)      # clips: uint8 [N, T, H, W, 3]

or it watches streams, and gives one result for each of their windows:

    from vmoe.runtime import Stream, load
    with load("runs/bundle") as engine, Stream(engine, "rtsp://camera.local/1") as stream:
        for result in stream:
            print(result.t_first_s, result.t_s, result.label, result.expert)

`result.t_first_s` and `result.t_s` are the true times, on the source's own clock in seconds, of
the first and the last frame of the window. Nothing of a file is dropped; of a live source the
newest frame wins, and every drop is counted. A `Stream` ends with its sources, or raises
SourceError after the last result that they gave. Stages run in threads of their own; leaving the
loop early (break, an exception) stops them all. `watch` is a generator that does it for one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine, Prediction, load
    from .pipeline import Pipeline, watch
    from .results import Result
    from .settings import StreamSettings
    from .sources import SourceSettings
    from .stream import Stream

_HOMES = {  # imported when first used, so that `import vmoe.runtime` costs nothing
    "Engine": "engine",
    "Pipeline": "pipeline",
    "Prediction": "engine",
    "Result": "results",
    "SourceSettings": "sources",
    "Stream": "stream",
    "StreamSettings": "settings",
    "load": "engine",
    "watch": "pipeline",
}
__all__ = [
    "Engine", "Pipeline", "Prediction", "Result", "SourceSettings", "Stream", "StreamSettings",
    "load", "watch",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
