"""The reproduction's tables, of the cells and trials that a folder holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cells
import numpy as np
import tasks
from cells import Trial
from corruptions import CORRUPTIONS

from vmoe import report

OURS = ("j-tlat", "j-tlat-plus")
DRAWS = 5000  # of the bootstrap


def row_of(made: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a method's row: means over its seeds, in %."""
    hits = {
        name: [100 * np.mean(one["hits"][name]) for one in made if name in one["hits"]]
        for name in ("clean", *[attack.replace("-", "_") for attack in cells.TABLE], "worst_of")
    }
    worst = hits["worst_of"]
    hits["apgd"] = [
        100 * np.mean(np.minimum(one["hits"]["apgd_ce"], one["hits"]["apgd_margin"]))
        for one in made
    ]
    means = {name: float(np.mean(each)) if each else None for name, each in hits.items()}
    lips = [one["lips_r"] for one in made if one["lips_r"] is not None]
    flips = [one["flips"]["tlga-r"] for one in made if "tlga-r" in one["flips"]]
    return {
        "method": made[0]["method"], "seeds": len(made), **means,
        "worst_of_se": float(np.std(worst, ddof=1) / np.sqrt(len(worst))) if made[1:] else None,
        "gflops": made[0]["gflops"],
        "lips_r": float(np.mean(lips)) if lips else None,
        "flips": 100 * float(np.mean(flips)) if flips else None,
        "margin": float(np.mean([one["margin"] for one in made])),
        **{key: float(np.mean([one[key] for one in made]))
           for key in ("train_flops", "grads", "seconds")},
        "corrupted": {name: 100 * float(np.mean([np.mean(one["corrupted"][name]) for one in made]))
                      for name in CORRUPTIONS},
        "shares": np.mean([one["experts"]["shares"] for one in made], axis=0).tolist(),
        "fixed_route": [100 * float(np.mean([one["experts"]["fixed_route"][i]["share"]
                                             for one in made]))
                        for i in range(len(made[0]["experts"]["fixed_route"]))],
        "oracle_route": 100 * float(np.mean([one["experts"]["oracle_route"]["share"]
                                             for one in made])),
    }  # fmt: skip


def gap(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return how far worst-of is ahead, in points, with a paired 95 % interval.

    Seeds are drawn with replacement, then clips of each seed; both methods of one seed were
    attacked on the same clips.
    """
    pairs = [
        np.array(a["hits"]["worst_of"]) - np.array(b["hits"]["worst_of"])
        for a in ours for b in theirs if a["seed"] == b["seed"]
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        seeds = rng.integers(len(pairs), size=len(pairs))
        drawn.append(np.mean([rng.choice(pairs[s], len(pairs[s])).mean() for s in seeds]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    value = float(np.mean([pair.mean() for pair in pairs]))
    return {"ours": ours[0]["method"], "theirs": theirs[0]["method"], "points": 100 * value,
            "low": 100 * float(low), "high": 100 * float(high), "seeds": len(pairs)}  # fmt: skip


COLUMNS = ("method", "seeds", "clean", "fgsm", "pgd", "apgd", "tlga_r", "j_tlga", "worst_of",
           "worst_of_se", "gflops", "lips_r", "flips", "margin", "train_flops", "grads",
           "seconds")  # fmt: skip
MACHINE = ("device", "torch", "machine", "python")


def tables(found: dict[str, Any], trials: Mapping[str, Sequence[Trial]]) -> dict[str, str]:
    """Return the tables of the Markdown, by their titles; `trials` are each method's."""
    rows = found["rows"]
    main = [[_short(row[column]) for column in COLUMNS] for row in rows]
    gaps = [
        [g["ours"], g["theirs"], f"{g['points']:+.1f}", f"{g['low']:+.1f} to {g['high']:+.1f}"]
        for g in found["gaps"]
    ]
    worse = [
        [row["method"], *[_short(row["corrupted"][name]) for name in CORRUPTIONS]] for row in rows
    ]
    routes = [
        [row["method"], _percents(row["shares"]), _percents(row["fixed_route"], 1),
         _short(row["oracle_route"])]
        for row in rows
    ]  # fmt: skip
    tried = [
        [name, " / ".join(map(_said, trials[name])),
         ", ".join("-" if one is None else f"{100 * one:.0f}" for one in worth)]
        for name, worth in found["trials"].items()
    ]  # fmt: skip
    made_on = {json.dumps(one["machine"], sort_keys=True): one["machine"] for one in found["cells"]}
    machines = [[one[key] for key in MACHINE] for one in made_on.values()]
    return {
        "Cells, in %": report.table(main, list(COLUMNS)),
        "Worst-of: points ahead (paired 95 % interval over seeds and clips)": report.table(
            gaps, ["method", "ahead of", "points", "interval"]
        ),
        "Natural corruptions: accuracy in %": report.table(worse, ["method", *CORRUPTIONS]),
        "Routes: shares of the clips, clean accuracy by fixed route, by an oracle, in %":
            report.table(routes, ["method", "shares", "fixed route", "oracle"]),
        "Trials, on validation clips: worst of PGD and APGD-margin in %": report.table(
            tried, ["method", "settings", "worth"]
        ),
        "Made on": report.table(machines, list(MACHINE)),
    }  # fmt: skip


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _percents(shares: Sequence[float], scale: float = 100) -> str:
    return ", ".join(f"{scale * share:.0f}" for share in shares)


def _said(trial: Trial) -> str:
    given = {**trial.recipe, **trial.loop}
    return " ".join(f"{name} {value:g}" for name, value in given.items()) or "defaults"


def worth_of(folder: Path, method: str, count: int) -> list[float | None]:
    """Return what each of a method's trials in a folder is worth; None where it is not made."""
    paths = [folder / f"{method}-{number}" / "worth.json" for number in range(count)]
    return [json.loads(path.read_text())["worth"] if path.exists() else None for path in paths]


def gather(
    folder: Path, names: Sequence[str], seeds: Sequence[int], trials: Mapping[str, Sequence[Trial]],
    size: tasks.Size,
) -> dict[str, Any]:  # fmt: skip
    """Return the record of all cells that a folder holds."""
    cells_of: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        paths = [folder / "cells" / f"{name}-{seed}.json" for seed in seeds]
        held = [json.loads(path.read_text()) for path in paths if path.exists()]
        if held:
            cells_of[name] = held
    worth = {name: worth_of(place, name, len(each))
             for place in folder.glob("*/trials") for name, each in trials.items()}  # fmt: skip
    return {
        "size": dataclasses.asdict(size),
        "rows": [row_of(made) for made in cells_of.values()],
        "gaps": [
            gap(cells_of[ours], theirs)
            for ours in OURS if ours in cells_of
            for name, theirs in cells_of.items() if name != ours
            if {one["seed"] for one in theirs} & {one["seed"] for one in cells_of[ours]}
        ],
        "trials": {name: each for name, each in worth.items() if any(w is not None for w in each)},
        "cells": [_packed(one) for made in cells_of.values() for one in made],
    }  # fmt: skip


def _packed(made: dict[str, Any]) -> dict[str, Any]:
    """Return a cell whose hits, 0 and 1 over the clips, are strings: thousands of lines less."""
    short = {key: {name: "".join(map(str, hits)) for name, hits in made[key].items()}
             for key in ("hits", "corrupted")}  # fmt: skip
    return {**made, **short}
