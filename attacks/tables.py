"""The report of an evaluation as text: a table for each budget, valid Markdown as it stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vmoe.report import percent, table
from vmoe.settings import format_eps

COLUMNS = (
    "attack", "on", "clean %", "robust %", "success %", "flips %", "weakest %", "clean route %",
    "gap", "L_Lip R", "L_Lip F", "linf", "l2", "passes", "s",
)  # fmt: skip
LEGEND = (
    "Accuracies with their 95 % interval (Wilson). success: by the attack's own criterion (attacks "
    "on the router: the route has changed). flips: clips whose route changed; weakest: that went "
    "to the expert of the lowest clean score; with early stop, both in the clip that was wrong "
    "first. clean route: accuracy with the clean route kept. gap: mean top-2 gap of the scores, "
    "clean > adversarial. L_Lip R, L_Lip F: of the router, of the whole model, mean. linf, l2: "
    "largest change found in the final uint8 clips, in grey levels, and of a whole clip on pixels "
    "in [0, 1]. passes: forward + backward, mean of a clip, over all route_grads: of the router "
    "(attacks on it), of an expert (tla-e), else of router and routed expert; by route_grad all "
    "and soft, of router and every expert; judging is not counted. s: of making the clips, "
    "looking at them included. "
    "worst-of: broken by at least one attack of the table."
)


def attacks(report: Mapping[str, Any]) -> str:
    """Return one table for each budget: attack x model, then the worst of all."""
    budgets = list(dict.fromkeys(row["eps"] for row in report["rows"]))
    parts = []
    for eps in budgets:
        rows = [row for row in [*report["rows"], *report["worst_of"]] if row["eps"] == eps]
        norm, levels = rows[0]["norm"], rows[0]["radius"]
        limit = f"at most {levels} of 255 grey levels" if norm == "linf" else "L2 of a whole clip"
        title = f"eps {format_eps(eps, norm)}: {limit}, on uint8 clips"
        shown = [title, table([_row(row) for row in rows], COLUMNS), _left(rows)]
        parts.append("\n\n".join(part for part in shown if part))
    return "\n\n".join(parts)


def _left(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a line on attacks that used less than half of the budget; empty where there are none.

    One that has succeeded on every clip may have stopped early: it needed no more.
    """
    norm, budget = rows[0]["norm"], rows[0]["eps"]
    unit, name = {"linf": (255, " grey levels"), "l2": (1, "")}[norm]
    short = {
        row["attack"]: f"{row['attack']} ({row[norm]:.2g})"
        for row in rows
        if row["attack"] != "worst-of" and row["success"]["hits"] < row["success"]["n"]
        if row[norm] < unit * budget / 2
    }
    if not short:
        return ""
    return (
        f"More than half of a budget of {unit * budget:.3g}{name} was left unused, after rounding "
        f"to uint8, by {', '.join(short.values())}: figures are of what was used."
    )


def agreement(report: Mapping[str, Any]) -> str:
    """Return the table of twin against engine, clip by clip; empty where there is one model."""
    if not report["agreement"]:
        return ""
    columns = (
        "clips", "same route %", "same label %", "both broken", "only twin", "only engine",
        "neither",
    )  # fmt: skip
    rows = []
    for row in report["agreement"]:
        clean = row["attack"] == "clean"
        short = format_eps(row["eps"], row.get("norm", "linf")).split(" ")[0]
        name = "clean" if clean else f"{row['attack']} {short}"
        counts = [row.get(key) for key in ("both_broken", "only_twin", "only_engine", "neither")]
        rows.append([name, _share(row["route"]), _share(row["said"]), *counts])
    return "twin against engine, clip by clip\n\n" + table(rows, columns)


def sanity(report: Mapping[str, Any]) -> str:
    """Return what the checks of the attacks themselves say; empty where none were asked for."""
    found = report.get("sanity")
    if not found:
        return ""
    rows = [[c["number"], c["name"], c["verdict"], c["line"]] for c in found["checks"]]
    budget = format_eps(found["eps"], report["threat_model"]["norm"])
    title = f"sanity of the attacks, on {found['n']} clips, eps {budget}"
    shown = table(rows, ("no", "check", "verdict", "measured"))
    return f"{title}\n\n{shown}\n\n{found['verdict']}"


def flat(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every row of the report, worst-of among them, as one flat mapping each."""
    return [_flat(row) for row in [*report["rows"], *report["worst_of"]]]


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row whose shares are spread: robust, robust_hits, robust_low, ..."""
    made: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            made[name] = value["share"]
            made |= {f"{name}_{key}": value[key] for key in ("hits", "n", "low", "high")}
        else:
            made[name] = value
    return made


def markdown(report: Mapping[str, Any], header: str, curve: str | None = None) -> str:
    """Return the whole report; `curve` is the name of a picture beside it."""
    facts = "\n".join(f"* {line}" for line in header.splitlines())
    picture = f"![robust accuracy against eps]({curve})" if curve else ""
    parts = ["# vmoe-attack", facts, attacks(report), picture, agreement(report), sanity(report)]
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    command = f"Made by `{report['command']}`; seed {report['seed']}; {versions}."
    return "\n\n".join(part for part in [*parts, LEGEND, command] if part) + "\n"


def _row(row: Mapping[str, Any]) -> list[object]:
    gap = None
    if row.get("gap_clean") is not None:
        gap = f"{row['gap_clean']:.2f} > {row['gap_adversarial']:.2f}"
    passes = f"{row['forwards']:.1f}+{row['backwards']:.1f}" if row["forwards"] else None
    return [
        row["attack"], row["model"], _share(row["clean"]), _share(row["robust"], interval=True),
        _share(row["success"]), _share(row["flips"]), _share(row.get("weakest")),
        _share(row.get("route_kept")), gap, row.get("l_lip_router"), row.get("l_lip_model"),
        row["linf"], row["l2"], passes, f"{row['seconds']:.1f}",
    ]  # fmt: skip


def _share(found: Mapping[str, Any] | None, *, interval: bool = False) -> str | None:
    if found is None or not found["n"]:
        return None
    return percent(found["hits"], found["n"], interval=interval)
