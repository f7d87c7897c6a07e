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
DEPLOYED = ("made on", "queries")  # columns after the first, where there are engines
ENGINES = (
    "engine", "clean %", "twin %", "transfer %", "adaptive %", "query %", "worst-of %", "gap",
    "to the first",
)  # fmt: skip
LEGEND = """\
What the columns mean. Shares are per cent of the clips; in brackets the 95 % interval (Wilson).

* clean, robust: accuracy on the clips as they are, and after the attack.
* success: what the attack wanted. Of an attack on the router: the route has changed. Of the
  others: a clip that was classified rightly no longer is, in per cent of those clips.
* flips: clips whose route changed. weakest: clips sent to the expert with the lowest clean
  score. With early stop both are of the first clip that was classified wrongly.
* clean route: accuracy on the attacked clips if each kept the route of its clean clip.
* gap: mean distance of the router's two best scores, clean > attacked.
* L_Lip R, L_Lip F: mean Lipschitz term of the router, and of the whole model.
* linf: largest change of a pixel in the final uint8 clips, in grey levels. l2: largest length
  of a clip's change, on pixels in [0, 1].
* passes: forward + backward passes per clip, mean, over all route_grads. A pass is of the
  router (attacks on the router), of one expert (tla-e), of the router and every expert
  (route_grad all and soft), else of the router and the routed expert. Judging is not counted.
* s: seconds it took to make the clips, with looking at them.
* worst-of: a clip counts as broken if at least one attack of the table broke it."""
LEGEND_DEPLOYED = """\
Where there are engines:

* made on: what the attack looked at, and how. transfer: clips made on the twin, replayed on the
  engine. adaptive: the engine in the loop, beginning with the transfer's clip; its passes come
  on top of the transfer's. query: the engine's answers alone.
* queries: how often the engine was asked about a clip; judging is not counted.
* An engine's worst-of counts the transfers and what was made against that engine; the twin's
  counts the transfers. Saved clips that were made against another engine count for no mode.
* twin: the twin's own worst-of.
* gap: robust accuracy of the twin less that of the engine, in points, with its 95 % interval
  (paired bootstrap); above 0 the engine is weaker. The gap of worst-of judges twin and engine
  by the same clips. Some of those were sought against the engine, which favours the twin.
* to the first: the same, against the first engine, by the same attacks."""


def attacks(report: Mapping[str, Any]) -> str:
    """Return one table for each budget: attack x model, then the worst of all."""
    budgets = list(dict.fromkeys(row["eps"] for row in report["rows"]))
    parts = []
    for eps in budgets:
        rows = [row for row in [*report["rows"], *report["worst_of"]] if row["eps"] == eps]
        norm, levels = rows[0]["norm"], rows[0]["radius"]
        limit = f"at most {levels} of 255 grey levels" if norm == "linf" else "L2 of a whole clip"
        title = f"eps {format_eps(eps, norm)}: {limit}, on uint8 clips"
        engines = _has_engines(report)
        columns = (COLUMNS[0], *DEPLOYED, *COLUMNS[1:]) if engines else COLUMNS
        lines = [_row(row, engines=engines) for row in rows]
        shown = [title, table(lines, columns), _left(rows)]
        parts.append("\n\n".join(part for part in shown if part))
    return "\n\n".join(parts)


def _has_engines(report: Mapping[str, Any]) -> bool:
    return any(row["model"] != "twin" for row in report["rows"])


