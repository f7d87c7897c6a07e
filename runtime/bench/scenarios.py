"""How it is measured: the settings, the scenarios, and the run that makes a record."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vmoe import cli
from vmoe.settings import Settings, opt, to_mapping

from . import certificate, context, forms, measuring, record, subjects, verdicts
from .measuring import Plan
from .record import About, Record
from .subjects import Subject

log = logging.getLogger("vmoe")

SCENARIOS = {"single": 1, "offline": 8}  # clips of a call where --batch is not given


@dataclass(frozen=True)
class BenchSettings(Settings):
    """The flags of vmoe-bench."""

    scenario: str = opt("single", "single: one call at a time, latency counts; offline: many clips "
                        "in a call, throughput counts", choices=tuple(SCENARIOS))  # fmt: skip
    batch: int | None = opt(None, "clips of a call; 1 of single and 8 of offline if not given",
                            at_least=1)  # fmt: skip
    threads: int | None = opt(None, "CPU threads of the engine; its own choice if not given",
                              at_least=1)  # fmt: skip
    warmup: float = opt(200.0, "milliseconds of rounds that do not count; at least one round",
                        at_least=0)  # fmt: skip
    duration: float = opt(3.0, "measure at least so many seconds, all forms together", at_least=0)
    iterations: int = opt(50, "call each form at least so often", at_least=1)
    percentile: tuple[float, ...] = opt((50.0, 90.0, 95.0, 99.0), "percentiles of the latency",
                                        above=0, at_most=100)  # fmt: skip
    force_route: str = opt("all", "all: every route; free: only the router's own; or one expert")
    device: str = opt("auto", "auto, cpu or cuda:N")
    backend: str = opt("auto", "what runs the graphs: auto, onnxruntime, openvino, torch or triton")
    server: str | None = opt(None, "HOST:PORT (HTTP) or grpc://HOST:PORT of a Triton server that "
                             "has all of the bundles: backend triton")  # fmt: skip
    out: Path | None = opt(None, "write the record as JSON, with every call's time")
    csv: Path | None = opt(None, "write the rows as CSV")
    md: Path | None = opt(None, "write the table and the verdicts as Markdown")
    overwrite: bool = opt(False, "replace the files of --out, --csv and --md")
    seed: int = opt(0, "seed of the clips, and of the order of the calls", at_least=0)

    @property
    def clips(self) -> int:
        """Clips of one call."""
        return SCENARIOS[self.scenario] if self.batch is None else self.batch


def run(paths: Sequence[Path], baselines: Sequence[Path], settings: BenchSettings) -> Record:
    """Measure bundles and baselines, all in one run.

    Raises:
        BundleError: no bundle; or a baseline whose clips no bundle takes.
        SettingError: a route that no model has, or a bundle that is given twice.
    """
    machine = context.read()
    with ExitStack() as stack:
        measured = subjects.open_all(
            stack,
            paths,
            baselines,
            backend=settings.backend,
            device=settings.device,
            threads=settings.threads,
            batch=settings.clips,
            seed=settings.seed,
            server=settings.server,
        )
        calls = [form for subject in measured for form in forms.of(subject, settings.force_route)]
        plan = Plan(settings.iterations, settings.duration, settings.warmup / 1000, settings.seed)
        samples = measuring.interleave(
            [form.call for form in calls], plan, show=_shown(plan, len(calls))
        )
        abouts = tuple(_about(subject) for subject in measured)
        fixed = {s.name: size for s in measured if (size := _fixed_batch(s)) is not None}
    rows = record.rows(calls, samples, settings.clips, settings.percentile)
    by_name = {(f.subject, f.name): took for f, took in zip(calls, samples, strict=True)}
    entries = [certificate.entry(s.name, s.bundle, baseline=s.baseline) for s in measured]
    made = tuple(
        certificate.certify(entry, entries, by_name)
        for entry in entries
        if entry.experts > 1 and not entry.baseline
    )
    said = [
        *(verdict for one in made for verdict in verdicts.of_certificate(one)),
        *verdicts.of_rows({(row.bundle, row.form): row.wall for row in rows}),
        *verdicts.of_context(machine),
        *verdicts.of_pieces(fixed, settings.clips),
        *verdicts.without_accuracy([entry.name for entry in entries if entry.random]),
    ]
    return Record(
        command=_command(),
        context=machine,
        settings={**to_mapping(settings), "batch": settings.clips},
        bundles=abouts,
        rows=rows,
        certificates=made,
        verdicts=tuple(said),
    )


def _shown(plan: Plan, forms: int) -> Callable[[Iterable[int]], Iterable[int]]:
    """Return what shows the rounds: a bar on a terminal, one line before them elsewhere."""

    def show(rounds: Iterable[int]) -> Iterable[int]:
        if sys.stderr.isatty():
            return cli.progress(rounds, "measuring", plan.rounds)
        least = f"at least {plan.rounds} calls of each, and {plan.duration_s:g} s"
        log.info("measuring %d forms, interleaved: %s", forms, least)
        return rounds

    return show


def _about(subject: Subject) -> About:
    bundle = subject.bundle
    answered = subject.engine.infer(subject.clips).route
    return About(
        name=subject.name,
        path=str(bundle.path),
        lowering=bundle.lowering,
        precision=certificate.precision(bundle),
        backend=subject.engine.backend_name,
        experts=bundle.experts,
        clip=bundle.spec.shape,
        baseline=subject.baseline,
        weights=str(bundle.extra.get("weights", "trained")),
        twin=bundle.twin.get("sha256"),
        routes=tuple(int(n) for n in np.bincount(answered, minlength=bundle.experts)),
    )


def _fixed_batch(subject: Subject) -> int | None:
    """Return the batch that a bundle's parts were made for, or None where it is free."""
    shapes = [port.shape for part in subject.bundle.parts.values() for port in part.inputs]
    return next((shape[0] for shape in shapes if len(shape) == 5), None)


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
