"""One run: load what is compared, measure it, and make the record."""

from __future__ import annotations

import dataclasses
import logging
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vmoe import cli
from vmoe.errors import SettingError, VmoeError
from vmoe.settings import to_mapping

from . import beside, certificate, compare, context, forms, measuring, record, subjects, verdicts
from .certificate import Certificate
from .compare import Key, parse_threshold
from .energy import Method
from .forms import Form
from .measuring import Plan, Samples
from .record import SCHEMA_VERSION, About, Record, Row
from .scenarios import CALLED, MULTI, OFFLINE, SINGLE, STREAM, multi, offline, single, stream
from .settings import BenchSettings
from .subjects import How, Subject, Wanted

log = logging.getLogger("vmoe")

LABELLED = ("scenario", "batch", "streams", "threads")  # of a row, where they differ


@dataclass
class Opened:
    """What of a run could be loaded.

    Attributes:
        subjects: loaded.
        failed: a row for each bundle that could not be, with its error.
    """

    subjects: list[Subject] = field(default_factory=list)
    failed: list[tuple[Row, VmoeError]] = field(default_factory=list)


def run(paths: Sequence[Path], baselines: Sequence[Path | str], settings: BenchSettings) -> Record:
    """Measure bundles and baselines, all in one run.

    What cannot be loaded, or fails while it is called, has a row that says why; the rest goes on.

    Args:
        paths: bundles.
        baselines: bundles; or `torch`, `torch-compile`: the twin that the first bundle carries.
        settings: how.

    Raises:
        BundleError: no bundle; or a baseline whose clips no bundle takes; or nothing can be run.
        SettingError: a route that no model has, or a bundle that is given twice.
    """
    machine = context.read()
    wanted = subjects.wanted(paths, baselines)
    old = None if settings.compare is None else compare.load(settings.compare, SCHEMA_VERSION)
    with ExitStack() as stack:
        asked = beside.ask(stack, wanted, settings)
        opened = _open(stack, wanted, settings)
        if not opened.subjects:
            raise opened.failed[0][1]
        calls = [form for subject in opened.subjects for form in _calls(subject, settings)]
        if old is not None and settings.compare is not None:
            compare.check_common(settings.compare, old, _keys(opened.subjects, calls, settings))
        rows, measured, interrupted = _measure(calls, settings)
        if STREAM in settings.scenarios and not interrupted:
            more, interrupted = _stream(opened.subjects, settings)
            rows += more
        found = beside.Found(rows, Method(why_not=("it was interrupted.",)), interrupted)
        if not interrupted:
            called = [form for form, _ in measured]
            found = beside.measure(asked, opened.subjects, called, rows, settings)
        rows, interrupted = found.rows, found.interrupted
        abouts = tuple(_about(want, opened.subjects) for want in wanted)
        fixed = {s.name: size for s in opened.subjects if (size := _fixed_batch(s)) is not None}
    rows = [*rows, *(row for row, _ in opened.failed)]
    rows.sort(key=lambda row: [want.name for want in wanted].index(row.bundle))  # stable
    entries = [certificate.entry(w.name, w.bundle, baseline=w.baseline) for w in wanted]
    made = _certificates(entries, measured, settings)
    said = [
        *(verdict for one in made for verdict in verdicts.of_certificate(one)),
        *verdicts.of_rows(_summaries(rows)),
        *verdicts.of_context(machine),
        *verdicts.of_pieces(fixed, _largest(settings)),
        *verdicts.of_accuracy(rows, [entry.name for entry in entries if entry.random]),
    ]
    against = None
    if old is not None and settings.compare is not None:
        threshold = parse_threshold(settings.fail_over or "0")
        new = compare.of_rows(machine, rows)
        against = compare.compare(settings.compare, old, new, threshold, settings.seed)
    return Record(
        command=_command(),
        context=machine,
        settings=_resolved(settings),
        bundles=abouts,
        rows=tuple(rows),
        certificates=made,
        verdicts=tuple(said),
        interrupted=interrupted,
        energy=found.method,
        comparison=against,
    )


