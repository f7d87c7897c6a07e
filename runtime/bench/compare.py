"""Two records of vmoe-bench: which rows became slower by more than the noise of both?

Of each row that stands in both (same bundle, form, scenario, batch, streams, threads, backend), the
ratio of the medians of all calls, new over old, with an interval:

    SE of log ratio = sqrt(SE_old^2 + SE_new^2), each by a bootstrap of the log median
    interval        = ratio * exp(+- z SE),  z for 95 % of all rows together (Bonferroni)

Calls follow each other in time, and a machine's speed drifts: calls that are near have like times.
Whole blocks of calls are drawn, in a circle, as long as twice the reach of their autocorrelation,
so that drift widens the interval; where there is none, single calls.

A row is slower where the ratio exceeds 1 + threshold, the interval lies above 1, and the ratio of
the minima exceeds 1 + threshold, too. That last is for what no interval of two runs can know: that
others used the machine in one of them. They stretch medians at will, and leave the fastest calls
nearly alone. Where medians and minima disagree, the row is unclear, and fails nothing. Calls that
last longer than a turn of the scheduler are stretched to the last on a busy machine: the ratio of
CPU times is shown beside, and judges nothing, since a GPU's work has none.

Source: Politis and Romano, "A circular block-resampling procedure for stationary data", 1992.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vmoe import report
from vmoe.errors import SettingError, VmoeError

from .statistics import LEAST, LEVEL, Times

if TYPE_CHECKING:
    from .record import Row

DRAWS = 500  # of a bootstrap: they give an SE, no far percentile
AT_ONCE = 1 << 20  # values drawn in one piece
MACHINE = ("cpu", "cores", "quota_cores", "gpu", "board", "virtual")  # of the context
SLOWER, FASTER, SAME, UNCLEAR = "slower", "faster", "same", "unclear"
FEW, FAILED = "few calls", "fails now"


class Key(NamedTuple):
    """What makes two rows of two records the same."""

    bundle: str
    form: str
    scenario: str
    batch: int
    streams: int
    threads: int | None
    backend: str

    def __str__(self) -> str:
        """Return it as print has it; what is 1 or left open is not said."""
        said = [self.bundle, self.form, self.scenario, *self.sizes(), self.backend]
        return " ".join(said)

    def sizes(self) -> list[str]:
        """Return batch, streams and threads, where they say something."""
        sized = [f"batch {self.batch}"] * (self.batch > 1)
        sized += [f"streams {self.streams}"] * (self.streams > 1)
        return sized + [f"threads {self.threads}"] * (self.threads is not None)


@dataclass(frozen=True)
class Side:
    """One of the two records, as far as it is compared.

    Attributes:
        context: the machine.
        times_ms: every call of each row.
        failed: rows that could not be measured, and why.
        cpu_ms: median CPU time of a call of each row; none of streams.
        path: its file, of the older one.
    """

    context: Mapping[str, Any]
    times_ms: Mapping[Key, Times]
    failed: Mapping[Key, str]
    cpu_ms: Mapping[Key, float] = field(default_factory=dict)
    path: Path = Path()


@dataclass(frozen=True)
class Line:
    """One row of both records.

    Attributes:
        key: which one.
        found: slower, faster, same, unclear, few calls, or fails now.
        old_ms, new_ms: medians; None of a row that fails now.
        ratio: new over old.
        low, high: its interval; None of too few calls.
        minima: ratio of the minima: what is left when nothing else runs on the machine.
        cpu: ratio of the medians of CPU time; None where there is none.
    """

    key: Key
    found: str
    old_ms: float
    new_ms: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    minima: float | None = None
    cpu: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A record beside an older one.

    Attributes:
        old: the older one's file.
        threshold: above which a row is slower; 0.05 is 5 %.
        lines: of the rows that stand in both.
        only_old, only_new: rows that stand in one.
        remarks: in what else the two differ, one line each.
    """

    old: Path
    threshold: float
    lines: tuple[Line, ...]
    only_old: tuple[Key, ...]
    only_new: tuple[Key, ...]
    remarks: tuple[str, ...]

    @property
    def regressions(self) -> tuple[Line, ...]:
        """The rows that became slower, or fail."""
        return tuple(line for line in self.lines if line.found in (SLOWER, FAILED))


