r"""The paper's table, cell by cell: every method at one budget, from one standard checkpoint.

    python benchmarks/reproduce.py --quick
    python benchmarks/reproduce.py --folder runs/reproduce \
        --out benchmarks/results/reproduce-camera-motion.json \
        --out benchmarks/results/reproduce-camera-motion.md --overwrite
    python benchmarks/reproduce.py --data ut-interaction --ut ut_interaction/train \
        --folder runs/reproduce-ut --camera runs/reproduce ...

Interrupted, it goes on where its --folder stands; --methods and --seeds make some of the cells, so
that several processes (or machines, whose folders are put together) can share them.

One configuration (`tasks`): TSM-R18, width 0.125, 4 experts, clips 8x64x64; at-d is one network of
width 0.25. A standard training of one expert (and of the dense network) is where every method
begins; it is not counted. Then each method has `trials` of its settings (TRIALS: as many for each),
judged on validation clips by the worst of PGD and APGD-margin, and with the best of them a training
for each seed, at one budget in FLOPs of all passes (attack, update, terms). Nothing else is chosen.
UT-Interaction, with --camera, takes starts and settings of camera-motion's run.

Columns: accuracy in % clean and under each attack (route_grad straight-through), then the worst of
all, per clip, with APGD-margin by the other three route_grads on what is left; its standard error
over the seeds; GFLOPs of a clip; L_Lip of the router under TLGA-R; what the training cost: FLOPs,
gradients of clips through experts, CPU seconds. `gaps`: worst-of of one method less another's, with
a paired 95 % interval over seeds and their clips (bootstrap of both).

Figure:

training_throughput
    CPU time of bare passes over that of vmoe-train's loop with as many (`throughput`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cells
import click
import figures
import numpy as np
import tasks
import throughput
import torch
from cells import Held, Task, Trial
from corruptions import CORRUPTIONS

from vmoe import output, report
from vmoe.attacks.judge import of_twin
from vmoe.models import VideoMoE, flops
from vmoe.runtime.bench import context
from vmoe.train.report import experts

log = logging.getLogger("vmoe")

METHODS = (
    "standard", "at-s", "at-d", "at-m", "oud-m", "aat-m", "tlat", "j-tlat", "j-tlat-plus",
)  # fmt: skip
OURS = ("j-tlat", "j-tlat-plus")
ONE_STEP = {"steps": 1, "step": 1.25}
WIDE_RATE = {"lr": 1.5e-3}  # at 3e-3 the dense network's standard training stays at chance
# Of each method as many: a slow and a fast attack inside of the training, or what matters more.
TRIALS: dict[str, list[Trial]] = {
    "standard": [Trial(loop={"lr": 3e-3}), Trial(loop={"lr": 1e-3})],
    **{name: [Trial(), Trial(ONE_STEP)] for name in METHODS[1:]},
    "at-d": [Trial(loop=WIDE_RATE), Trial(ONE_STEP, WIDE_RATE)],
    "aat-m": [Trial({"trades": 1.0}), Trial({**ONE_STEP, "trades": 1.0})],
    "j-tlat-plus": [Trial({**ONE_STEP, "shared": share}) for share in (0.6, 0.9)],
}
# Ablations: rows of their own, of a method's best trial but for what is named.
VARIANTS: dict[str, tuple[str, Trial]] = {
    "j-tlat: per batch": ("j-tlat", Trial({"order": "batch"})),
    "j-tlat: no router pass": ("j-tlat", Trial({"without": "router"})),
    "j-tlat: no weak experts": ("j-tlat", Trial({"without": "experts"})),
    "j-tlat: weak clips by both": ("j-tlat", Trial({"weak_clips": "both"})),
    "j-tlat: lam 0": ("j-tlat", Trial({"lam": 0.0})),
    "plus: never shared": ("j-tlat-plus", Trial({"shared": 0.0})),
    "plus: always shared": ("j-tlat-plus", Trial({"shared": 1.0})),
    "plus: all apart": ("j-tlat-plus", Trial({"apart": "all"})),
    "plus: margin 0": ("j-tlat-plus", Trial({"margin": 0.0})),
    "plus: margin 8": ("j-tlat-plus", Trial({"margin": 8.0})),
}
DRAWS = 5000  # of the bootstrap
ROUNDS = 5  # of the throughput's measurement


def start(task: Task, kind: str, folder: Path, epochs: int, camera: Path | None) -> Path:
    """Train the standard checkpoint that a method begins with: `narrow`, or `wide`.

    Where camera-motion's run is at hand, it begins with that one's weights.
    """
    model = cells.model_of(task, "at-s" if kind == "narrow" else "at-d")
    how: dict[str, Any] = {"budget": 0.0, "epochs": epochs, **(WIDE_RATE if kind == "wide" else {})}
    begin = None if camera is None else camera / "all" / "starts" / kind / "last.safetensors"
    cells.train(
        task, "standard", Trial(loop=how), folder / "starts" / kind, begin=begin, model=model
    )
    return folder / "starts" / kind / "last.safetensors"


def tuned(task: Task, method: str, begin: Path, folder: Path) -> dict[str, Any]:
    """Return the number of a method's best trial, and what each was worth on validation clips."""
    path = folder / "trials" / f"{method}.json"
    if path.exists():
        held: dict[str, Any] = json.loads(path.read_text())
        return held
    worth = []
    for number, trial in enumerate(TRIALS[method]):
        how = Trial(trial.recipe, {"budget": task.trial_tflops, **trial.loop})
        place = folder / "trials" / f"{method}-{number}"
        twin = cells.train(task, method, how, place, begin=begin, seed=100).twin
        worth.append(cells.quick(twin, task.val, task.eps, task.steps))
    made = {"best": int(np.argmax(worth)), "worth": worth}
    output.write_json(path, made)
    return made


