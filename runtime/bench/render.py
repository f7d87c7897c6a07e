"""A record as people read it: text, Markdown, CSV.

One line for each bundle as it is used (routed freely), with accuracy and energy beside its speed;
then a table for each bundle and scenario, form by form, with the baselines below.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vmoe import report

from . import accuracy, compare, energy, forms
from . import context as contexts
from .accuracy import Share
from .certificate import Certificate
from .record import About, Record, Row
from .scenarios import MULTI, STREAM
from .statistics import Ratio, Summary
from .verdicts import Verdict

MEDIAN = "50"  # the percentile that has a column of its own
SIZES = ("batch", "streams", "threads")


@dataclass(frozen=True)
class Table:
    """A table with its title."""

    title: str
    text: str


def text(made: Record) -> str:
    """Return a summary block for each bundle, the tables and the verdicts."""
    blocks = [block for about in made.bundles if (block := _block(about, made.rows))]
    parts = [*blocks, *(f"{table.title}\n{table.text}" for table in tables(made))]
    if made.comparison is not None:
        parts.append(compare.to_text(made.comparison))
    return "\n\n".join([*parts, _remarks(made)])


def markdown(made: Record) -> str:
    """Return the tables and the verdicts with where they were measured."""
    head = f"# vmoe-bench\n\n`{made.command}`\n\n{contexts.line(made.context)}"
    parts = [f"{head}; {made.context['when']}"]
    parts += [f"## {table.title}\n\n{table.text}" for table in tables(made)]
    if made.comparison is not None:
        parts.append(f"## Against an older record\n\n{compare.to_markdown(made.comparison)}")
    lines = "\n".join(f"* {line}" for line in _remarks(made).splitlines())
    return "\n\n".join([*parts, "## What it says", lines]) + "\n"


def csv(made: Record) -> str:
    """Return the rows as CSV, with the columns of the JSON's rows."""
    return report.to_csv([_flat(row) for row in made.rows])


def said(verdicts: Sequence[Verdict]) -> str:
    """Return the verdicts, one a line."""
    return "\n".join(
        f"{verdict.name}: {verdict.bundle + ': ' if verdict.bundle else ''}{verdict.says}"
        for verdict in verdicts
    )


def table(made: Record) -> str:
    """Return all tables, each below its title, as Markdown."""
    return "\n\n".join(f"{each.title}\n\n{each.text}" for each in tables(made))


def tables(made: Record) -> list[Table]:
    """Return the table of what is used, and one for each bundle and scenario."""
    scenarios = list(dict.fromkeys(row.scenario for row in made.rows))
    detailed = []
    for about in made.bundles:
        for scenario in scenarios:
            rows = [
                row for row in made.rows if (row.bundle, row.scenario) == (about.name, scenario)
            ]
            if rows and not about.baseline:
                detailed.append(_detailed(made, about, scenario, rows))
    return [_overview(made), *detailed]


# ---- what is used: one line for each bundle


def _overview(made: Record) -> Table:
    """Return the rows that are routed freely, with accuracy and energy where they were measured."""
    rows = [row for row in made.rows if row.form == forms.FREE]
    differ = [*_differ(rows, ("scenario", *SIZES, "backend"))]
    high = _percentiles(made)[-1:]
    budgets = list(dict.fromkeys(accuracy.budget(r) for row in rows for r in _robust(row)))
    clean = any(row.accuracy is not None and _clean(row) is not None for row in rows)
    drawn = any(row.energy is not None for row in rows)
    columns = ["bundle", *differ, "median ms", *(f"p{p} ms" for p in high), "clips/s",
               *["clean %"] * clean, *(f"robust % {budget}" for budget in budgets),
               *["mJ/clip", "above idle", "W"] * drawn,
               *["why"] * _any_failed(rows)]  # fmt: skip
    cells: list[list[object]] = []
    for row in rows:
        robust = {accuracy.budget(r): r.right for r in _robust(row)}
        cells.append([
            row.bundle,
            *(getattr(row, name) for name in differ),
            *_of(row.wall, lambda wall: [wall.median, *(wall.percentiles[p] for p in high)],
                 1 + len(high)),
            _fixed(row.clips_per_s),
            *[_percent(_clean(row))] * clean,
            *(_percent(robust.get(budget)) for budget in budgets),
            *(_drawn(row) if drawn else []),
            *[row.why] * _any_failed(rows),
        ])  # fmt: skip
    return Table(_named("As used, routed freely", rows), report.table(cells, columns))


