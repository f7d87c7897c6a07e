"""What a command reports: tables that are text and Markdown at once, intervals, plain JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Z_95 = 1.959963984540054  # the normal distribution's 97.5 % point


def table(rows: Sequence[Sequence[object]], columns: Sequence[str]) -> str:
    """Return a table, aligned for a terminal and valid Markdown.

    Args:
        rows: one value for each column; None is shown as `-`, a float with four digits.
        columns: the titles. A column that holds only numbers and `-` is aligned to the right.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(3, *(len(line[i]) for line in [list(columns), *cells])) for i in _over(columns)]
    right = [_numeric([line[i] for line in cells]) for i in _over(columns)]
    rule = [("-" * (width - r)) + ":" * r for width, r in zip(widths, right, strict=True)]

    def line(values: Sequence[str]) -> str:
        fitted = (
            value.rjust(width) if to_right else value.ljust(width)
            for value, width, to_right in zip(values, widths, right, strict=True)
        )
        return f"| {' | '.join(fitted)} |"

    return "\n".join([line(columns), line(rule), *(line(row) for row in cells)])


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, in [0, 1]; all of [0, 1] where n is 0.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = hits / n, Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # at the ends exactly, which rounding misses
    return 0.0 if hits == 0 else centre - half, 1.0 if hits == n else centre + half


def percent(hits: int, n: int, *, interval: bool = True) -> str:
    """Return a share of n in per cent, with its 95 % interval: `83.5 (77.8-88.0)`."""
    if n == 0:
        return "-"
    low, high = wilson(hits, n)
    share = f"{100 * hits / n:.1f}"
    return f"{share} ({100 * low:.1f}-{100 * high:.1f})" if interval else share


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: arrays as lists, paths as text, NaN and inf as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(member) for member in value]
    if hasattr(value, "tolist"):  # an array or a number of numpy, which need not be loaded
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON text; NaN, which JSON does not know, as null."""
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV, with the columns of all of them; None is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain(row) for row in rows)
    return text.getvalue()


def _over(columns: Sequence[str]) -> range:
    return range(len(columns))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return f"{float(value):.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _numeric(cells: Sequence[str]) -> bool:
    """Return whether every cell starts with a digit, or is `-`: `83.5 (77.8-88.0)` is a number."""
    starts = [cell.lstrip("+-.")[:1] for cell in cells if cell != "-"]
    return bool(starts) and all(start.isdigit() for start in starts)