def _open(stack: ExitStack, wanted: Sequence[Wanted], settings: BenchSettings) -> Opened:
    """Load every bundle, once for each number of threads."""
    how = How(settings.backend, settings.device, settings.server)
    opened = Opened()
    for want in wanted:
        for threads in settings.thread_counts():
            try:
                subject = subjects.open_one(
                    stack, want, how, threads, _largest(settings), settings.seed
                )
            except SettingError:
                raise  # the command's mistake, not the bundle's
            except VmoeError as e:
                log.warning("%s: cannot be loaded, the rest goes on: %s", want.name, e)
                backend = subjects.TORCH if want.twin else settings.backend
                form = Form(want.name, forms.FREE, lambda _: None, settings.scenarios[0],
                            threads=threads, backend=backend)  # fmt: skip
                opened.failed.append((record.failure(form, str(e)), e))
            else:
                opened.subjects.append(subject)
    return opened


def _largest(settings: BenchSettings) -> int:
    """Return the most clips of one call."""
    sizes = [settings.batches(name) for name in CALLED if name in settings.scenarios]
    sizes += [settings.stream_counts(MULTI)] * (MULTI in settings.scenarios)
    return max((size for some in sizes for size in some), default=1)


def _calls(subject: Subject, settings: BenchSettings) -> list[Form]:
    """Return all that is called of a bundle; its parts alone in the first scenario only."""
    asked = settings.scenarios
    whole = next((name for name in asked if name in CALLED), None)
    made = []
    for name in asked:
        if name == SINGLE:
            made += single.calls(subject, settings, whole=name == whole)
        elif name == OFFLINE:
            made += offline.calls(subject, settings, whole=name == whole)
        elif name == MULTI:
            made += multi.calls(subject, settings)
    return made


def _measure(
    calls: Sequence[Form], settings: BenchSettings
) -> tuple[list[Row], list[tuple[Form, Samples]], bool]:
    """Call everything, interleaved; return rows, what was measured, and whether it was cut."""
    if not calls:
        return [], [], False
    whys: dict[int, str] = {}

    def failed(at: int, error: Exception) -> None:
        whys[at] = _why(error)
        name = f"{calls[at].subject} {calls[at].name}"
        log.warning("%s, batch %d: failed: %s", name, calls[at].batch, whys[at])
        log.debug("", exc_info=error)

    plan = Plan(settings.iterations, settings.duration, settings.warmup / 1000, settings.seed)
    interrupted = False
    try:
        samples = measuring.interleave(
            [form.call for form in calls], plan, show=_shown(plan, len(calls)), on_error=failed
        )
    except measuring.Interrupted as e:
        samples, interrupted = e.samples, True
    rows = []
    for at, (form, took) in enumerate(zip(calls, samples, strict=True)):
        if at in whys:
            rows.append(record.failure(form, whys[at]))
        else:
            rows.append(record.row(form, took, settings.percentile))
    measured = [
        (form, took)
        for at, (form, took) in enumerate(zip(calls, samples, strict=True))
        if at not in whys
    ]
    return rows, measured, interrupted


def _stream(subjects: Sequence[Subject], settings: BenchSettings) -> tuple[list[Row], bool]:
    """Run each bundle's streams, one after another; return rows, and whether it was cut."""
    rows = []
    for subject in subjects:
        for streams in settings.stream_counts(STREAM):
            try:
                found, whole = stream.run(subject, streams, settings)
            except Exception as e:
                log.debug("", exc_info=e)
                rows.append(record.failure(stream.form(subject, streams), _why(e)))
                continue
            rows += [found] if found is not None else []
            if not whole:
                return rows, True
    return rows, False


def _keys(opened: Sequence[Subject], calls: Sequence[Form], settings: BenchSettings) -> list[Key]:
    """Return what the rows to come are called."""
    streams = settings.stream_counts(STREAM) if STREAM in settings.scenarios else ()
    every = [*calls, *(stream.form(subject, n) for subject in opened for n in streams)]
    return [
        Key(f.subject, f.name, f.scenario, f.batch, f.streams, f.threads, f.backend) for f in every
    ]


