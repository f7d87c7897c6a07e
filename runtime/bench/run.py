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

from vmoe import cli
from vmoe.bundle import Bundle
from vmoe.errors import SettingError, VmoeError

from . import (
    about,
    beside,
    certificate,
    compare,
    context,
    device,
    forms,
    measuring,
    record,
    subjects,
    verdicts,
)
from .certificate import Certificate
from .compare import Comparison, Key, Side, parse_threshold
from .energy import Method
from .forms import Form
from .measuring import Plan, Samples
from .record import SCHEMA_VERSION, Record, Row
from .scenarios import CALLED, MULTI, OFFLINE, SINGLE, STREAM, multi, offline, single, stream
from .settings import BenchSettings
from .statistics import Drift, drift
from .subjects import How, Subject, Wanted
from .verdicts import Verdict
from .watch import Watch

log = logging.getLogger("vmoe")

LABELLED = ("scenario", "batch", "streams", "threads")  # of a row, where they differ


@dataclass
class Found:
    """What a run measured.

    Attributes:
        rows: of all that was called, and of the streams.
        measured: samples of what did not fail.
        drift: how the halves of the measurement compare; None where it was too short.
        interrupted: the user ended it before its time.
    """

    rows: list[Row] = field(default_factory=list)
    measured: list[tuple[Form, Samples]] = field(default_factory=list)
    drift: Drift | None = None
    interrupted: bool = False


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
        if old is not None:
            compare.check_common(old, _keys(opened.subjects, calls, settings))
        watch = Watch(gpu=machine["gpu"] is not None and settings.device != "cpu")
        found = _measure(calls, settings, watch)
        if STREAM in settings.scenarios and not found.interrupted:
            _stream(found, opened.subjects, settings, watch)
        if not found.rows:
            raise KeyboardInterrupt
        machine["during"] = watch.found()
        _ask_devices(found, opened.subjects)
        method = _beside(found, asked, opened.subjects, settings)
        made = _record(wanted, opened, found, machine, settings)
    return dataclasses.replace(
        made,
        energy=method,
        comparison=None if old is None else _compared(old, machine, made.rows, settings),
    )


def _record(
    wanted: Sequence[Wanted],
    opened: Opened,
    found: Found,
    machine: dict[str, Any],
    settings: BenchSettings,
) -> Record:
    """Put what was found in the order of the bundles, and judge it; the engines are still open."""
    order = [want.name for want in wanted]
    rows = sorted(
        [*found.rows, *(row for row, _ in opened.failed)], key=lambda row: order.index(row.bundle)
    )
    whole = [want for want in wanted if isinstance(want.bundle, Bundle)]
    entries = [certificate.entry(w.name, w.read(), baseline=w.baseline) for w in whole]
    made = _certificates(entries, found, settings)
    fixed = about.fixed_batches(opened.subjects)
    return Record(
        command=_command(),
        context=machine,
        settings=settings.resolved(),
        bundles=tuple(about.of(want, opened.subjects) for want in whole),
        rows=tuple(rows),
        certificates=made,
        verdicts=(
            *(verdict for one in made for verdict in verdicts.of_certificate(one)),
            *_judged(rows),
            *verdicts.of_watch(machine["during"], found.drift),
            *verdicts.of_context(machine),
            *verdicts.of_pieces(fixed, _largest(settings)),
            *verdicts.of_accuracy(rows, [entry.name for entry in entries if entry.random]),
        ),
        interrupted=found.interrupted,
    )


def _open(stack: ExitStack, wanted: Sequence[Wanted], settings: BenchSettings) -> Opened:
    """Load every bundle, once for each number of threads."""
    how = How(settings.backend, settings.device, settings.server, settings.cuda_graph)
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
                _check_tells(subject, settings)
    return opened


def _check_tells(subject: Subject, settings: BenchSettings) -> None:
    """Refuse to leave out copies of a backend that cannot tell them from work."""
    if not settings.include_transfers and not subject.engine.time_calls():
        raise SettingError(
            f"--no-include-transfers: backend {subject.engine.backend_name}, which runs "
            f"{subject.name}, does not tell copies from work; tensorrt does. Leave it out."
        )


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
    if settings.include_transfers:
        return made
    return [device.alone(form, subject.engine) for form in made]


