"""The robustness curve: robust accuracy against eps, an attack a line, worst-of above all.

Where engines were attacked, a second picture shows each of them mode by mode.

Readable in black and white: lines differ by dash and marker. Both axes begin at 0, where the clean
clips are. A bar, and of worst-of the band, is the 95 % interval (Wilson).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmoe import output
from vmoe.errors import MissingDependencyError
from vmoe.settings import format_eps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME, ENGINES = "curve", "engines"  # of the files
SHADES = {"twin": "0.2", "transfer": "0.55", "adaptive": "0.75", "query": "0.92", "worst_of": "1.0"}
KINDS = ("png", "svg")
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "*", "h")
DASHES = ((0, (5, 2)), (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1)), (0, (8, 2, 1, 2, 1, 2)))
GREYS = ("0.15", "0.4", "0.55")
STYLE: Any = {"font.size": 9, "svg.hashsalt": "vmoe", "axes.spines.top": False,
         "axes.spines.right": False}  # fmt: skip


def require() -> None:
    """Refuse, before any work, a picture that could not be drawn.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib as _  # noqa: F401
    except ImportError as e:
        raise MissingDependencyError(
            "matplotlib, which draws --curve, is not installed: pip install 'vmoe[plot]'"
        ) from e


def write(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw a report's pictures as PNG and SVG, each written whole; return the paths.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        made = {NAME: draw(report)}
        if report.get("deployed"):
            made[ENGINES] = draw_engines(report)
        for name, figure in made.items():
            for kind in KINDS:
                no_date = {"Date": None} if kind == "svg" else {}
                with output.whole_file(folder / f"{name}.{kind}") as temporary:
                    figure.savefig(temporary, format=kind, dpi=160, metadata=no_date)
    return [folder / f"{name}.{kind}" for name in made for kind in KINDS]


def draw_engines(report: Mapping[str, Any]) -> Figure:
    """Return what each engine withstands, mode by mode; a panel for each budget."""
    from matplotlib.figure import Figure

    rows = report["deployed"]["rows"]
    budgets = list(dict.fromkeys(row["eps"] for row in rows))
    names = list(dict.fromkeys(row["engine"] for row in rows))
    wide = 1.2 + max(3.4, 1.4 * len(names))
    figure = Figure(figsize=(wide * len(budgets), 4.0), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    modes = [mode for mode in SHADES if any(row[mode] for row in rows)]
    for panel, eps in zip(panels, budgets, strict=True):
        for number, mode in enumerate(modes):
            _bars(panel, [row for row in rows if row["eps"] == eps], mode, number, len(modes))
        panel.set_xticks(range(len(names)), [name.replace(" on ", "\n") for name in names])
        panel.set_title(f"eps {format_eps(eps, rows[0]['norm'])}", fontsize=9)
        panel.set_ylim(0, 100)
        panel.grid(axis="y", color="0.9", linewidth=0.6)
        panel.set_axisbelow(True)
    panels[0].set_ylabel("robust accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(modes), frameon=False)
    figure.suptitle(f"{report['data']}, {report['n']} clips; 95 % intervals", fontsize=9)
    return figure


def _bars(panel: Axes, rows: Sequence[Mapping[str, Any]], mode: str, number: int, of: int) -> None:
    """Draw one mode's bars, one for each engine."""
    width = 0.8 / of
    for at, row in enumerate(rows):
        found = row[mode]
        if found is None:
            continue
        high = 100 * found["share"]
        spread = [[max(0.0, high - 100 * found["low"])], [max(0.0, 100 * found["high"] - high)]]
        panel.bar(
            at + (number - (of - 1) / 2) * width, high, width, yerr=spread, color=SHADES[mode],
            edgecolor="black", linewidth=0.7, error_kw={"linewidth": 0.8},
            label=mode.replace("_", "-") if at == 0 else None,
            hatch="///" if mode == "worst_of" else None,
        )  # fmt: skip


def draw(report: Mapping[str, Any]) -> Figure:
    """Return the curve of a report: a panel for each model."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in report["rows"]))
    figure = Figure(figsize=(1.2 + 4.6 * len(models), 4.4), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for panel, model in zip(panels, models, strict=True):
        _panel(panel, report, model)
    panels[0].set_ylabel("robust accuracy, %")
    count = len(panels[0].get_legend_handles_labels()[1])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(count, 4), frameon=False,
        handlelength=4,
    )  # fmt: skip
    figure.suptitle(f"{report['data']}, {report['n']} clips; 95 % intervals", fontsize=9)
    return figure


def _panel(panel: Axes, report: Mapping[str, Any], model: str) -> None:
    rows = [row for row in report["rows"] if row["model"] == model]
    worst = [row for row in report["worst_of"] if row["model"] == model]
    norm, budgets = rows[0]["norm"], sorted({row["eps"] for row in rows})
    clean = rows[0]["clean"]
    x, y, low, high = _points(worst, clean)
    panel.fill_between(x, low, high, color="0.87", linewidth=0, zorder=1)
    panel.plot(x, y, label="worst-of", color="black", linewidth=3, marker="o", zorder=3)
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    for number, attack in enumerate(attacks):
        grey = GREYS[number % len(GREYS)]
        x, y, low, high = _points([row for row in rows if row["attack"] == attack], clean)
        panel.plot(
            x[1:], y[1:], label=attack, color=grey, linewidth=1.2, clip_on=False, zorder=4,
            linestyle=DASHES[number % len(DASHES)], marker=MARKERS[number % len(MARKERS)],
            markersize=6.5, markerfacecolor="none", markeredgewidth=1.2,
        )  # fmt: skip
        panel.plot(x[:2], y[:2], color=grey, linewidth=1.2, linestyle=DASHES[number % len(DASHES)])
        aside = (number - (len(attacks) - 1) / 2) * 0.006 * budgets[-1]  # so that all can be seen
        panel.vlines([at + aside for at in x[1:]], low[1:], high[1:], color=grey, linewidth=0.7)
    panel.set_title(f"on the {model}", fontsize=9)
    panel.set_ylim(0, 100)
    panel.set_xlim(0, budgets[-1] * 1.03)
    at = [0.0, *budgets]
    narrow = min(b - a for a, b in zip(at, budgets, strict=False)) < 0.1 * budgets[-1]
    panel.set_xticks(at, ["0", *(tick(eps, norm, narrow=narrow) for eps in budgets)])
    if narrow and norm == "linf":
        for label in panel.get_xticklabels()[1:]:
            label.set_fontsize(12)  # fractions are set small
    panel.set_xlabel("eps, L-infinity" if norm == "linf" else "eps, L2 of a whole clip")
    panel.grid(axis="y", color="0.9", linewidth=0.6)
    panel.set_axisbelow(True)
    for name in ("left", "bottom"):
        panel.spines[name].set_zorder(2)


def _points(
    rows: Sequence[Mapping[str, Any]], clean: Mapping[str, Any]
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return eps, robust accuracy and its interval in %, the clean clips at eps 0 before them."""
    rows = sorted(rows, key=lambda row: float(row["eps"]))
    held = [clean, *(row["robust"] for row in rows)]
    x = [0.0, *(float(row["eps"]) for row in rows)]
    y, low, high = ([100 * share[key] for share in held] for key in ("share", "low", "high"))
    return x, y, low, high


def tick(eps: float, norm: str, *, narrow: bool = False) -> str:
    """Return a budget as an axis shows it: n/255, `narrow` one above the other; L2 as it is."""
    if norm == "l2":
        return format_eps(eps, norm)
    levels = f"{eps * 255:.4g}"
    return rf"$\frac{{{levels}}}{{255}}$" if narrow else f"{levels}/255"
