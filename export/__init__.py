"""vmoe-export: from a twin to a bundle that really runs sparse.

from vmoe.export import ExportSettings, export
bundle, report = export("runs/train/mine/best.safetensors", "runs/export/mine-split")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import Exported, export
    from .plan import ExportSettings

_HOMES = {"ExportSettings": "plan", "Exported": "pipeline", "export": "pipeline"}
__all__ = ["ExportSettings", "Exported", "export"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
