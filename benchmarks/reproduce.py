r"""The paper's table, cell by cell: every method at one budget, from one standard checkpoint.

    python benchmarks/reproduce.py --quick
    python benchmarks/reproduce.py --jobs 2 --folder runs/reproduce \
        --out benchmarks/results/reproduce-camera-motion.json \
        --out benchmarks/results/reproduce-camera-motion.md --overwrite
    python benchmarks/reproduce.py --data ut-interaction --ut ut_interaction/train --jobs 2 \
        --folder runs/reproduce-ut --camera runs/reproduce ...
    python benchmarks/reproduce.py --large --device cuda:0 --jobs 16 ...

Interrupted, it goes on where its --folder stands; --methods and --seeds make some of the cells, so
that several machines, whose folders are put together (--tables-only), can share them. --methods
also takes the names of VARIANTS, ablations of a method's best trial, made of the first seed.

One configuration (`tasks`): TSM-R18, width 0.125, 4 experts, clips 8x64x64; at-d is one network of
width 0.25. A standard training of one expert (and of the dense network) is where every method
begins; it is not counted. Then each method has `trials` of its settings (TRIALS: as many for each),
judged on validation clips by the worst of PGD and APGD-margin, and with the best of them a training
for each seed, at one budget in FLOPs of all passes (attack, update, terms). Nothing else is chosen.
--large is four times the budget and twice the clips: minutes of a GPU, a day of two cores.
UT-Interaction, with --camera, takes starts and settings of camera-motion's run.

Columns: accuracy in % clean and under each attack (route_grad straight-through), then the worst of
all, per clip, with the attacks by the other three route_grads on what is left; its standard error
over the seeds; GFLOPs of a clip; L_Lip of the router under TLGA-R; what the training cost: FLOPs,
gradients of clips through experts, CPU seconds. `gaps`: worst-of of one method less another's, with
a paired 95 % interval over seeds and their clips (bootstrap of both).

Figure, but with --large:

training_throughput
    CPU time of bare passes over that of vmoe-train's loop with as many (`throughput`).
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cells
import click
import figures
import numpy as np
import reproduce_tables
import tasks
import throughput
import torch
from cells import Held, Task, Trial
from corruptions import CORRUPTIONS

from vmoe import checkpoint, cli, output, report
from vmoe.attacks.judge import of_twin
from vmoe.attacks.record import context as machine_of
from vmoe.errors import SettingError, UnknownNameError
from vmoe.models import VideoMoE, flops
from vmoe.runtime.bench import context
from vmoe.train.report import experts

log = logging.getLogger("vmoe")

DATA = ("camera-motion", "ut-interaction")
METHODS = (
    "standard", "at-s", "at-d", "at-m", "oud-m", "aat-m", "tlat", "j-tlat", "j-tlat-plus",
)  # fmt: skip
ONE_STEP = {"steps": 1, "step": 1.25}
SLOW = {"lr": 1e-3}
WIDE, WIDE_SLOW = {"lr": 1.5e-3}, {"lr": 5e-4}  # at 3e-3 the dense network stays at chance
# Of each method as many: a slow and a fast attack inside of the training, each at two rates.
TRIALS: dict[str, list[Trial]] = {
    "standard": [Trial(loop={"lr": rate}) for rate in (3e-3, 1e-3, 3e-4, 1e-4)],
    **{
        name: [Trial(attack, rate) for rate in ({}, SLOW) for attack in ({}, ONE_STEP)]
        for name in METHODS[1:]
    },
    "at-d": [Trial(attack, rate) for rate in (WIDE, WIDE_SLOW) for attack in ({}, ONE_STEP)],
    "aat-m": [  # its weight matters more than its rate
        Trial({**attack, "trades": weight}) for weight in (1.0, 6.0) for attack in ({}, ONE_STEP)
    ],
}  # fmt: skip
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


@dataclass(frozen=True)
class Run:
    """What is made, and where.

    Attributes:
        data: camera-motion or ut-interaction.
        folder: of starts, trials and cells.
        size: how much of everything.
        device: cpu or cuda:N.
        ut: UT-Interaction's folder of classes.
        camera: folder of camera-motion's run, of which starts and settings are taken.
    """

    data: str
    folder: Path
    size: tasks.Size
    device: str
    ut: Path | None = None
    camera: Path | None = None

    def task(self, seed: int) -> Task:
        """Return the task of a seed (or fold)."""
        return tasks.open_task(self.data, self.folder, seed, self.size, self.ut, self.device)

    def start(self, seed: int, kind: str) -> Path:
        """Return the standard checkpoint that a method begins with, `narrow` or `wide`, trained.

        Where camera-motion's run is at hand, it begins with that one's weights.
        """
        task = self.task(seed)
        model = cells.model_of(task, "at-s" if kind == "narrow" else "at-d")
        how: dict[str, Any] = {"budget": 0.0, "epochs": self.size.start_epochs}
        how |= WIDE if kind == "wide" else {}
        begin = self.camera and self.camera / "all" / "starts" / kind / "last.safetensors"
        folder = self.folder / task.name / "starts" / kind
        cells.train(task, "standard", Trial(loop=how), folder, begin=begin, model=model)
        return folder / "last.safetensors"

    def trial(self, seed: int, method: str, number: int) -> None:
        """Make a trial of a method's settings, and say what it is worth on validation clips."""
        task, trial = self.task(seed), TRIALS[method][number]
        folder = self.folder / task.name / "trials" / f"{method}-{number}"
        if (folder / "worth.json").exists():
            return
        how = Trial(trial.recipe, {"budget": task.trial_tflops, **trial.loop})
        begin = self.start(seed, kind_of(method))
        twin = cells.train(task, method, how, folder, begin=begin, seed=100).twin
        worth = cells.quick(twin, task.val, task)
        output.write_json(folder / "worth.json", {"worth": worth})
        log.info("%s, trial %d: worth %.3f", method, number, worth)

    def best(self, seed: int, method: str) -> Trial:
        """Return a method's best trial.

        Raises:
            SettingError: one is not made.
        """
        folder = self.camera / "all" if self.camera else self.folder / self.task(seed).name
        worth = reproduce_tables.worth_of(folder / "trials", method, self.size.trials)
        found = [one for one in worth if one is not None]
        if len(found) < len(worth):
            raise SettingError(f"{folder / 'trials'} lacks a trial of {method}: make it first.")
        return TRIALS[method][int(np.argmax(found))]

    def cell(self, seed: int, name: str) -> None:
        """Make one cell: trained, attacked, corrupted; nothing where it has been made."""
        path = self.folder / "cells" / f"{name}-{seed}.json"
        if path.exists():
            return
        task = self.task(seed)
        method, variant = VARIANTS.get(name, (name, Trial()))
        best, begin = self.best(seed, method), self.start(seed, kind_of(method))
        trial = Trial({**best.recipe, **variant.recipe}, {**best.loop, **variant.loop})
        made = cells.train(task, method, trial, path.with_suffix(""), begin=begin, seed=seed)
        kept: dict[str, Any] = report.plain(
            {"method": name, "seed": seed, "recipe": made.recipe, **worth(made.twin, task)}
            | cost(made.results["rows"])
        )
        output.write_json(path, kept)
        log.info("%s", _line(kept))