def _measure(calls: Sequence[Form], settings: BenchSettings, watch: Watch) -> Found:
    """Call everything, interleaved."""
    found = Found()
    if not calls:
        return found
    whys: dict[int, str] = {}

    def failed(at: int, error: Exception) -> None:
        whys[at] = record.why(error)
        name = f"{calls[at].subject} {calls[at].name}"
        log.warning("%s, batch %d: failed: %s", name, calls[at].batch, whys[at])
        log.debug("", exc_info=error)

    plan = Plan(settings.iterations, settings.duration, settings.warmup / 1000, settings.seed)
    show = _shown(plan, len(calls))
    try:
        samples = measuring.interleave(
            [form.call for form in calls],
            plan,
            show=lambda rounds: watch.rounds(show(rounds)),
            on_error=failed,
        )
    except measuring.Interrupted as e:
        samples, found.interrupted = e.samples, True
    for at, (form, took) in enumerate(zip(calls, samples, strict=True)):
        if at in whys:
            found.rows.append(record.failure(form, whys[at]))
        else:
            found.rows.append(record.row(form, took, settings.percentile))
            found.measured.append((form, took))
    found.drift = drift([took.wall_ms for _, took in found.measured])
    return found


def _stream(
    found: Found, subjects: Sequence[Subject], settings: BenchSettings, watch: Watch
) -> None:
    """Run each bundle's streams, one after another; add their rows to what was found."""
    for subject in subjects:
        for streams in settings.stream_counts(STREAM):
            made = stream.form(subject, streams)
            log.info("streaming %d x %g s: %s", streams, settings.duration, subject.name)
            try:
                row, whole = stream.run(subject, made, settings, watch)
            except KeyboardInterrupt:
                row, whole = None, False
            except Exception as e:
                log.debug("", exc_info=e)
                row, whole = record.failure(made, record.why(e)), True
            found.rows += [row] if row is not None else []
            if not whole:
                found.interrupted = True
                return


def _beside(
    found: Found, asked: beside.Asked, subjects: Sequence[Subject], settings: BenchSettings
) -> Method:
    """Add accuracy and energy to the rows; return how energy was measured."""
    if found.interrupted:
        return Method(why_not=(beside.INTERRUPTED,))
    called = [form for form, _ in found.measured]
    made = beside.measure(asked, subjects, called, found.rows, settings)
    found.rows, found.interrupted = made.rows, made.interrupted
    return made.method


def _ask_devices(found: Found, subjects: Sequence[Subject]) -> None:
    """Add where calls spend their time, of the backends that tell."""
    engines = {(subject.name, subject.threads): subject.engine for subject in subjects}
    rows = {id(took): at for at, row in enumerate(found.rows) if (took := row.samples) is not None}
    for form, took in found.measured:
        try:
            times = device.times(form, engines[form.subject, form.threads])
        except Exception as e:  # it has failed since: the row stands without
            log.debug("", exc_info=e)
            continue
        at = rows[id(took)]
        found.rows[at] = dataclasses.replace(found.rows[at], device=times)


def _keys(opened: Sequence[Subject], calls: Sequence[Form], settings: BenchSettings) -> list[Key]:
    """Return what the rows to come are called."""
    streams = settings.stream_counts(STREAM) if STREAM in settings.scenarios else ()
    streamed = [stream.form(subject, n) for subject in opened for n in streams]
    every: list[Form] = [*calls, *streamed]
    return [
        Key(f.subject, f.name, f.scenario, f.batch, f.streams, f.threads, f.backend) for f in every
    ]


def _compared(
    old: Side, machine: Mapping[str, Any], rows: Sequence[Row], settings: BenchSettings
) -> Comparison:
    threshold = parse_threshold(settings.fail_over or "0")
    return compare.compare(old, compare.of_rows(machine, rows), threshold, settings.seed)


def _certificates(
    entries: Sequence[certificate.Entry],
    found: Found,
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
            for form, took in found.measured
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


def _judged(rows: Sequence[Row]) -> list[Verdict]:
    """Return what the rows say by themselves."""
    differ = [key for key in LABELLED if len({getattr(row, key) for row in rows}) > 1]

    def label(row: Row) -> str:
        return ", ".join(
            [f"{row.bundle} {row.form}", *(f"{key} {getattr(row, key)}" for key in differ)]
        )

    calls = {label(r): r.wall for r in rows if r.wall is not None and r.stream is None}
    streams = {label(r): (r.stream, r.wall) for r in rows if r.wall and r.stream is not None}
    devices = {label(r): r.device for r in rows if r.device is not None}
    return [
        *verdicts.of_rows(calls),
        *verdicts.of_streams(streams),
        *verdicts.of_device(devices),
    ]


def _shown(plan: Plan, forms: int) -> Callable[[Iterable[int]], Iterable[int]]:
    """Return what shows the rounds: a bar on a terminal, one line before them elsewhere."""

    def show(rounds: Iterable[int]) -> Iterable[int]:
        if sys.stderr.isatty():
            return cli.progress(rounds, "measuring", plan.rounds)
        least = f"at least {plan.rounds} calls of each, and {plan.duration_s:g} s"
        log.info("measuring %d forms, interleaved: %s", forms, least)
        return rounds

    return show


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