def _why(error: Exception) -> str:
    """Return an error as one line; of what is not ours, with its type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, VmoeError) else f"{type(error).__name__}: {text}"


def _certificates(
    entries: Sequence[certificate.Entry],
    measured: Sequence[tuple[Form, Samples]],
    settings: BenchSettings,
) -> tuple[Certificate, ...]:
    """Certify every bundle of several experts, for each number of threads."""
    scenario = next((name for name in settings.scenarios if name in CALLED), None)
    if scenario is None:
        return ()
    batch = settings.batches(scenario)[0]
    made = []
    for threads in settings.thread_counts():
        key = (scenario, batch, threads)
        by_name = {
            (form.subject, form.name): took
            for form, took in measured
            if (form.scenario, form.batch, form.threads) == key
        }
        made += [
            dataclasses.replace(
                certificate.certify(entry, entries, by_name),
                scenario=scenario,
                batch=batch,
                threads=threads,
            )
            for entry in entries
            if entry.experts > 1 and not entry.baseline and (entry.name, forms.FREE) in by_name
        ]
    return tuple(made)


def _summaries(rows: Sequence[Row]) -> Mapping[str, Any]:
    """Return the summaries of the calls by what they are, as a verdict names them."""
    differ = [key for key in LABELLED if len({getattr(row, key) for row in rows}) > 1]

    def label(row: Row) -> str:
        return " ".join([row.bundle, row.form, *(f"{key} {getattr(row, key)}" for key in differ)])

    return {label(row): row.wall for row in rows if row.wall is not None and row.stream is None}


def _shown(plan: Plan, forms: int) -> Callable[[Iterable[int]], Iterable[int]]:
    """Return what shows the rounds: a bar on a terminal, one line before them elsewhere."""

    def show(rounds: Iterable[int]) -> Iterable[int]:
        if sys.stderr.isatty():
            return cli.progress(rounds, "measuring", plan.rounds)
        least = f"at least {plan.rounds} calls of each, and {plan.duration_s:g} s"
        log.info("measuring %d forms, interleaved: %s", forms, least)
        return rounds

    return show


def _about(want: Wanted, opened: Sequence[Subject]) -> About:
    bundle = want.bundle
    subject = next((subject for subject in opened if subject.name == want.name), None)
    return About(
        name=want.name,
        path=str(bundle.path),
        lowering=bundle.lowering,
        precision=certificate.precision(bundle),
        backend="" if subject is None else subject.engine.backend_name,
        experts=bundle.experts,
        clip=bundle.spec.shape,
        baseline=want.baseline,
        weights=str(bundle.extra.get("weights", "trained")),
        twin=bundle.twin.get("sha256"),
        routes=() if subject is None else _routes(subject),
    )


def _routes(subject: Subject) -> tuple[int, ...]:
    """Return how many of a bundle's clips each expert answers."""
    try:
        answered = [
            int(route)
            for clip in subject.clips
            for route in subject.engine.infer(clip[np.newaxis]).route
        ]
    except Exception:  # its rows say why
        return ()
    return tuple(int(n) for n in np.bincount(answered, minlength=subject.bundle.experts))


def _fixed_batch(subject: Subject) -> int | None:
    """Return the batch that a bundle's parts were made for, or None where it is free."""
    shapes = [port.shape for part in subject.bundle.parts.values() for port in part.inputs]
    return next((shape[0] for shape in shapes if len(shape) == 5), None)


def _resolved(settings: BenchSettings) -> dict[str, Any]:
    """Return the flags, with what they resolved to."""
    asked = settings.scenarios
    batches = [settings.batches(name) for name in CALLED if name in asked]
    streams = [settings.stream_counts(name) for name in (MULTI, STREAM) if name in asked]
    return {
        **to_mapping(settings),
        "batch": list(dict.fromkeys(n for some in batches for n in some)),
        "streams": list(dict.fromkeys(n for some in streams for n in some)),
        "threads": list(settings.thread_counts()),
    }


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