def parse_threshold(text: str) -> float:
    """Return a threshold as a share: `5%` and `0.05` are both 0.05.

    Raises:
        SettingError: no number, negative, or of two meanings, as `5` is.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", text)
    if not found:
        raise SettingError(f"--fail-over is {text!r}: write 5% or 0.05.")
    value = float(found[1])
    if found[2]:
        return value / 100
    if value >= 1:
        raise SettingError(
            f"--fail-over {text.strip()} could mean {value:g} % or {value:g} times: write "
            f"{value:g}% or {value / 100:g}."
        )
    return value


def load(path: Path, version: int) -> Side:
    """Read a record that --out wrote.

    Args:
        path: the file.
        version: of the schema that this vmoe writes.

    Raises:
        VmoeError: it cannot be read, is no such record, of another schema, or without samples.
    """
    again = "Measure again: vmoe-bench BUNDLE --out FILE."
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise VmoeError(f"--compare {path}: {e.strerror}. {again}") from e
    except (ValueError, RecursionError) as e:
        raise VmoeError(f"--compare {path} is not JSON: {e}. {again}") from e
    if not isinstance(values, dict) or not {"schema_version", "rows"} <= set(values):
        raise VmoeError(f"--compare {path} is no record of vmoe-bench. {again}")
    if values["schema_version"] != version:
        raise VmoeError(
            f"--compare {path} has schema version {values['schema_version']}; this vmoe compares "
            f"{version}. {again}"
        )
    try:
        side = replace(of_json(values), path=path)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        why = f"key {e} is missing" if isinstance(e, KeyError) else str(e)
        raise VmoeError(f"--compare {path} is damaged: {why}. {again}") from e
    if not side.times_ms:
        raise VmoeError(
            f"--compare {path} has no samples, which alone say what is noise: --json and --csv "
            f"leave them out. {again}"
        )
    return side


def of_json(values: Mapping[str, Any]) -> Side:
    """Return what is compared of a record's JSON; rows without samples are left out."""
    times: dict[Key, Times] = {}
    failed: dict[Key, str] = {}
    cpu: dict[Key, float] = {}
    for row in values["rows"]:
        key = Key(**{name: row[name] for name in Key._fields})
        if row.get("why") is not None:
            failed[key] = str(row["why"])
        elif "samples_ms" in row:
            times[key] = np.asarray(row["samples_ms"]["wall"], np.float64)
            if times[key].ndim != 1 or not (np.isfinite(times[key]) & (times[key] > 0)).all():
                raise ValueError(f"the samples of {key} are no times")
            if row.get("cpu_ms") is not None:
                cpu[key] = float(row["cpu_ms"]["median"])
    times = {key: each for key, each in times.items() if len(each)}
    return Side(dict(values["context"]), times, failed, cpu)


def of_rows(context: Mapping[str, Any], rows: Iterable[Row]) -> Side:
    """Return what is compared of the rows of a run."""
    times: dict[Key, Times] = {}
    failed: dict[Key, str] = {}
    cpu: dict[Key, float] = {}
    for row in rows:
        key = Key(*(getattr(row, name) for name in Key._fields))
        if row.why is not None:
            failed[key] = row.why
        elif row.samples is not None:
            times[key] = row.samples.wall_ms
            cpu |= {} if row.cpu is None else {key: row.cpu.median}
    return Side(context, times, failed, cpu)


def check_common(old: Side, keys: Sequence[Key]) -> None:
    """Refuse a record that has nothing in common with what is about to be measured.

    Raises:
        VmoeError: names one row of each.
    """
    if keys and not set(keys) & set(old.times_ms):
        raise VmoeError(
            f"--compare {old.path} has no row of this run: it has {next(iter(old.times_ms))}, this "
            f"run {keys[0]}. Give the bundles and flags of its command."
        )