def cell(
    task: Task, name: str, method: str, trial: Trial, begin: Path, folder: Path, seed: int
) -> None:
    """Make one cell: trained, attacked, corrupted; nothing where it has been made."""
    path = folder / "cells" / f"{name}-{seed}.json"
    if path.exists():
        return
    trained = cells.train(task, method, trial, path.with_suffix(""), begin=begin, seed=seed)
    twin, rows = trained.twin, trained.results["rows"]
    clips, label = np.asarray(task.test.clips), task.test.label
    made = {
        "method": name, "seed": seed, "recipe": trained.recipe,
        **cells.attack(twin, task.test, task.eps, task.steps),
        "experts": experts(twin, clips, label, cells.BATCH, torch.device("cpu"))["experts"],
        "corrupted": {name: right(twin, Held(change(clips), label, ()))
                      for name, change in CORRUPTIONS.items()},
        "gflops": flops.count(twin).moe / 1e9,
        "train_flops": rows[-1]["tflops"] * 1e12,
        "grads": sum(row["gradients"] for row in rows),
        "seconds": sum(row["cpu_s"] for row in rows),
    }  # fmt: skip
    kept: dict[str, Any] = report.plain(made)
    output.write_json(path, kept)
    log.info("%s", _line(kept))


def right(twin: VideoMoE, data: Held) -> list[int]:
    """Return which clips a twin gets right, 0 or 1."""
    judge, clips = of_twin(twin), data.clips
    parts = [judge(clips[at : at + cells.BATCH]) for at in range(0, len(clips), cells.BATCH)]
    said = np.concatenate([part.logits.argmax(axis=1) for part in parts])
    return [int(hit) for hit in said == data.label]


def _line(made: dict[str, Any]) -> str:
    shares = {name: f"{100 * np.mean(hits):.1f}" for name, hits in made["hits"].items()}
    return f"{made['method']}, seed {made['seed']}: {shares}, {made['seconds']:.0f} CPU seconds"


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


def tables(found: dict[str, Any]) -> dict[str, str]:
    """Return the tables of the Markdown, by their titles."""
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
    trials = [
        [name, " | ".join(map(_said, TRIALS[name])), _percents(held["worth"]), held["best"] + 1]
        for name, held in found["trials"].items()
    ]
    return {
        "Cells, in %": report.table(main, list(COLUMNS)),
        "Worst-of: points ahead (paired 95 % interval over seeds and clips)": report.table(
            gaps, ["method", "ahead of", "points", "interval"]
        ),
        "Natural corruptions: accuracy in %": report.table(worse, ["method", *CORRUPTIONS]),
        "Routes: shares of the clips, clean accuracy by fixed route, by an oracle, in %":
            report.table(routes, ["method", "shares", "fixed route", "oracle"]),
        "Trials, on validation clips: worst of PGD and APGD-margin in %": report.table(
            trials, ["method", "settings", "worth", "best"]
        ),
    }  # fmt: skip


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _percents(shares: Sequence[float], scale: float = 100) -> str:
    return ", ".join(f"{scale * share:.0f}" for share in shares)


