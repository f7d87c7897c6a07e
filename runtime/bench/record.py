"""The whole run as one record: JSON (schema.json), text, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vmoe import report

from . import context as contexts
from . import forms
from .certificate import Certificate
from .measuring import Samples
from .statistics import Ratio, Summary, summarise
from .verdicts import Verdict

SCHEMA_VERSION = 1
MEDIAN = "50"  # the percentile that has a column of its own


@dataclass(frozen=True)
class Row:
    """One form of one bundle.

    Attributes:
        bundle, form: their names.
        clips: of one call.
        wall, cpu: times of a call in ms: on the clock, and of all threads of the process.
        samples: every call's.
    """

    bundle: str
    form: str
    clips: int
    wall: Summary
    cpu: Summary
    samples: Samples

    @property
    def clips_per_s(self) -> float:
        """Clips answered per second, calls one after another."""
        return self.clips * 1000 / self.wall.mean


@dataclass(frozen=True)
class About:
    """What a bundle is, and where its clips were routed.

    Attributes:
        name, path, lowering, precision, backend: as print has them.
        experts: how many.
        clip: shape of one clip, [T, H, W, 3].
        baseline: it was given as --baseline.
        weights: trained, or random: it serves latency only.
        twin: sha256 of the twin.
        routes: how many of the clips each expert answered when they were routed freely.
    """

    name: str
    path: str
    lowering: str
    precision: str
    backend: str
    experts: int
    clip: tuple[int, ...]
    baseline: bool
    weights: str
    twin: str | None
    routes: tuple[int, ...]


@dataclass(frozen=True)
class Record:
    """What one run of vmoe-bench found."""

    command: str
    context: dict[str, Any]
    settings: dict[str, Any]
    bundles: tuple[About, ...]
    rows: tuple[Row, ...]
    certificates: tuple[Certificate, ...]
    verdicts: tuple[Verdict, ...]

    def to_json(self, *, samples: bool = False) -> dict[str, Any]:
        """Return the record as schema.json has it; `samples` adds every call's times."""
        return {
            "schema_version": SCHEMA_VERSION,
            "command": self.command,
            "context": self.context,
            "settings": self.settings,
            "bundles": [report.plain(asdict(about)) for about in self.bundles],
            "rows": [_row_to_json(row, samples=samples) for row in self.rows],
            "certificates": [report.plain(asdict(made)) for made in self.certificates],
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
        }

    def to_text(self) -> str:
        """Return a summary block for each bundle, the table and the verdicts."""
        blocks = [_block(about, self.rows) for about in self.bundles]
        return "\n\n".join([*blocks, self.to_table(), self._verdict_lines()])

    def to_markdown(self) -> str:
        """Return the table and the verdicts with where they were measured."""
        said = "\n".join(f"* {line}" for line in self._verdict_lines().splitlines())
        head = f"# vmoe-bench\n\n`{self.command}`\n\n{contexts.line(self.context)}"
        return f"{head}; {self.context['when']}\n\n{self.to_table()}\n\n{said}\n"

    def to_table(self) -> str:
        """Return one table of all rows; the last columns are the certificate.

        `/ alone` is over router alone + expert alone, `/ dense` over the dense counterpart in the
        same lowering, and each other baseline has a column of its own.
        """
        percentiles = [p for p in self.rows[0].wall.percentiles if p != MEDIAN]
        others = sorted({a.baseline for c in self.certificates for a in c.against if not a.dense})
        columns = ["bundle", "form", "min ms", "median ms", *(f"p{p} ms" for p in percentiles),
                   "CPU ms", "CV %", "clips/s", "/ alone", "/ dense",
                   *(f"/ {name}" for name in others)]  # fmt: skip
        cells = [self._cells(row, percentiles, others) for row in self._with_worst()]
        return report.table(cells, columns)

    def to_csv(self) -> str:
        """Return the rows as CSV, with the columns of the JSON's rows."""
        text = io.StringIO()
        flat = [_flat(row) for row in self.rows]
        writer = csv.DictWriter(text, fieldnames=list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        return text.getvalue()

    def _with_worst(self) -> list[Row]:
        """Return the rows, and after a bundle's routes the slowest of them once more."""
        rows: list[Row] = []
        for about in self.bundles:
            own = {row.form: row for row in self.rows if row.bundle == about.name}
            made = self._certificate(about.name)
            for form, row in own.items():
                rows.append(row)
                if made and made.worst is not None and form == forms.route(made.routes[-1].route):
                    rows.append(replace(own[forms.route(made.worst)], form=forms.WORST))
        return rows

    def _certificate(self, bundle: str) -> Certificate | None:
        return next((made for made in self.certificates if made.bundle == bundle), None)

    def _cells(self, row: Row, percentiles: Sequence[str], others: Sequence[str]) -> list[object]:
        wall = row.wall
        return [
            row.bundle,
            row.form,
            wall.min,
            wall.median,
            *(wall.percentiles[p] for p in percentiles),
            row.cpu.median,
            f"{100 * wall.cv:.1f}",
            f"{row.clips_per_s:.1f}",
            *self._ratios(row, others),
        ]

    def _ratios(self, row: Row, others: Sequence[str]) -> list[object]:
        made = self._certificate(row.bundle)
        names = [forms.route(r.route) for r in made.routes] if made else []
        form = row.form
        if made and made.worst is not None and form == forms.WORST:
            form = forms.route(made.worst)
        if made is None or form not in names:
            return [None] * (2 + len(others))
        at = names.index(form)
        alone = made.routes[at].ratio
        dense = next((a.ratios[at] for a in made.against if a.dense and a.same_lowering), None)
        against = {a.baseline: a.ratios[at] for a in made.against}
        return [_medians(r) for r in (alone, dense, *(against.get(name) for name in others))]

    def _verdict_lines(self) -> str:
        return "\n".join(
            f"{verdict.name}: {verdict.bundle + ': ' if verdict.bundle else ''}{verdict.says}"
            for verdict in self.verdicts
        )


def rows(
    made: Sequence[forms.Form],
    samples: Sequence[Samples],
    clips: int,
    percentiles: Sequence[float],
) -> tuple[Row, ...]:
    """Return a row for each form, in order."""
    return tuple(
        Row(
            bundle=form.subject,
            form=form.name,
            clips=clips,
            wall=summarise(took.wall_ms, percentiles),
            cpu=summarise(took.cpu_ms, percentiles),
            samples=took,
        )
        for form, took in zip(made, samples, strict=True)
    )


def _block(about: About, rows: Sequence[Row]) -> str:
    """Return what trtexec's users look for, of free routing."""
    row = next(row for row in rows if (row.bundle, row.form) == (about.name, forms.FREE))
    wall = row.wall
    percentiles = [(p, ms) for p, ms in wall.percentiles.items() if p != MEDIAN]
    high = "".join(f", percentile({p}%) = {ms:.4g} ms" for p, ms in percentiles)
    clip = "x".join(str(size) for size in about.clip[:3])
    lines = [
        f"=== Performance summary: {about.name} ({about.lowering}, {about.backend}, "
        f"{about.precision}) ===",
        f"Clips: {clip}, {row.clips} in a call; {wall.n} calls of each form, interleaved",
        f"Throughput: {row.clips_per_s:.4g} clips/s",
        f"Latency: min = {wall.min:.4g} ms, max = {wall.max:.4g} ms, mean = {wall.mean:.4g} ms, "
        f"median = {wall.median:.4g} ms{high}",
        f"CPU time: min = {row.cpu.min:.4g} ms, median = {row.cpu.median:.4g} ms",
        f"Coefficient of variation: {wall.cv:.1%}",
    ]
    if about.experts > 1:
        shares = ", ".join(f"{i}: {n}" for i, n in enumerate(about.routes))
        lines.append(f"Routes of the {sum(about.routes)} clips: {shares}")
    return "\n".join(lines)


def _row_to_json(row: Row, *, samples: bool) -> dict[str, Any]:
    values: dict[str, Any] = {
        "bundle": row.bundle,
        "form": row.form,
        "clips": row.clips,
        "clips_per_s": row.clips_per_s,
        "latency_ms": asdict(row.wall),
        "cpu_ms": asdict(row.cpu),
    }
    if samples:
        values["samples_ms"] = {
            "wall": report.plain(row.samples.wall_ms),
            "cpu": report.plain(row.samples.cpu_ms),
        }
    return values


def _flat(row: Row) -> dict[str, Any]:
    wall, cpu = row.wall, row.cpu
    return {
        "bundle": row.bundle,
        "form": row.form,
        "clips": row.clips,
        "n": wall.n,
        "min_ms": wall.min,
        "mean_ms": wall.mean,
        "median_ms": wall.median,
        **{f"p{p}_ms": ms for p, ms in wall.percentiles.items()},
        "max_ms": wall.max,
        "cv": wall.cv,
        "cpu_min_ms": cpu.min,
        "cpu_median_ms": cpu.median,
        "clips_per_s": row.clips_per_s,
    }


def _medians(ratio: Ratio | None) -> str | None:
    return None if ratio is None else f"{ratio.medians:.2f}"