def _robust(row: Row) -> tuple[accuracy.Robust, ...]:
    return () if row.accuracy is None else row.accuracy.robust


def _clean(row: Row) -> Share | None:
    """Return accuracy on clean clips: of --accuracy, else of those that were attacked."""
    if row.accuracy is None:
        return None
    found = row.accuracy.clean
    return row.accuracy.saved_clean if found is None else found.right


def _percent(share: Share | None) -> str | None:
    return None if share is None else report.percent(share.hits, share.n)


def _drawn(row: Row) -> list[object]:
    """Return millijoules of a clip, those above idling, and watts."""
    found = row.energy
    if found is None:
        return [None] * 3
    each, above = 1000 * found.joules_per_clip, 1000 * found.joules_per_clip_above_idle
    return [each, above, found.watts]


# ---- one bundle in one scenario


def _detailed(made: Record, about: About, scenario: str, rows: Sequence[Row]) -> Table:
    """Return a bundle's forms, and the baselines of the same clips below them."""
    baselines = [
        row
        for other in made.bundles
        if other.baseline and other.clip == about.clip
        for row in made.rows
        if (row.bundle, row.scenario) == (other.name, scenario)
    ]
    title = _named(f"{about.name}: {scenario}", [*rows, *baselines])
    if scenario == STREAM:
        return Table(f"{title}, from capture to label", _streamed(made, about, rows, baselines))
    return Table(title, _called(made, about, rows, baselines))


def _called(made: Record, about: About, rows: Sequence[Row], baselines: Sequence[Row]) -> str:
    """Return calls; the last columns are the certificate.

    `/ alone` is over router alone + expert alone, `/ dense` over the dense counterpart in the same
    lowering, and each other baseline has a column of its own.
    """
    own = [made for made in made.certificates if made.bundle == about.name]
    certified = [c for c in own if c.scenario == rows[0].scenario]
    others = sorted({a.baseline for c in certified for a in c.against if not a.dense})
    dense = any(a.dense and a.same_lowering for c in certified for a in c.against)
    alone = any(r.ratio is not None for c in certified for r in c.routes)
    every = [*_with_worst(made, rows), *baselines]
    differ, percentiles = _differ(every, _sizes(every)), _percentiles(made)
    drawn = any(row.energy is not None for row in every)
    columns = ["form", *differ, "min ms", "median ms", *(f"p{p} ms" for p in percentiles),
               "CPU ms", "CV %", "clips/s", *["/ alone"] * alone, *["/ dense"] * dense,
               *(f"/ {name}" for name in others), *["mJ/clip"] * drawn,
               *["why"] * _any_failed(every)]  # fmt: skip
    cells = []
    for row in every:
        ratios = _ratios(made, row)
        cells.append([
            _form(row, about),
            *(getattr(row, name) for name in differ),
            *_times(row, percentiles),
            *[ratios.get("/ alone")] * alone,
            *[ratios.get("/ dense")] * dense,
            *(ratios.get(name) for name in others),
            *_drawn(row)[:1] * drawn,
            *[row.why] * _any_failed(every),
        ])  # fmt: skip
    return report.table(cells, columns)


def _streamed(made: Record, about: About, rows: Sequence[Row], baselines: Sequence[Row]) -> str:
    """Return streams: how old a label is, and what was lost."""
    every = [*rows, *baselines]
    percentiles = _percentiles(made)
    columns = ["form", "streams", "threads", "windows/s", "median ms",
               *(f"p{p} ms" for p in percentiles), "windows", "dropped", "incomplete",
               "frames dropped", *["why"] * _any_failed(every)]  # fmt: skip
    cells: list[list[object]] = []
    for row in every:
        counts = row.stream
        cells.append([
            _form(row, about),
            row.streams,
            row.threads,
            _fixed(row.clips_per_s),
            *_of(row.wall, lambda w: [w.median, *(w.percentiles[p] for p in percentiles)],
                 1 + len(percentiles)),
            *([None] * 4 if counts is None else [
                counts.windows, counts.windows_dropped, counts.windows_incomplete,
                f"{counts.frames_dropped} of {counts.frames}",
            ]),
            *[row.why] * _any_failed(every),
        ])  # fmt: skip
    return report.table(cells, columns)


