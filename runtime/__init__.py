"""vmoe-run and vmoe-bench: serving; never torch, never onnx.

A bundle answers clips:

    from vmoe.runtime import load
    with load("runs/bundle") as engine:
        logits, scores, route = engine.infer(clips)      # clips: uint8 [N, T, H, W, 3]

or it watches a stream, a file here, and gives one result for each window of it:

    from vmoe.runtime import load, watch
    with load("runs/bundle") as engine:
        for result in watch(engine, "street.mp4"):
            print(result.t_first_s, result.t_s, result.label, result.expert)

`result.t_first_s` and `result.t_s` are the true times, on the source's own clock in seconds, of
the first and the last frame of the window. `watch` drops nothing of a file; of a live source the
newest frame wins, and every drop is counted. It ends with the source, or raises SourceError after
the last result that the source still gave. Stages run in threads of their own; leaving the loop
early (break, an exception) stops them all.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine, Prediction, load
    from .pipeline import Pipeline, watch
    from .results import Result

_HOMES = {  # imported when first used, so that `import vmoe.runtime` costs nothing
    "Engine": "engine",
    "Pipeline": "pipeline",
    "Prediction": "engine",
    "Result": "results",
    "load": "engine",
    "watch": "pipeline",
}
__all__ = ["Engine", "Pipeline", "Prediction", "Result", "load", "watch"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
