"""What `vmoe demo` says of the model: its labels against the moves that were made."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from vmoe import report
from vmoe.moves import Segment, truth


class Labelled(Protocol):
    """What is read of a window's result, of `vmoe.runtime`."""

    @property
    def label(self) -> str:
        """What the model says."""

    @property
    def expert(self) -> int:
        """Where it was routed."""

    @property
    def t_first_s(self) -> float:
        """Time of its first frame, in seconds."""

    @property
    def t_s(self) -> float:
        """Time of its last frame, in seconds."""

    @property
    def stage_ms(self) -> dict[str, float]:
        """What each stage took."""


def judge(segments: list[Segment], results: Sequence[Labelled]) -> dict[str, Any]:
    """Compare labels with the known moves.

    Args:
        segments: the moves.
        results: vmoe.runtime's, one for each window of the video.

    Returns:
        windows judged (those that lie in one move) and between moves, how many were right,
        the same per label with the commonest mistake, shares of the experts, latency in ms.
    """
    judged = [(s.label, r) for r in results if (s := truth(segments, r.t_first_s, r.t_s))]
    labels = sorted({label for label, _ in judged})
    rows = []
    for label in labels:
        given = Counter(r.label for was, r in judged if was == label)
        wrong = [(name, n) for name, n in given.most_common() if name != label]
        rows.append({
            "label": label, "windows": given.total(), "right": given[label],
            "mistaken_for": wrong[0][0] if wrong else None,
        })  # fmt: skip
    latency = sorted(r.stage_ms["infer_ms"] for r in results)
    experts = Counter(r.expert for r in results)
    return {
        "windows": len(judged),
        "right": sum(was == r.label for was, r in judged),
        "between_moves": len(results) - len(judged),
        "labels": rows,
        "expert_shares": {str(i): n / len(results) for i, n in sorted(experts.items())},
        "infer_ms": {
            "median": latency[len(latency) // 2],
            "p95": latency[int(0.95 * len(latency))],
        },
        "segments": [dataclasses.asdict(segment) for segment in segments],
    }


def text(found: dict[str, Any]) -> str:
    """Return the demo's report as Markdown, of what `judge` found and how it was made."""
    rows = [[r["label"], r["windows"], r["right"], r["mistaken_for"]] for r in found["labels"]]
    shares = ", ".join(f"{i}: {share:.0%}" for i, share in found["expert_shares"].items())
    seen = dict.fromkeys(segment["picture"] for segment in found["segments"])
    origin = "exported here and now" if found["exported_here"] else "as it ships"
    return "\n".join([
        "# The model that ships, against known camera moves",
        "",
        report.table(rows, ["known move", "windows", "right", "mistaken for"]),
        "",
        f"accuracy: {report.percent(found['right'], found['windows'])} % of {found['windows']} "
        f"windows (95 % interval); {found['between_moves']} windows span two moves, not judged",
        f"experts: {shares}",
        f"pictures: {', '.join(seen)}; bundle: {origin}",
        f"latency: {found['infer_ms']['median']:.2f} ms median, "
        f"{found['infer_ms']['p95']:.2f} ms p95 a window, on this machine",
        "",
    ])  # fmt: skip