def compare(old: Side, new: Side, threshold: float, seed: int = 0) -> Comparison:
    """Compare a record with an older one.

    Args:
        old: the older one.
        new: this one.
        threshold: what a row may be slower by; 0.05 is 5 %.
        seed: of the bootstrap.
    """
    both = [key for key in new.times_ms if key in old.times_ms]
    broken = [key for key in new.failed if key in old.times_ms]
    z = NormalDist().inv_cdf(1 - (1 - LEVEL) / 2 / max(1, len(both)))
    rng = np.random.default_rng(seed)
    lines = [_line(key, old, new, threshold, z, rng) for key in both]
    lines += [Line(key, FAILED, float(np.median(old.times_ms[key]))) for key in broken]
    return Comparison(
        old=old.path,
        threshold=threshold,
        lines=tuple(lines),
        only_old=tuple(key for key in old.times_ms if key not in {*both, *broken}),
        only_new=tuple(key for key in new.times_ms if key not in old.times_ms),
        remarks=tuple(_remarks(old.context, new.context)),
    )


def _line(
    key: Key, old: Side, new: Side, threshold: float, z: float, rng: np.random.Generator
) -> Line:
    was, now = old.times_ms[key], new.times_ms[key]
    before, after = float(np.median(was)), float(np.median(now))
    ratio, minima = after / before, float(now.min() / was.min())
    cpu = new.cpu_ms[key] / old.cpu_ms[key] if old.cpu_ms.get(key) and key in new.cpu_ms else None
    if min(len(was), len(now)) < LEAST:
        return Line(key, FEW, before, after, ratio, minima=minima, cpu=cpu)
    half = z * math.hypot(standard_error(was, rng), standard_error(now, rng))
    low, high, most = ratio * math.exp(-half), ratio * math.exp(half), 1 + threshold
    found = SAME
    if ratio > most and low > 1:
        found = SLOWER if minima > most else UNCLEAR
    elif ratio < 1 / most and high < 1:
        found = FASTER if minima < 1 / most else UNCLEAR
    return Line(key, found, before, after, ratio, low, high, minima, cpu)


