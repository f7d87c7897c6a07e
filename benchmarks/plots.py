"""The pictures of docs/results.md, each drawn of one file of benchmarks/results.

    python benchmarks/plots.py

An SVG carries the name and the hash of the file that it was drawn of, so that a test finds a
picture which is older than its numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
PLOTS = Path(__file__).parent.parent / "docs" / "plots"
STRONG, WEAK, LINE = "#00695c", "#b0bec5", "#37474f"
STYLE: Any = {"font.size": 9, "svg.hashsalt": "vmoe", "svg.fonttype": "path",
              "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
Results = Mapping[str, Any]


def training(results: Results, axes: Axes) -> None:
    """Clean and worst-case accuracy of each method, all trained at one budget."""
    rows = sorted(results["rows"], key=lambda row: row["worst_of"])
    names = [f"{row['method']}  ({row['gflops']:.3f} GFLOPs)" for row in rows]
    axes.barh(names, [row["clean"] for row in rows], color=WEAK, label="clean")
    worst, error = [row["worst_of"] for row in rows], [row["worst_of_se"] for row in rows]
    axes.barh(names, worst, xerr=error, color=STRONG, ecolor=LINE, label="worst attack, 4/255")
    axes.set_xlabel("accuracy, % of 400 test clips, two seeds (bar: standard error)")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)


def routes(results: Results, axes: Axes) -> None:
    """Least latency of each way through a bundle."""
    rows = [row for row in results["rows"]["full"] if row["bundle"] in ("moe-split", "dense-split")]
    names = [
        "dense counterpart" if row["bundle"] == "dense-split" else row["form"] for row in rows
    ][::-1]
    least = [row["latency_ms"]["min"] for row in rows][::-1]
    colours = [STRONG if name.startswith("route ") else WEAK for name in names]
    axes.bar_label(axes.barh(names, least, color=colours), fmt="%.1f", padding=2)
    axes.set_xlabel("least milliseconds a clip; r3d18, width 0.5, 8x64x64, one core")


def export(results: Results, axes: Axes) -> None:
    """How much faster than the naive export each form of an expert is."""
    forms = ("lowered expert", "OpenVINO expert", "int8 expert", "OpenVINO int8 expert")
    names = ("float32, lowered", "float32 in OpenVINO", "int8, lowered", "int8 in OpenVINO")
    for at, (size, of) in enumerate(results["seconds"].items()):
        seconds = of["one_thread"]
        naive = min(seconds["naive expert"]["cpu"])
        faster = [naive / min(seconds[form]["cpu"]) for form in forms]
        places = [place + 0.38 * (at - 0.5) for place in range(len(forms))]
        colour = (WEAK, STRONG)[at]
        axes.bar_label(axes.bar(places, faster, 0.36, color=colour, label=size), fmt="%.1f")
    axes.axhline(1, color=LINE, linewidth=0.8)
    axes.set_xticks(range(len(forms)), names)
    axes.set_ylabel("times faster than naive, by CPU time")
    axes.legend()


def attacks(results: Results, axes: Axes) -> None:
    """What is left of five models by each attack, at an equal budget of gradients."""
    named = ("pgd", "apgd-ce", "apgd-margin", "tla-m", "j-tla", "j-tlga", "j-tlga-plus")
    markers = "osD^v"
    for marker, (model, of) in zip(markers, results["models"].items(), strict=True):
        found = {row["name"]: row["robust"] for row in of["rows"]}
        left = [100 * found[name] for name in named]
        axes.plot(named, left, marker, color=LINE, fillstyle="none", label=model)
        axes.plot(named, left, color=WEAK, linewidth=0.8, zorder=0)
    axes.set_ylabel("robust accuracy, %; lower: a stronger attack")
    axes.set_ylim(0)
    axes.legend(ncols=3, loc="lower left")


def guard(results: Results, axes: Axes) -> None:
    """How well the guard tells attacked windows from clean ones."""
    value = {figure["figure"]: figure["value"] for figure in results["figures"]}
    kinds = ("pgd", "tlga_r", "j_tlga", "stream", "adaptive_3")
    names = (
        "PGD",
        "TLGA-R",
        "J-TLGA",
        "PGD on a\nwhole stream",
        "the same, with\nthe guard in its loss",
    )
    for at, (kept, colour) in enumerate({"off": WEAK, "bilateral": STRONG}.items()):
        areas = [value[f"guard_auc_{kept}_{kind}"] for kind in kinds]
        places = [place + 0.38 * (at - 0.5) for place in range(len(kinds))]
        label = "no filter" if kept == "off" else "bilateral filter"
        axes.bar_label(axes.bar(places, areas, 0.36, color=colour, label=label), fmt="%.2f")
    axes.axhline(0.911, color=LINE, linewidth=0.8, linestyle="--")
    axes.text(4.4, 0.918, "asked: 0.911", ha="right", fontsize=8)
    axes.axhline(0.5, color=LINE, linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(kinds)), names)
    axes.set_ylabel("AUC over all windows")
    axes.set_ylim(0.4, 1.08)
    axes.legend(loc="upper left", ncols=2)


# The picture's name, the file it is drawn of, how, and its size in inches.
Drawn = tuple[str, str, Callable[[Results, Axes], None], tuple[float, float]]
PICTURES: Sequence[Drawn] = (
    ("training", "reproduce-camera-motion-large.json", training, (7, 3.2)),
    ("routes", "line.json", routes, (7, 3.4)),
    ("export", "export.json", export, (7, 3.2)),
    ("attacks", "attacks.json", attacks, (7, 3.4)),
    ("guard", "guard.json", guard, (7, 3.4)),
)


def mark(path: Path) -> str:
    """Return what a picture says of the file that it was drawn of."""
    return f"{path.name} sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=PLOTS, help="Folder.")
def main(out: Path) -> None:
    """Draw them all, as SVG."""
    out.mkdir(parents=True, exist_ok=True)
    for name, file, draw, size in PICTURES:
        source = RESULTS / file
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=size, layout="constrained")
            draw(json.loads(source.read_text()), figure.subplots())
            about = {"Date": None, "Description": mark(source)}
            figure.savefig(out / f"{name}.svg", metadata=about)
        click.echo(out / f"{name}.svg")


if __name__ == "__main__":
    main()
