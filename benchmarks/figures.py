"""What the benchmarks have in common: figures, one JSON line each, and the committed results."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from vmoe import output, report
from vmoe.errors import SettingError
from vmoe.runtime.bench import context as contexts

ROOT = Path(__file__).parent.parent
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Figure:
    """One figure that an issue names.

    Attributes:
        figure: its name.
        value: what was measured; None where it cannot be measured here.
        unit: of value, reach and spread: ratio, s, share, count.
        reach: what is to be reached.
        better: lower or higher.
        n: how many samples stand behind the value.
        spread: half of the range in which it lies, as `more` or the benchmark's docstring says.
        why: why there is no value.
        more: what else was measured of it, such as the ratio of the minima.
    """

    figure: str
    value: float | None
    unit: str
    reach: float
    better: str = "lower"
    n: int = 1
    spread: float | None = None
    why: str | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool | None:
        """Whether the figure is reached; None where there is no value."""
        if self.value is None:
            return None
        return self.value <= self.reach if self.better == "lower" else self.value >= self.reach

    def to_json(self) -> dict[str, Any]:
        """Return the figure as one flat object, numbers with six digits."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        more = values.pop("more")
        shown = {"ok": self.ok, **more}
        if self.why is None:
            values.pop("why")
        return {key: _short(value) for key, value in {**values, **shown}.items()}


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as one table."""
    columns = ["figure", "value", "reach", "unit", "ok", "n", "spread", "more"]
    rows = [
        [f.figure, f.value, f"{'<=' if f.better == 'lower' else '>='} {f.reach:g}", f.unit,
         {True: "yes", False: "NO", None: None}[f.ok], f.n if f.value is not None else None,
         f.spread, f.why or ", ".join(f"{k} {_short(v)}" for k, v in f.more.items())]
        for f in figures
    ]  # fmt: skip
    return report.table(rows, columns)


def say(figures: Sequence[Figure], *, as_json: bool) -> None:
    """Print the figures on stdout: a table, or one JSON object a line."""
    if not figures:
        return
    if as_json:
        for figure in figures:
            click.echo(json.dumps(figure.to_json()))
    else:
        click.echo(table(figures))


def result_options(function: F) -> F:
    """Add --out, --overwrite and --json to a benchmark's command."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="One JSON object a figure on stdout."),
        click.option("--overwrite", is_flag=True, help="Replace results that exist."),
        click.option("--out", multiple=True, type=click.Path(path_type=Path),
                     help="Write the results, .json or .md; may be given again."),
    ):  # fmt: skip
        function = option(function)
    return function


def check_files(paths: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse a result that is neither .json nor .md, or exists, before any work is done."""
    for path in paths:
        if path.suffix not in (".json", ".md"):
            raise SettingError(f"--out is {path}; results are .json or .md.")
        if path.exists() and not overwrite:
            raise SettingError(f"{path} exists. Choose another --out, or say --overwrite.")


def write(
    paths: Sequence[Path],
    title: str,
    figures: Sequence[Figure],
    context: dict[str, Any],
    tables: dict[str, str],
    measured: dict[str, Any],
) -> None:
    """Write the results, as JSON or Markdown by the files' names, with the command that made them.

    Args:
        paths: where.
        title: of the Markdown.
        figures: in order.
        context: as `vmoe.runtime.bench.context.read` gives it, from before the first call.
        tables: more tables for the Markdown, by their titles.
        measured: more for the JSON.
    """
    for path in paths:
        if path.suffix == ".json":
            record = {
                "command": command(),
                "commit": commit(),
                "context": context,
                "figures": [figure.to_json() for figure in figures],
                **measured,
            }
            output.write_json(path, record)
        else:
            head = f"# {title}\n\n`{command()}` at commit {commit()}, {context['when']}\n\n"
            body = "".join(f"\n## {name}\n\n{text}\n" for name, text in tables.items())
            line = contexts.line(context)
            shown = f"\n{table(figures)}\n" if figures else ""
            output.write_text(path, f"{head}{line}\n{shown}{body}")


def command() -> str:
    """Return the command line, as it can be pasted in the repository's root."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def commit() -> str:
    """Return the commit of the checkout; a `+` says that rooms differ from it."""
    try:
        head = _git("rev-parse", "--short", "HEAD").strip()
        rooms = ("vmoe", "runtime", "export", "attacks", "train", "benchmarks/*.py")
        return head + "+" * bool(_git("status", "--porcelain", "-uno", "--", *rooms).strip())
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*args: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True
    ).stdout


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