def standard_error(times: Times, rng: np.random.Generator) -> float:
    """Return the bootstrap's standard error of the logarithm of the median."""
    n, length = len(times), block_length(times)
    blocks = -(-n // length)
    offsets = np.arange(length)
    medians = []
    step = max(1, AT_ONCE // (blocks * length))
    for first in range(0, DRAWS, step):
        draws = min(step, DRAWS - first)
        begins = rng.integers(0, n, (draws, blocks, 1))
        drawn = ((begins + offsets) % n).reshape(draws, -1)[:, :n]
        medians.append(np.median(times[drawn], axis=1))
    return float(np.log(np.concatenate(medians)).std(ddof=1))


def block_length(times: Times) -> int:
    """Return how many calls a block has: twice the reach of their autocorrelation, at least 1.

    The reach is the last lag, from 1 on, up to which every autocorrelation exceeds 2 / sqrt(n); a
    block is at most a quarter of the calls.
    """
    centred = times - times.mean()
    n, power = len(times), float(centred @ centred)
    reach = 0
    while power > 0 and reach < n // 8:
        lag = reach + 1
        if float(centred[lag:] @ centred[:-lag]) / power <= 2 / math.sqrt(n):
            break
        reach = lag
    return max(1, 2 * reach)


def _remarks(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return in what the machines and versions differ, and which was busy."""
    said = []
    differ = [f"{name} {new.get(name)} (was {old.get(name)})" for name in MACHINE
              if new.get(name) != old.get(name)]  # fmt: skip
    if differ:
        said.append(f"the machines differ: {', '.join(differ)}: the ratios are theirs, too.")
    before, now = ({"python": c.get("python"), **c.get("versions", {})} for c in (old, new))
    changed = [
        f"{name} {now.get(name, 'none')} (was {before.get(name, 'none')})"
        for name in dict.fromkeys([*now, *before])
        if now.get(name) != before.get(name)
    ]
    if changed:
        said.append(f"the versions differ: {', '.join(changed)}.")
    for when, context in (("then", old), ("now", new)):
        load, cores = context.get("load_1min"), context.get("cores") or 1
        if load is not None and load > 0.7 * cores:
            said.append(
                f"load {load} on {cores} cores {when}: others were running; see minima and CPU."
            )
    return said


def to_table(made: Comparison) -> str:
    """Return the rows of both as a table."""
    columns = ["bundle", "form", "scenario", "old ms", "new ms", "new / old", "interval",
               "minima", "CPU", "found"]  # fmt: skip
    cells = []
    for line in made.lines:
        key = line.key
        span = None if line.low is None else f"{line.low:.4g}-{line.high:.4g}"
        scenario = ", ".join([key.scenario, *key.sizes(), key.backend])
        cells.append([key.bundle, key.form, scenario, line.old_ms, line.new_ms,
                      _ratio(line.ratio), span, _ratio(line.minima), _ratio(line.cpu),
                      line.found])  # fmt: skip
    return report.table(cells, columns)


def to_text(made: Comparison) -> str:
    """Return the table, and in words what it says."""
    over = f"{_percent(made.threshold)} and " if made.threshold else ""
    head = (
        f"Compared with {made.old}: medians of all calls, new over old; slower: above {over}noise"
    )
    return "\n".join([head, to_table(made), *notes(made)])


def to_markdown(made: Comparison) -> str:
    """Return the table, and in words what it says, as Markdown."""
    lines = "\n".join(f"* {line}" for line in notes(made))
    return f"`{made.old}`; medians of all calls.\n\n{to_table(made)}\n\n{lines}"


def notes(made: Comparison) -> list[str]:
    """Return in words what differs beside the times, which rows stand alone, and the result."""
    lines = list(made.remarks)
    for what, keys in (("only in the old one", made.only_old), ("only in this one", made.only_new)):
        if keys:
            lines.append(f"{what}: {_listed(keys)}.")
    return [*lines, summary(made)]


def _listed(keys: Sequence[Key]) -> str:
    """Return rows by what they are of: `b single onnxruntime: free, route 0; ...`."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        where = " ".join([key.bundle, key.scenario, *key.sizes(), key.backend])
        groups.setdefault(where, []).append(key.form)
    return "; ".join(f"{where}: {', '.join(forms)}" for where, forms in groups.items())


def summary(made: Comparison) -> str:
    """Return in one line how many rows became slower, and the worst of them."""
    found = made.regressions
    over = f"by more than {_percent(made.threshold)}" if made.threshold else "beyond noise"
    counts = Counter(line.found for line in made.lines)
    aside = f"; {counts[UNCLEAR]} unclear: the minima disagree, measure alone" * bool(
        counts[UNCLEAR]
    )
    aside += f"; {counts[FEW]} not judged: fewer than {LEAST} calls" * bool(counts[FEW])
    if not found:
        return f"none of {len(made.lines)} rows is slower {over}{aside}."
    worst = max(found, key=lambda line: math.inf if line.ratio is None else line.ratio)
    how = "fails now" if worst.ratio is None else (
        f"{worst.ratio:.4g} ({worst.low:.4g}-{worst.high:.4g})"
    )  # fmt: skip
    rows = f"{len(found)} of {len(made.lines)} rows {'is' if len(found) == 1 else 'are'} slower"
    return f"{rows} {over}; the worst: {worst.key}: {how}{aside}."


def to_json(made: Comparison) -> dict[str, Any]:
    """Return it as schema.json has it."""
    return {
        "old": str(made.old),
        "threshold": made.threshold,
        "rows": [
            {**line.key._asdict(), "old_ms": line.old_ms, "new_ms": line.new_ms,
             "ratio": line.ratio, "low": line.low, "high": line.high, "minima": line.minima,
             "cpu": line.cpu, "found": line.found}
            for line in made.lines
        ],
        "only_old": [key._asdict() for key in made.only_old],
        "only_new": [key._asdict() for key in made.only_new],
        "remarks": list(made.remarks),
    }  # fmt: skip


def _ratio(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
