"""A record as people read it: text, Markdown, CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vmoe import report

from . import context as contexts
from . import forms
from .certificate import Certificate
from .record import About, Record, Row
from .statistics import Ratio, Summary
from .verdicts import Verdict

MEDIAN = "50"  # the percentile that has a column of its own


def text(made: Record) -> str:
    """Return a summary block for each bundle, the table and the verdicts."""
    blocks = [block for about in made.bundles if (block := _block(about, made.rows))]
    return "\n\n".join([*blocks, table(made), said(made.verdicts)])


def markdown(made: Record) -> str:
    """Return the table and the verdicts with where they were measured."""
    lines = "\n".join(f"* {line}" for line in said(made.verdicts).splitlines())
    head = f"# vmoe-bench\n\n`{made.command}`\n\n{contexts.line(made.context)}"
    return f"{head}; {made.context['when']}\n\n{table(made)}\n\n{lines}\n"


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
    """Return one table of all rows; the last columns are the certificate.

    `/ alone` is over router alone + expert alone, `/ dense` over the dense counterpart in the
    same lowering, and each other baseline has a column of its own. What is one and the same in
    all rows has no column.
    """
    certificates = made.certificates
    percentiles = [f"{p:g}" for p in made.settings["percentile"] if f"{p:g}" != MEDIAN]
    others = sorted({a.baseline for c in certificates for a in c.against if not a.dense})
    differ = [
        name
        for name in ("scenario", "batch", "streams", "threads")
        if len({getattr(row, name) for row in made.rows}) > 1
    ]
    failed = [row for row in made.rows if row.why is not None]
    dropped = any(row.stream is not None for row in made.rows)
    columns = ["bundle", "form", *differ, "min ms", "median ms", *(f"p{p} ms" for p in percentiles),
               "CPU ms", "CV %", "clips/s", *["dropped"] * dropped, "/ alone", "/ dense",
               *(f"/ {name}" for name in others), *["why"] * bool(failed)]  # fmt: skip
    cells = []
    for row in _with_worst(made):
        drops = [row.stream and row.stream.windows_dropped + row.stream.frames_dropped]
        cells.append([
            row.bundle,
            row.form,
            *(getattr(row, name) for name in differ),
            *_times(row, percentiles),
            *drops * dropped,
            *_ratios(made, row, others),
            *[row.why] * bool(failed),
        ])  # fmt: skip
    return report.table(cells, columns)


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
        f"{row.clips_per_s:.1f}",
    ]


def _with_worst(made: Record) -> list[Row]:
    """Return the rows, and after the routes of a certificate the slowest of them once more."""
    rows: list[Row] = []
    for row in made.rows:
        rows.append(row)
        found = _certificate(made.certificates, row)
        if found and found.worst is not None and row.form == forms.route(found.routes[-1].route):
            slowest = forms.route(found.worst)
            worst = next(r for r in made.rows if r.form == slowest and _beside(r, row))
            rows.append(replace(worst, form=forms.WORST))
    return rows


def _beside(one: Row, other: Row) -> bool:
    """Return whether two rows differ in their form only."""
    keys = ("bundle", "scenario", "batch", "streams", "threads")
    return all(getattr(one, key) == getattr(other, key) for key in keys)


def _certificate(certificates: Sequence[Certificate], row: Row) -> Certificate | None:
    """Return the certificate that a row is part of."""
    return next(
        (
            made
            for made in certificates
            if made.bundle == row.bundle
            and (made.scenario, made.batch, made.threads) == (row.scenario, row.batch, row.threads)
        ),
        None,
    )


def _ratios(made: Record, row: Row, others: Sequence[str]) -> list[object]:
    found = _certificate(made.certificates, row)
    names = [forms.route(r.route) for r in found.routes] if found else []
    form = row.form
    if found and found.worst is not None and form == forms.WORST:
        form = forms.route(found.worst)
    if found is None or form not in names:
        return [None] * (2 + len(others))
    at = names.index(form)
    alone = found.routes[at].ratio
    dense = next((a.ratios[at] for a in found.against if a.dense and a.same_lowering), None)
    against = {a.baseline: a.ratios[at] for a in found.against}
    return [_medians(r) for r in (alone, dense, *(against.get(name) for name in others))]


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
        shares = ", ".join(f"{i}: {n}" for i, n in enumerate(about.routes))
        lines.append(f"Routes of the {sum(about.routes)} clips: {shares}")
    return "\n".join(lines)


def _flat(row: Row) -> dict[str, Any]:
    values = row.to_json()
    wall, cpu = row.wall, row.cpu
    return {
        **{name: values[name] for name in ("bundle", "form", "scenario", "batch", "streams",
                                           "threads", "backend")},
        **({} if wall is None else _columns(wall)),
        "cpu_min_ms": cpu and cpu.min,
        "cpu_median_ms": cpu and cpu.median,
        "clips_per_s": row.clips_per_s,
        **(values["stream"] or {}),
        "why": row.why,
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


def _medians(ratio: Ratio | None) -> str | None:
    return None if ratio is None else f"{ratio.medians:.2f}"
