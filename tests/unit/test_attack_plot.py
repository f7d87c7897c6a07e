"""The robustness curve: what is drawn stands where the report says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vmoe.attacks import plot
from vmoe.attacks.figures import share
from vmoe.report import wilson

EPS = [1 / 255, 4 / 255, 16 / 255]
HITS = {"pgd": [80, 50, 2], "tlga-r": [90, 88, 70]}


def report(models: tuple[str, ...] = ("twin",), norm: str = "linf") -> dict[str, Any]:
    def held(attack: str, eps: float, hits: int, model: str) -> dict[str, Any]:
        counted = {}
        for name, count in (("clean", 95), ("robust", hits)):
            low, high = wilson(count, 100)
            counted[name] = {
                "hits": count,
                "n": 100,
                "share": count / 100,
                "low": low,
                "high": high,
            }
        return {"attack": attack, "norm": norm, "eps": eps, "model": model, **counted}

    rows = [
        held(attack, eps, hits, model)
        for model in models
        for attack, each in HITS.items()
        for eps, hits in zip(EPS, each, strict=True)
    ]
    worst = [
        held("worst-of", eps, min(each[i] for each in HITS.values()), model)
        for model in models
        for i, eps in enumerate(EPS)
    ]
    return {"data": "some test", "n": 100, "rows": rows, "worst_of": worst}


def test_lines_stand_where_the_report_says() -> None:
    figure = plot.draw(report())
    (panel,) = figure.axes
    lines = {line.get_label(): line for line in panel.get_lines()}
    worst = lines["worst-of"]
    assert list(worst.get_xdata()) == [0, *EPS]  # the clean clips stand at 0
    assert list(worst.get_ydata()) == pytest.approx([95, 80, 50, 2])
    assert list(lines["tlga-r"].get_ydata()) == pytest.approx([90, 88, 70])
    assert panel.get_ylim() == (0, 100)
    assert panel.get_xlim()[0] == 0
    band = panel.collections[0].get_paths()[0].vertices
    low, high = wilson(50, 100)
    assert any(abs(x - 4 / 255) < 1e-9 and abs(y - 100 * low) < 1e-6 for x, y in band)
    assert any(abs(x - 4 / 255) < 1e-9 and abs(y - 100 * high) < 1e-6 for x, y in band)


def test_lines_can_be_told_apart_without_colour() -> None:
    (panel,) = plot.draw(report()).axes
    lines = [line for line in panel.get_lines() if not str(line.get_label()).startswith("_")]
    looks = {(line.get_marker(), str(line._dash_pattern)) for line in lines}  # type: ignore[attr-defined]
    assert len(looks) == len(lines) == 3
    widths = {line.get_label(): line.get_linewidth() for line in lines}
    assert widths["worst-of"] > 2 * widths["pgd"]
    for line in lines:
        colour = str(line.get_color())
        assert colour == "black" or 0 <= float(colour) < 0.6  # a grey that prints


def test_budgets_are_labelled_in_the_form_they_are_given_in() -> None:
    (panel,) = plot.draw(report()).axes
    labels = [label.get_text() for label in panel.get_xticklabels()]
    assert labels == ["0", *(rf"$\frac{{{n}}}{{255}}$" for n in (1, 4, 16))]
    assert plot.tick(8 / 255, "linf") == "8/255"
    assert plot.tick(2.5 / 255, "linf", narrow=True) == r"$\frac{2.5}{255}$"
    assert plot.tick(2.0, "l2", narrow=True) == "2.0"


def test_a_panel_for_each_model() -> None:
    figure = plot.draw(report(("twin", "engine"), "l2"))
    assert [axes.get_title() for axes in figure.axes] == ["on the twin", "on the engine"]
    assert figure.axes[0].get_xlabel() == "eps, L2 of a whole clip"


def test_files_are_whole_and_the_same_twice(tmp_path: Path) -> None:
    one = [path.read_bytes() for path in plot.write(report(), tmp_path / "a")]
    two = [path.read_bytes() for path in plot.write(report(), tmp_path / "b")]
    assert one == two
    assert one[0].startswith(b"\x89PNG")
    assert one[1].rstrip().endswith(b"</svg>")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["curve.png", "curve.svg"]


def test_a_share_that_was_counted_is_drawn() -> None:
    """The keys that are drawn are those that figures give."""
    import numpy as np

    assert {"share", "low", "high"} <= share(np.array([True, False])).keys()
