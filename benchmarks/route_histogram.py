r"""Which expert watches which move: a histogram of the routes that vmoe-run took.

Of what `vmoe demo` left:

    vmoe-run runs/demo/bundle --source runs/demo/moves.avi --jsonl routes.jsonl
    python benchmarks/route_histogram.py routes.jsonl --out docs/routes.png
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import click

from vmoe import cli, output
from vmoe.errors import MissingDependencyError, SettingError


@cli.command(
    "route_histogram.py", "python benchmarks/route_histogram.py routes.jsonl --out docs/routes.png"
)
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A .png or .svg.")
def main(results: Path, out: Path) -> None:
    """Draw how many windows of RESULTS (of vmoe-run --jsonl) each expert labelled, by label."""
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    counts = Counter((row["expert"], row["label"]) for row in rows)
    if not counts:
        raise SettingError(f"{results} holds no window. Make it: vmoe-run --jsonl {results}.")
    draw(counts, out)


def draw(counts: Counter[tuple[int, str]], out: Path) -> None:
    """Draw one bar for each expert, whose parts are its labels.

    Args:
        counts: windows by expert and label.
        out: where.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        what = "matplotlib is not installed: pip install 'vmoe[plot]'."
        raise MissingDependencyError(what) from e
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.subplots()
    experts, labels = ({key[i] for key in counts} for i in (0, 1))
    bars = range(max(experts) + 1)
    left = [0] * len(bars)
    for number, label in enumerate(sorted(labels)):
        widths = [counts[expert, label] for expert in bars]
        axes.barh(bars, widths, left=left, label=label, color=f"C{number}", edgecolor="white")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    total = counts.total()
    axes.set_yticks(bars, [f"expert {e}: {left[e] / total:.0%}" for e in bars])
    axes.invert_yaxis()
    axes.set_xlabel(f"windows, of {total}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    with output.whole_file(out) as temporary:
        figure.savefig(temporary, dpi=120)


if __name__ == "__main__":
    main()
