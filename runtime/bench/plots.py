"""What a record shows: latency of each form, throughput against batch, speed against accuracy.

Each picture needs its rows: a sweep of --batch, or --accuracy or --robust; where they are missing,
it is left out, and said. Colours are Okabe and Ito's, which the colour-blind tell apart; markers
differ, too, for black and white.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vmoe import output
from vmoe.errors import MissingDependencyError, SettingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("png", "svg")
STYLE: Any = {"font.size": 9, "svg.hashsalt": "vmoe", "axes.spines.top": False,
              "axes.spines.right": False, "axes.grid": True, "grid.color": "0.9",
              "grid.linewidth": 0.6, "axes.axisbelow": True}  # fmt: skip
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9",
)  # fmt: skip
COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, "0.3")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 7.2  # of a picture, in inches: 1150 pixels
DPI = 160
LETTERS = 105  # of a legend's line, in that width
MARK = 7  # letters, whose place a legend's mark and the gap after a label take
ORDER = ("single", "multi", "offline", "stream")  # the scenario whose latency is drawn
HIGH = 95.0  # the percentile to which a spread is drawn

BESIDE: Any = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 7.5,
               "color": "0.35"}  # fmt: skip
MEET = 4.0  # points of accuracy, within which two texts would lie on each other
CLOSE = 0.15  # of the axis: so near to its right, a point's text would meet the next one

Row = Mapping[str, Any]


class Kind(NamedTuple):
    """How one kind of form is drawn."""

    label: str
    colour: str
    marker: str


ROUTED = Kind("routed", BLUE, "o")
FORCED = Kind("route forced", SKY, "D")
ALONE = Kind("part alone", ORANGE, "^")
EVERY = Kind("all experts", RED, "s")
BASELINE = Kind("baseline", "0.3", "v")


class Picture(NamedTuple):
    """One picture that can be drawn.

    Attributes:
        name: of its file.
        height: in inches.
        draw: draws it into an empty panel.
    """

    name: str
    height: float
    draw: Callable[[Axes], None]


def targets(path: Path) -> list[Path]:
    """Return the files that may be written to a path: itself, or in a folder one for each picture.

    Raises:
        SettingError: a file that is neither .png nor .svg.
        MissingDependencyError: matplotlib is not installed.
    """
    require()
    suffix = path.suffix[1:].lower()
    if suffix in KINDS and not path.is_dir():
        return [path]
    if suffix and not path.is_dir():
        raise SettingError(f"--plot {path}: write FILE.png, FILE.svg or a folder.")
    if path.exists() and not path.is_dir():
        raise SettingError(f"--plot {path} is a file: write FILE.png, FILE.svg or a folder.")
    return [
        path / f"{name}.{kind}" for name in ("latency", "throughput", "accuracy") for kind in KINDS
    ]


def require() -> None:
    """Refuse, before any work, a picture that could not be drawn.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib as _  # noqa: F401
    except ImportError as e:
        raise MissingDependencyError(
            "matplotlib, which draws --plot, is not installed: pip install 'vmoe[plot]'"
        ) from e