def _said(trial: Trial) -> str:
    given = {**trial.recipe, **trial.loop}
    return " ".join(f"{name} {value:g}" for name, value in given.items()) or "defaults"


def gather(
    folder: Path, names: Sequence[str], seeds: Sequence[int], size: tasks.Size
) -> dict[str, Any]:
    """Return the record of all cells that a folder holds."""
    cells_of: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        paths = [folder / "cells" / f"{name}-{seed}.json" for seed in seeds]
        held = [json.loads(path.read_text()) for path in paths if path.exists()]
        if held:
            cells_of[name] = held
    trials = {path.stem: json.loads(path.read_text())
              for path in sorted(folder.glob("*/trials/*.json"))}  # fmt: skip
    return {
        "size": dataclasses.asdict(size),
        "rows": [row_of(made) for made in cells_of.values()],
        "gaps": [
            gap(cells_of[ours], theirs)
            for ours in OURS if ours in cells_of
            for name, theirs in cells_of.items() if name != ours
            if {one["seed"] for one in theirs} & {one["seed"] for one in cells_of[ours]}
        ],
        "trials": trials,
        "cells": [one for made in cells_of.values() for one in made],
    }  # fmt: skip


@click.command()
@click.option("--data", default="camera-motion", help="camera-motion or ut-interaction.")
@click.option("--ut", type=click.Path(path_type=Path), help="UT-Interaction's folder of classes.")
@click.option(
    "--camera", type=click.Path(path_type=Path),
    help="Folder of camera-motion's run, whose starts ut-interaction's begin with.",
)  # fmt: skip
@click.option("--folder", type=click.Path(path_type=Path), help="[default: runs/reproduce/DATA]")
@click.option("--methods", default=",".join(METHODS), help="Which to make, by commas.")
@click.option("--seeds", default="0,1,2", help="Which, by commas; folds of ut-interaction.")
@click.option("--quick", is_flag=True, help="Tiny: does it run, and in which direction?")
@click.option("--out", type=click.Path(path_type=Path), multiple=True, help=".json or .md.")
@click.option("--overwrite", is_flag=True, help="Replace --out.")
def main(
    data: str, ut: Path | None, camera: Path | None, folder: Path | None, methods: str,
    seeds: str, quick: bool, out: tuple[Path, ...], overwrite: bool,
) -> None:  # fmt: skip
    """Make the cells that are not there yet, and the tables of all that are."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    figures.check_files(out, overwrite=overwrite)
    machine = context.read()
    size = tasks.QUICK if quick else tasks.Size()
    place = folder or Path("runs/reproduce") / f"{data}{'-quick' * quick}"
    open_task = tasks.opener(data, place, size, ut)
    numbers = [int(seed) for seed in seeds.split(",")]
    for seed in numbers:
        task = open_task(seed)
        for method in methods.split(","):
            _make(task, method, place, size, camera, seed)
    found = gather(place, [*METHODS, *VARIANTS], numbers, size) | {"data": data}
    shown = tables(found)
    click.echo("\n\n".join(f"{title}\n\n{text}" for title, text in shown.items()))
    held = task.train.of if isinstance(task.train, cells.Turns) else task.test
    speed = [throughput.figure(task, held, 1 if quick else ROUNDS)]
    figures.say(speed, as_json=False)
    figures.write(out, f"Reproduction: {data}", speed, machine, shown, found)


def _make(
    task: Task, name: str, folder: Path, size: tasks.Size, camera: Path | None, seed: int
) -> None:
    """Make one cell, and what it needs: the standard start, the method's trials."""
    method, variant = VARIANTS.get(name, (name, Trial()))
    kind = "wide" if method == "at-d" else "narrow"
    begin = start(task, kind, folder / task.name, size.start_epochs, camera)
    if camera is None:
        best = tuned(task, method, begin, folder / task.name)["best"]
    else:
        best = json.loads((camera / "all" / "trials" / f"{method}.json").read_text())["best"]
    trial = TRIALS[method][best]
    both = Trial({**trial.recipe, **variant.recipe}, {**trial.loop, **variant.loop})
    cell(task, name, method, both, begin, folder, seed)


if __name__ == "__main__":
    main()