def _form(row: Row, about: About) -> str:
    """Return what a row is; of a baseline, its name."""
    return row.form if row.bundle == about.name else row.bundle


def _times(row: Row, percentiles: Sequence[str]) -> list[object]:
    wall = row.wall
    if wall is None:
        return [None] * (5 + len(percentiles))
    return [
        wall.min,
        wall.median,
        *(wall.percentiles[p] for p in percentiles),
        row.cpu and row.cpu.median,
        f"{100 * wall.cv:.1f}",
        _fixed(row.clips_per_s),
    ]


def _with_worst(made: Record, own: Sequence[Row]) -> list[Row]:
    """Return the rows, and after the routes of a certificate the slowest of them once more."""
    rows: list[Row] = []
    for row in own:
        rows.append(row)
        found = _certificate(made.certificates, row)
        if found and found.worst is not None and row.form == forms.route(found.routes[-1].route):
            slowest = forms.route(found.worst)
            worst = next(r for r in own if r.form == slowest and _beside(r, row))
            rows.append(replace(worst, form=forms.WORST))
    return rows


def _beside(one: Row, other: Row) -> bool:
    """Return whether two rows of a bundle and scenario differ in their form only."""
    return all(getattr(one, key) == getattr(other, key) for key in SIZES)


def _certificate(certificates: Sequence[Certificate], row: Row) -> Certificate | None:
    """Return the certificate that a row is part of."""
    key = (row.bundle, row.scenario, row.batch, row.threads)
    return next(
        (c for c in certificates if (c.bundle, c.scenario, c.batch, c.threads) == key), None
    )


def _ratios(made: Record, row: Row) -> dict[str, str | None]:
    """Return a route's ratios, by their column."""
    found = _certificate(made.certificates, row)
    names = [forms.route(r.route) for r in found.routes] if found else []
    form = row.form
    if found and found.worst is not None and form == forms.WORST:
        form = forms.route(found.worst)
    if found is None or form not in names:
        return {}
    at = names.index(form)
    dense = next((a.ratios[at] for a in found.against if a.dense and a.same_lowering), None)
    against = {a.baseline: _medians(a.ratios[at]) for a in found.against}
    return {**against, "/ alone": _medians(found.routes[at].ratio), "/ dense": _medians(dense)}


# ---- what tables share


def _named(what: str, rows: Sequence[Row]) -> str:
    """Return a title with the sizes that all rows share, where they say something."""
    shared = [name for name in _sizes(rows) if len({getattr(row, name) for row in rows}) == 1]
    sizes = [
        f"{name} {value}" for name in shared if (value := getattr(rows[0], name)) not in (1, None)
    ]
    return ", ".join([what, *sizes])