def write(record: Mapping[str, Any], path: Path) -> tuple[list[Path], list[str]]:
    """Draw a record's pictures, one above another in a file, or each in files of a folder.

    Args:
        record: as its JSON has it.
        path: FILE.png, FILE.svg, or a folder.

    Returns:
        The files written, each whole, and of each picture that was left out, why.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    import matplotlib as mpl

    pictures, left_out = pictures_of(record)
    written: list[Path] = []
    if not pictures:
        return written, left_out
    with mpl.rc_context(STYLE):
        if path.suffix[1:].lower() in KINDS and not path.is_dir():
            _save(pictures, path, record)
            written.append(path)
        else:
            for picture in pictures:
                for kind in KINDS:
                    file = path / f"{picture.name}.{kind}"
                    _save([picture], file, record)
                    written.append(file)
    return written, left_out


def pictures_of(record: Mapping[str, Any]) -> tuple[list[Picture], list[str]]:
    """Return the pictures that a record has rows for, and why others are left out."""
    rows = [row for row in record["rows"] if row["latency_ms"] is not None]
    baselines = {about["name"] for about in record["bundles"] if about["baseline"]}
    made, left_out = [], []
    shown = _latency_rows(rows)
    if shown:
        lines = len(shown) + len({row["bundle"] for row in shown})
        height = 1.2 + 0.2 * lines
        made.append(Picture("latency", height, lambda p: _latency(p, shown, baselines)))
    else:
        left_out.append("no picture: nothing was measured")
    swept = _swept(rows)
    if swept:
        made.append(Picture("throughput", 3.0, lambda p: _throughput(p, swept)))
    elif shown:
        left_out.append("no throughput against batch: measure several, --batch 1,2,4,8")
    judged = _judged(rows)
    if judged:
        made.append(Picture("accuracy", 3.4, lambda p: _accuracy(p, judged)))
    elif shown:
        left_out.append("no speed against accuracy: give --robust DIR or --accuracy DATA")
    return made, left_out


def _save(pictures: Sequence[Picture], path: Path, record: Mapping[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, sum(p.height for p in pictures)), layout="constrained")
    parts: Any = figure.subfigures(
        len(pictures), 1, squeeze=False, height_ratios=[p.height for p in pictures]
    )[:, 0]
    for picture, part in zip(pictures, parts, strict=True):
        picture.draw(part.subplots())
    context = record["context"]
    figure.suptitle(f"{context['gpu'] or context['cpu']}, {context['when'][:10]}", fontsize=8,
                    color="0.4", x=0.99, ha="right")  # fmt: skip
    kind = path.suffix[1:].lower()
    no_date = {"Date": None} if kind == "svg" else {}
    with output.whole_file(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=DPI, metadata=no_date)


# ---- latency of each form


def _latency_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the first scenario there is, at its smallest batch and streams."""
    for scenario in ORDER:
        of = [row for row in rows if row["scenario"] == scenario]
        if of:
            least = min((row["batch"], row["streams"]) for row in of)
            return [row for row in of if (row["batch"], row["streams"]) == least]
    return []


def _latency(panel: Axes, rows: Sequence[Row], baselines: set[str]) -> None:
    """Draw each form's median, and its spread as a line."""
    threads = len({row["threads"] for row in rows}) > 1
    names: list[tuple[str, Row | None]] = []
    for bundle in dict.fromkeys(row["bundle"] for row in rows):
        own = [row for row in rows if row["bundle"] == bundle]
        if len(own) == 1:
            names.append((bundle, own[0]))
            continue
        names.append((bundle, None))
        names += [(row["form"] + _threads(row) * threads, row) for row in own]
    seen: set[Kind] = set()
    for y, (_, row) in enumerate(names):
        if row is None:
            continue
        kind = _kind(row, baselines)
        low, high = _spread(row["latency_ms"])
        panel.plot([low, high], [y, y], color=kind.colour, linewidth=1.6, solid_capstyle="butt")
        panel.plot(
            row["latency_ms"]["median"], y, kind.marker, color=kind.colour, markersize=6,
            markeredgecolor="white", markeredgewidth=0.6,
            label=None if kind in seen else kind.label,
        )  # fmt: skip
        panel.annotate(f"{row['latency_ms']['median']:.3g}", (high, y), **BESIDE)
        seen.add(kind)
    panel.set_yticks(range(len(names)), [name for name, _ in names])
    for label, (_, row) in zip(panel.get_yticklabels(), names, strict=True):
        label.set_fontweight(
            "bold" if row is None or _kind(row, baselines) is BASELINE else "normal"
        )
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.set_xlim(left=0)
    panel.grid(visible=False, axis="y")
    panel.tick_params(axis="y", length=0)
    first = rows[0]
    what = {"multi": f"query of {first['streams']} streams", "stream": "label, since its capture"}
    call = what.get(first["scenario"], f"call of {_clips(first['batch'])}")
    high = max(_spread_percentile(first["latency_ms"]), 0.0)
    panel.set_xlabel(f"latency of a {call}, ms; mark and number: median; line: least to p{high:g}")
    _legend(panel)


