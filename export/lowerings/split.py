"""`split`: the router and every expert a graph of its own; the host routes.

Each expert is loaded when it is first routed to, and timed apart; a batch is grouped by expert.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import ModelProto


def lower(router: ModelProto | None, experts: Sequence[ModelProto]) -> dict[str, ModelProto]:
    """Return the parts `router` (of more than one expert) and `expert0`, `expert1` ..."""
    parts = {} if router is None else {"router": router}
    return parts | {f"expert{i}": expert for i, expert in enumerate(experts)}