def kind_of(method: str) -> str:
    """Return which standard checkpoint a method begins with."""
    return "wide" if method == "at-d" else "narrow"


def worth(twin: VideoMoE, task: Task) -> dict[str, Any]:
    """Return what a twin does on a task's test clips: attacked, corrupted, by fixed routes."""
    clips, label = np.asarray(task.test.clips), task.test.label
    device = torch.device(task.device)
    return {
        **cells.attack(twin, task.test, task),
        "experts": experts(twin, clips, label, task.attack_batch, device)["experts"],
        "corrupted": {name: right(twin, Held(change(clips), label, ()), task)
                      for name, change in CORRUPTIONS.items()},
        "gflops": flops.count(twin).moe / 1e9,
        "machine": machine_of(device),
    }  # fmt: skip


def cost(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return what a training cost, of its epochs."""
    return {
        "train_flops": rows[-1]["tflops"] * 1e12,
        "grads": sum(row["gradients"] for row in rows),
        "seconds": sum(row["cpu_s"] for row in rows),
    }


def right(twin: VideoMoE, data: Held, task: Task) -> list[int]:
    """Return which clips a twin gets right, 0 or 1."""
    judge, clips, size = of_twin(twin, task.device), data.clips, task.attack_batch
    parts = [judge(clips[at : at + size]) for at in range(0, len(clips), size)]
    said = np.concatenate([part.logits.argmax(axis=1) for part in parts])
    return [int(hit) for hit in said == data.label]


def _line(made: dict[str, Any]) -> str:
    shares = {name: f"{100 * np.mean(hits):.1f}" for name, hits in made["hits"].items()}
    return f"{made['method']}, seed {made['seed']}: {shares}, {made['seconds']:.0f} CPU seconds"


Job = Callable[[], object]


@contextmanager
def workers(count: int) -> Iterator[Callable[[Iterable[Job]], None]]:
    """Yield what does jobs that need nothing of each other, in so many processes."""
    if count == 1:
        yield in_turn
        return
    begin = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, begin, _quiet) as pool:
        yield functools.partial(at_once, pool)


def in_turn(jobs: Iterable[Job]) -> None:
    """Do jobs, one after the other."""
    for job in jobs:
        job()


def at_once(pool: ProcessPoolExecutor, jobs: Iterable[Job]) -> None:
    """Do jobs in a pool, all of them, and then raise what one of them has raised."""
    failed = None
    for done in as_completed([pool.submit(job) for job in jobs]):
        if error := done.exception():
            log.error("failed: %r", error)
            failed = error
    if failed is not None:
        raise failed


def _quiet() -> None:
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")


def phases(run: Run, names: list[str], seeds: list[int], count: int) -> None:
    """Make what lacks of starts, then of trials, then of cells; what takes longest first."""
    used = {VARIANTS.get(name, (name, Trial()))[0] for name in names}
    methods = [name for name in reversed(METHODS) if name in used]
    own = list({run.task(seed).name: seed for seed in reversed(seeds)}.values())
    kinds = sorted({kind_of(method) for method in methods}, reverse=True)
    made = functools.partial
    with workers(count) as do:
        do([made(run.start, seed, kind) for kind in kinds for seed in own])
        if run.camera is None:
            do([made(run.trial, seed, method, number)
                for seed in own for method in methods
                for number in range(run.size.trials)])  # fmt: skip
        variants = [made(run.cell, seeds[0], name) for name in names if name in VARIANTS]
        ours = [name for name in reversed(names) if name not in VARIANTS]
        do([made(run.cell, seed, name) for seed in seeds for name in ours] + variants)


@cli.command(
    "reproduce.py",
    "python benchmarks/reproduce.py --quick",
    "python benchmarks/reproduce.py --methods at-m,j-tlat --jobs 2 --out table.md",
    "python benchmarks/reproduce.py --tables-only --folder runs/reproduce/camera-motion",
)
@click.option(
    "--data", type=cli.NameType(DATA), default=DATA[0], show_default=True, help="Which task."
)
@click.option("--ut", type=click.Path(path_type=Path), help="UT-Interaction's folder of classes.")
@click.option(
    "--camera", type=click.Path(path_type=Path),
    help="Folder of camera-motion's run, whose starts ut-interaction's begin with.",
)  # fmt: skip
@click.option("--folder", type=click.Path(path_type=Path), help="[default: runs/reproduce/DATA]")
@click.option(
    "--methods", default=",".join(METHODS), show_default=True,
    help="Whose cells and tables, by commas; also the ablations of VARIANTS.",
)  # fmt: skip
@click.option(
    "--seeds", type=cli.ListType(click.IntRange(0)), default="0,1,2", show_default=True,
    help="Which, by commas; folds of ut-interaction.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="Tiny: does it run, and in which direction?")
@click.option("--large", is_flag=True, help="Four times the budget, for a GPU.")
@click.option(
    "--jobs", type=click.IntRange(1), default=1, show_default=True,
    help="Processes that share the work, each with one CPU thread.",
)  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda:N.")
@click.option("--tables-only", is_flag=True, help="Make no cell, but tables of what there is.")
@figures.result_options
def main(
    data: str, ut: Path | None, camera: Path | None, folder: Path | None, methods: str,
    seeds: tuple[int, ...], quick: bool, large: bool, jobs: int, device: str, tables_only: bool,
    out: tuple[Path, ...], overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Make the cells of --methods that are not there yet, and their tables."""
    _quiet()
    figures.check_files(out, overwrite=overwrite)
    names = _chosen(methods)
    if quick and large:
        raise SettingError("--quick and --large are two sizes: give one of them.")
    machine = context.read()
    size = tasks.QUICK if quick else tasks.LARGE if large else tasks.Size()
    place = folder or Path("runs/reproduce") / f"{data}{'-quick' * quick}{'-large' * large}"
    speed = []
    if not tables_only:
        if data == "ut-interaction" and ut is None:
            raise SettingError("--data ut-interaction needs --ut FOLDER, of its classes.")
        run = Run(data, place, size, str(checkpoint.device(device)), ut, camera)
        tasks.prepare(data, place, size, seeds, jobs)
        phases(run, names, list(seeds), jobs)
        if not large:
            speed = [throughput.figure(quick=quick)]
    trials = {name: TRIALS[name][: size.trials] for name in METHODS}
    found = reproduce_tables.gather(place, names, seeds, trials, size)
    if not found["rows"]:
        raise SettingError(
            f"{place} holds no cell of these methods and seeds: leave --tables-only out."
        )
    found |= {"data": data}
    shown = reproduce_tables.tables(found, trials)
    if not as_json:
        click.echo("\n\n".join(f"{title}\n\n{text}" for title, text in shown.items()))
    figures.say(speed, as_json=as_json)
    figures.write(out, f"Reproduction: {data}{', large' * large}", speed, machine, shown, found)


def _chosen(methods: str) -> list[str]:
    """Return the names of methods and ablations.

    Raises:
        UnknownNameError: one that there is not.
    """
    names, known = methods.split(","), [*METHODS, *VARIANTS]
    for name in names:
        if name not in known:
            raise UnknownNameError("method", name, known)
    return names


if __name__ == "__main__":
    main()