def _kind(row: Row, baselines: set[str]) -> Kind:
    form = row["form"]
    if row["bundle"] in baselines:
        return BASELINE
    if form == "all experts":
        return EVERY
    if form.endswith("alone"):
        return ALONE
    return FORCED if form.startswith("route") else ROUTED


def _spread_percentile(latency: Mapping[str, Any]) -> float:
    """Return the highest percentile that was asked for, up to HIGH."""
    return max((float(p) for p in latency["percentiles"] if float(p) <= HIGH), default=50.0)


def _spread(latency: Mapping[str, Any]) -> tuple[float, float]:
    high = f"{_spread_percentile(latency):g}"
    return latency["min"], latency["percentiles"].get(high, latency["median"])


# ---- throughput against batch


def _swept(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return free rows by bundle, threads and backend, of those that have several batches."""
    named: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in rows:
        if row["form"] == "free" and row["scenario"] in ("single", "offline"):
            named.setdefault(_who(row), {})[row["batch"]] = row
    several = {who: by for who, by in named.items() if len(by) > 1}
    return {
        name: [by[batch] for batch in sorted(by)]
        for name, by in zip(_names(list(several)), several.values(), strict=True)
    }


def _throughput(panel: Axes, swept: Mapping[str, Sequence[Row]]) -> None:
    for number, (name, rows) in enumerate(swept.items()):
        x, y = [row["batch"] for row in rows], [row["clips_per_s"] for row in rows]
        panel.plot(
            x, y, label=name, color=COLOURS[number % len(COLOURS)], linewidth=1.6,
            marker=MARKERS[number % len(MARKERS)], markersize=6, markeredgecolor="white",
            markeredgewidth=0.6, clip_on=False, zorder=3,
        )  # fmt: skip
    ticks = sorted({row["batch"] for rows in swept.values() for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [str(batch) for batch in ticks], minor=False)
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.set_xlabel("batch, clips of a call")
    panel.set_ylabel("throughput, clips/s")
    alone = f", {next(iter(swept))}" if len(swept) == 1 else ""
    panel.set_title(f"throughput against batch{alone}, routed freely", fontsize=9)
    _legend(panel)


# ---- speed against accuracy


class Judged(NamedTuple):
    """One bundle's accuracy beside its speed.

    Attributes:
        name: of the bundle.
        ms: latency of a clip.
        points: accuracy and its interval, in %, by what it is: `clean`, `8/255`.
    """

    name: str
    ms: float
    points: dict[str, tuple[float, float, float]]


def _judged(rows: Sequence[Row]) -> list[Judged]:
    """Return who has accuracy, at the smallest batch that was measured."""
    named: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        has = row["form"] == "free" and (row["accuracy"] or {}).get("why", "none") is None
        who = _who(row)
        if has and (who not in named or row["batch"] < named[who]["batch"]):
            named[who] = row
    return [
        Judged(name, row["latency_ms"]["median"] / row["batch"], _points(row))
        for name, row in zip(_names(list(named)), named.values(), strict=True)
    ]


def _points(row: Row) -> dict[str, tuple[float, float, float]]:
    points, found = {}, row["accuracy"]
    clean = (found["clean"] or {}).get("right") or found["saved_clean"]
    if clean:
        points["clean"] = _percents(clean)
    for robust in found["robust"]:
        points[robust["budget"]] = _percents(robust["right"])
    return points


def _percents(share: Mapping[str, float]) -> tuple[float, float, float]:
    return 100 * share["share"], 100 * share["low"], 100 * share["high"]


def _accuracy(panel: Axes, judged: Sequence[Judged]) -> None:
    """Draw clean clips hollow, adversarial ones full, of one bundle joined by a line."""
    budgets = list(dict.fromkeys(b for each in judged for b in each.points if b != "clean"))
    widest = max(each.ms for each in judged)
    for number, each in enumerate(judged):
        colour = COLOURS[number % len(COLOURS)]
        marker = MARKERS[number % len(MARKERS)]
        crowded = any(0 < other.ms - each.ms < CLOSE * widest for other in judged)
        beside = {**BESIDE, "xytext": (-7, 0), "ha": "right"} if crowded else BESIDE
        shares = [share for share, _, _ in each.points.values()]
        panel.plot([each.ms] * len(shares), shares, color=colour, linewidth=0.8, linestyle=":")
        for what, (share, low, high) in each.points.items():
            clean = what == "clean"
            panel.errorbar(
                each.ms, share, [[share - low], [high - share]], color=colour, fmt=marker,
                markersize=7, markerfacecolor="white" if clean else colour, elinewidth=1,
                capsize=2, zorder=4, label=each.name if what == next(iter(each.points)) else None,
            )  # fmt: skip
        for at, text in _texts(each, several=len(budgets) > 1):
            panel.annotate(text, (each.ms, at), **beside)
    panel.set_xlim(0, 1.18 * widest)
    panel.set_ylim(0, 100)
    panel.set_xlabel("latency of a clip, ms (median)")
    one = f", robust at eps {budgets[0]}" if len(budgets) == 1 else ""
    panel.set_ylabel("accuracy, %")
    panel.set_title(f"accuracy against speed{_alone(judged)}{one}; 95 % intervals", fontsize=9)
    _legend(panel)


def _texts(of: Judged, *, several: bool) -> list[tuple[float, str]]:
    """Return what stands beside the points, and at which accuracy: one text for those that meet."""
    texts: list[tuple[float, list[str]]] = []
    for what, (share, _, _) in sorted(of.points.items(), key=lambda point: -point[1][0]):
        said = "clean" if what == "clean" else f"eps {what}" if several else "robust"
        if texts and texts[-1][0] - share < MEET:
            texts[-1][1].append(said)
        else:
            texts.append((share, [said]))
    return [(at, ", ".join(said)) for at, said in texts]


def _alone(judged: Sequence[Judged]) -> str:
    """Return the name of the only one, which has no legend."""
    return f", {judged[0].name}" if len(judged) == 1 else ""


# ---- what all share


def _who(row: Row) -> tuple[Any, ...]:
    return row["bundle"], row["threads"], row["backend"]


def _names(who: Sequence[tuple[Any, ...]]) -> list[str]:
    """Return a name for each bundle, threads and backend: with what tells them apart, no more."""
    told = next(n for n in (1, 2, 3) if n == 3 or len({each[:n] for each in who}) == len(who))
    return [
        bundle + f", {_count(threads)}" * (told > 1) + f", {backend}" * (told > 2)
        for bundle, threads, backend in who
    ]


def _threads(row: Row) -> str:
    return f", {_count(row['threads'])}"


def _count(threads: int | None) -> str:
    return "own threads" if threads is None else f"{threads} thread{'s' * (threads > 1)}"


def _clips(batch: int) -> str:
    return "1 clip" if batch == 1 else f"{batch} clips"


def _legend(panel: Axes) -> None:
    """Put what is drawn above the panel, where it hides nothing."""
    handles, labels = panel.get_legend_handles_labels()
    if len(labels) > 1:
        panel.figure.legend(
            handles, labels, loc="outside upper left", ncols=_columns(labels), frameon=False,
            fontsize=8.5, handletextpad=0.4, columnspacing=1.4,
        )  # fmt: skip


def _columns(labels: Sequence[str]) -> int:
    """Return how many labels stand side by side in a legend, so that none is cut off."""
    each = max(map(len, labels)) + MARK
    return max(1, min(5, len(labels), LETTERS // each))
