"""What stands beside the times: energy and accuracy, measured after them, of the same engines."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from vmoe import cli
from vmoe.bundle import Bundle

from . import accuracy, energy, forms, power, record
from .accuracy import Accuracy
from .energy import Energy, Method
from .forms import Form
from .record import Row
from .settings import BenchSettings
from .subjects import Subject, Wanted

log = logging.getLogger("vmoe")

INTERRUPTED = "the run was interrupted."
NO_CALLS = "it is measured of calls, and none could be made (of a stream there are none)."


@dataclass(frozen=True)
class Asked:
    """What is asked for, and can be had: checked before anything is measured.

    Attributes:
        meters: of energy; none where none is asked for or readable.
        why_not: of other meters, why they cannot be read.
        accuracy: clips, clean and adversarial.
        random: names of the bundles whose weights are random: they have no accuracy.
    """

    meters: tuple[power.Meter, ...]
    why_not: tuple[str, ...]
    accuracy: accuracy.Asked
    random: frozenset[str]


@dataclass(frozen=True)
class Found:
    """What was measured beside the times.

    Attributes:
        rows: with it.
        method: how energy was measured, or why not.
        interrupted: the user ended it; what was measured until then is in the rows.
    """

    rows: list[Row]
    method: Method
    interrupted: bool = False


def ask(stack: ExitStack, wanted: Sequence[Wanted], settings: BenchSettings) -> Asked:
    """Open meters and data, and refuse what cannot be had; `stack` closes the meters.

    Raises:
        VmoeError: a meter that was named cannot be read; or there are no such clips.
        SettingError: labels or clips that a bundle does not know.
    """
    every = [(want.name, want.bundle) for want in wanted if isinstance(want.bundle, Bundle)]
    random = frozenset(name for name, b in every if b.extra.get("weights") == "random")
    read = [(name, bundle) for name, bundle in every if name not in random]
    clips = accuracy.ask(settings.accuracy, settings.accuracy_clips, settings.robust, read)
    found = power.open_meters(stack, settings.power, settings.device)
    return Asked(found.meters, found.why_not, clips, random)


def measure(
    asked: Asked,
    subjects: Sequence[Subject],
    calls: Sequence[Form],
    rows: Sequence[Row],
    settings: BenchSettings,
) -> Found:
    """Measure accuracy, then energy.

    What fails says why in its row, or once for all; the rest goes on.

    Args:
        asked: what.
        subjects: loaded.
        calls: that could be measured, of the rows.
        rows: the times.
        settings: the device, the seed.
    """
    found, method = list(rows), Method(why_not=asked.why_not)
    try:
        found = _with_accuracy(asked, subjects, found)
        answer = [form for form in calls if _counted(form, settings.power)]
        found, method = _with_energy(asked, answer, found, settings.seed)
    except KeyboardInterrupt:
        return Found(found, replace(method, why_not=(INTERRUPTED,)), True)
    return Found(found, method)


def _with_accuracy(asked: Asked, subjects: Sequence[Subject], rows: list[Row]) -> list[Row]:
    """Return the rows that are routed freely with their bundle's accuracy, and the others."""
    if asked.accuracy.data is None and asked.accuracy.saved is None:
        return rows
    known: dict[tuple[str, str], Accuracy] = {}
    for subject in subjects:
        key = subject.name, subject.engine.backend_name
        if key in known or subject.name in asked.random:
            continue  # threads change no answer
        log.info("accuracy of %s", subject.name)
        try:
            known[key] = accuracy.measure(subject.engine, asked.accuracy)
        except Exception as e:
            log.debug("", exc_info=e)
            log.warning("%s: no accuracy: %s", subject.name, record.why(e))
            known[key] = Accuracy(why=record.why(e))
    return [
        replace(row, accuracy=known.get((row.bundle, row.backend)))
        if row.form == forms.FREE and row.why is None
        else row
        for row in rows
    ]


def _counted(form: Form, power_asked: str) -> bool:
    """Return whether a form's energy is measured: parts alone answer no clip, and take time."""
    forced = form.name.startswith(f"{forms.ROUTE} ")
    return not form.name.endswith("alone") and not (forced and power_asked == power.AUTO)


def _with_energy(
    asked: Asked, answer: Sequence[Form], rows: list[Row], seed: int
) -> tuple[list[Row], Method]:
    """Return the rows with what a clip of theirs draws."""
    if not asked.meters:
        return rows, Method(why_not=asked.why_not)
    if not answer:
        return rows, Method(why_not=(NO_CALLS,))
    seconds = energy.block_s(asked.meters)

    def show(turns: Iterable[int]) -> Iterable[int]:
        if sys.stderr.isatty():
            return cli.progress(turns, "energy", energy.TURNS)
        whole = energy.TURNS * seconds * (len(answer) + 1)
        log.info(
            "energy: %d forms and idling, %d blocks of %g s each: at least %.0f s",
            len(answer), energy.TURNS, seconds, whole,
        )  # fmt: skip
        return turns

    try:
        found, idle = energy.measure(
            [form.call for form in answer], [form.batch for form in answer], asked.meters,
            seconds=seconds, seed=seed, show=show,
        )  # fmt: skip
    except Exception as e:
        log.debug("", exc_info=e)
        log.warning("no energy: %s", record.why(e))
        return rows, Method(why_not=(record.why(e), *asked.why_not))
    covers = tuple(meter.covers for meter in asked.meters)
    method = Method(covers, asked.why_not, idle, seconds, energy.TURNS)
    by_key = {_key(form): each for form, each in zip(answer, found, strict=True)}
    return [replace(row, energy=_of(row, by_key)) for row in rows], method


def _key(form: Form) -> tuple[object, ...]:
    return (form.subject, form.name, form.scenario, form.batch, form.streams, form.threads,
            form.backend)  # fmt: skip


def _of(row: Row, by_key: dict[tuple[object, ...], Energy]) -> Energy | None:
    return by_key.get((row.bundle, row.form, row.scenario, row.batch, row.streams, row.threads,
                       row.backend))  # fmt: skip