def _sizes(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return what sizes say something: a query of multi has one clip of each stream."""
    return SIZES[1:] if {row.scenario for row in rows} == {MULTI} else SIZES


def _differ(rows: Sequence[Row], names: Iterable[str]) -> list[str]:
    """Return what is not one and the same in all rows: it has a column."""
    return [name for name in names if len({getattr(row, name) for row in rows}) > 1]


def _percentiles(made: Record) -> list[str]:
    return [f"{p:g}" for p in made.settings["percentile"] if f"{p:g}" != MEDIAN]


def _any_failed(rows: Sequence[Row]) -> bool:
    return any(row.why is not None for row in rows)


def _of(wall: Summary | None, cells: Any, n: int) -> list[object]:
    return [None] * n if wall is None else list(cells(wall))


def _fixed(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"


def _medians(ratio: Ratio | None) -> str | None:
    return None if ratio is None else f"{ratio.medians:.2f}"


def _remarks(made: Record) -> str:
    return "\n".join([said(made.verdicts), energy.line(made.energy)]).strip()


# ---- the block, and the flat rows


def _block(about: About, rows: Sequence[Row]) -> str:
    """Return what trtexec's users look for, of free routing; empty where nothing was measured."""
    free = [row for row in rows if (row.bundle, row.form) == (about.name, forms.FREE)]
    measured = [(row, row.wall, row.cpu) for row in free if row.wall is not None]
    return "" if not measured else _summary(about, *measured[0])


def _summary(about: About, row: Row, wall: Summary, cpu: Summary | None) -> str:
    percentiles = [(p, ms) for p, ms in wall.percentiles.items() if p != MEDIAN]
    high = "".join(f", percentile({p}%) = {ms:.4g} ms" for p, ms in percentiles)
    clip = "x".join(str(size) for size in about.clip[:3])
    lines = [
        f"=== Performance summary: {about.name} ({about.lowering}, {about.backend}, "
        f"{about.precision}) ===",
        f"Clips: {clip}, {row.batch} in a call; {wall.n} measured, scenario {row.scenario}",
        f"Throughput: {row.clips_per_s:.4g} clips/s",
        f"Latency: min = {wall.min:.4g} ms, max = {wall.max:.4g} ms, mean = {wall.mean:.4g} ms, "
        f"median = {wall.median:.4g} ms{high}",
        f"Coefficient of variation: {wall.cv:.1%}",
    ]
    if cpu is not None:
        lines.insert(-1, f"CPU time: min = {cpu.min:.4g} ms, median = {cpu.median:.4g} ms")
    if about.experts > 1 and about.routes:
        lines.append(f"Routes of the {sum(about.routes)} clips: {_shares(about.routes)}")
    return "\n".join([*lines, *_judged(row), *_energy(row)])


def _judged(row: Row) -> list[str]:
    """Return accuracy, and where the clips were routed, as lines of a block."""
    found, lines = row.accuracy, []
    if found is None:
        return []
    if found.clean is not None:
        routes = _shares(found.clean.routes)
        right = _interval(found.clean.right)
        lines.append(f"Accuracy: {right} of {found.clean.data}; routes {routes}")
    for each in found.robust:
        attacks = ", ".join(each.attacks)
        lines.append(
            f"Robust accuracy, eps {accuracy.budget(each)}: {_interval(each.right)} under "
            f"{attacks}, {each.made}; routes {_shares(each.routes)}"
        )
    if found.robust and found.saved_clean is not None:
        lines.append(f"Accuracy on the same clips, clean: {_interval(found.saved_clean)}")
    return lines


def _interval(share: Share) -> str:
    return f"{report.percent(share.hits, share.n)} % of {share.n} clips"


def _energy(row: Row) -> list[str]:
    found = row.energy
    if found is None:
        return []
    return [
        f"Energy: {found.joules_per_clip:.4g} J/clip ({found.low:.4g}-{found.high:.4g}), "
        f"{found.joules_per_clip_above_idle:.4g} above idle; {found.watts:.4g} W, "
        f"{found.watts_above_idle:.4g} above idle"
    ]


def _shares(routes: Sequence[int]) -> str:
    """Return how many clips each expert answered, as `0: 3, 1: 47`."""
    return ", ".join(f"{i}: {n}" for i, n in enumerate(routes))


def _flat(row: Row) -> dict[str, Any]:
    values = row.to_json()
    wall, cpu = row.wall, row.cpu
    names = ("bundle", "form", "scenario", "batch", "streams", "threads", "backend")
    return {
        **{name: values[name] for name in names},
        **({} if wall is None else _columns(wall)),
        "cpu_min_ms": cpu and cpu.min,
        "cpu_median_ms": cpu and cpu.median,
        "clips_per_s": row.clips_per_s,
        **(values["stream"] or {}),
        **_flat_shares(row),
        **({} if row.energy is None else {
            "joules_per_clip": row.energy.joules_per_clip,
            "joules_per_clip_above_idle": row.energy.joules_per_clip_above_idle,
            "watts": row.energy.watts,
        }),
        "why": row.why,
    }  # fmt: skip


def _flat_shares(row: Row) -> dict[str, Any]:
    """Return accuracies, each as its share, clips and interval."""
    shares = {"clean": _clean(row)} | {
        f"robust {accuracy.budget(each)}": each.right for each in _robust(row)
    }
    return {
        name + end: value
        for name, share in shares.items()
        if share is not None
        for end, value in (("", share.share), (" n", share.n), (" low", share.low),
                           (" high", share.high))
    }  # fmt: skip


def _columns(wall: Summary) -> dict[str, Any]:
    return {
        "n": wall.n,
        "min_ms": wall.min,
        "mean_ms": wall.mean,
        "median_ms": wall.median,
        **{f"p{p}_ms": ms for p, ms in wall.percentiles.items()},
        "max_ms": wall.max,
        "cv": wall.cv,
    }