def deployed(report: Mapping[str, Any]) -> str:
    """Return what of the twin's robustness each engine has; empty where there is no engine."""
    found = report.get("deployed")
    if not found:
        return ""
    parts = []
    for eps in dict.fromkeys(row["eps"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["eps"] == eps]
        title = f"what was deployed, eps {format_eps(eps, rows[0]['norm'])}: robust accuracy"
        says = "\n".join(f"* {row['engine']}: {row['says']}" for row in rows)
        parts += [title, table([_engine(row) for row in rows], ENGINES), says]
    lines = [
        [line["engine"], format_eps(line["eps"], _norm(report)).split(" ")[0], line["name"],
         line["verdict"], line["line"]]
        for line in found["sanity"]
    ]  # fmt: skip
    if lines:
        checks = table(lines, ("engine", "eps", "check", "verdict", "measured"))
        parts += ["sanity of what was deployed", checks]
    return "\n\n".join(parts)


def _engine(row: Mapping[str, Any]) -> list[object]:
    shares = [_share(row[k]) for k in ("clean", "twin", "transfer", "adaptive", "query")]
    worst = _share(row["worst_of"], interval=True)
    return [row["engine"], *shares, worst, _gap(row["gap"]), _gap(row["apart"])]


def _gap(found: Mapping[str, float] | None) -> str | None:
    if found is None:
        return None
    return f"{found['points']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f})"


def _norm(report: Mapping[str, Any]) -> str:
    return str(report["rows"][0]["norm"])


def _left(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a line on attacks that used less than half of the budget; empty where there are none.

    One that has succeeded on every clip may have stopped early: it needed no more.
    """
    norm, budget = rows[0]["norm"], rows[0]["eps"]
    unit, name = {"linf": (255, " grey levels"), "l2": (1, "")}[norm]
    short = {
        (row["attack"], row.get("mode")): f"{row['attack']} ({row[norm]:.2g})"
        for row in rows
        if row["attack"] != "worst-of" and row["success"]["hits"] < row["success"]["n"]
        if row[norm] < unit * budget / 2
    }
    if not short:
        return ""
    return (
        f"More than half of a budget of {unit * budget:.3g}{name} was left unused, after rounding "
        f"to uint8, by {', '.join(dict.fromkeys(short.values()))}: figures are of what was used."
    )


def agreement(report: Mapping[str, Any]) -> str:
    """Return the table of twin against engine, clip by clip; empty where there is one model."""
    if not report["agreement"]:
        return ""
    columns = (
        "engine", "clips", "same route %", "same label %", "gap", "both broken", "only twin",
        "only engine", "neither",
    )  # fmt: skip
    rows = []
    for row in report["agreement"]:
        clean = row["attack"] == "clean"
        short = format_eps(row["eps"], row.get("norm", "linf")).split(" ")[0]
        name = "clean" if clean else f"{row['attack']} {row['mode']} {short}"
        counts = [row.get(key) for key in ("both_broken", "only_twin", "only_engine", "neither")]
        same = _share(row["route"]), _share(row["said"])
        rows.append([row["engine"], name, *same, _gap(row.get("gap")), *counts])
    return "twin against engine, clip by clip\n\n" + table(rows, columns)


def sanity(report: Mapping[str, Any]) -> str:
    """Return what the checks of the attacks themselves say, or why they were left out."""
    found = report.get("sanity")
    if not found:
        return (
            f"NOT CHECKED: the checks of the attacks themselves were left out: "
            f"{report['unchecked']}. A high robust accuracy may be gradient masking."
        )
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


def markdown(report: Mapping[str, Any], header: str, pictures: Sequence[str] = ()) -> str:
    """Return the whole report; `pictures` are the names of those beside it."""
    facts = "\n".join(f"* {line}" for line in header.splitlines())
    says = ("robust accuracy against eps", "robust accuracy of each engine")
    shown = [f"![{what}]({name})" for what, name in zip(says, pictures, strict=False)]
    parts = [
        "# vmoe-attack", facts, deployed(report), *shown, attacks(report), agreement(report),
        sanity(report),
    ]  # fmt: skip
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    command = f"Made by `{report['command']}`; seed {report['seed']}; {versions}."
    more = LEGEND_DEPLOYED if report.get("deployed") else ""
    return "\n\n".join(part for part in [*parts, LEGEND, more, command] if part) + "\n"


def _row(row: Mapping[str, Any], *, engines: bool) -> list[object]:
    gap = None
    if row.get("gap_clean") is not None:
        gap = f"{row['gap_clean']:.2f} > {row['gap_adversarial']:.2f}"
    passes = f"{row['forwards']:.1f}+{row['backwards']:.1f}" if row["forwards"] else None
    made = []
    if engines:
        asked = f"{row['queries']:.1f}" if row["queries"] else None
        made = [f"{row['made_on']}, {row['mode']}" if "mode" in row else None, asked]
    return [
        row["attack"], *made, row["model"], _share(row["clean"]),
        _share(row["robust"], interval=True),
        _share(row["success"]), _share(row["flips"]), _share(row.get("weakest")),
        _share(row.get("route_kept")), gap, row.get("l_lip_router"), row.get("l_lip_model"),
        row["linf"], row["l2"], passes, f"{row['seconds']:.1f}",
    ]  # fmt: skip


def _share(found: Mapping[str, Any] | None, *, interval: bool = False) -> str | None:
    if found is None or not found["n"]:
        return None
    return percent(found["hits"], found["n"], interval=interval)
