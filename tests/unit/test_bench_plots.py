"""vmoe-bench's plots: what is drawn stands where the record says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vmoe.errors import SettingError
from vmoe.report import wilson
from vmoe.runtime.bench import plots


def row(bundle: str, form: str, ms: float, **more: Any) -> dict[str, Any]:
    batch = more.get("batch", 1)
    latency = {"n": 50, "min": 0.8 * ms, "median": ms, "percentiles": {"50": ms, "90": 2 * ms,
               "99": 9 * ms}}  # fmt: skip
    own = {"scenario": "single", "batch": 1, "streams": 1, "threads": None, "accuracy": None,
           "backend": "onnxruntime", "clips_per_s": 1000 * batch / ms}  # fmt: skip
    return {**own, "bundle": bundle, "form": form, "latency_ms": latency, **more}


def share(hits: int, n: int = 100) -> dict[str, Any]:
    low, high = wilson(hits, n)
    return {"hits": hits, "n": n, "share": hits / n, "low": low, "high": high}


def judged(clean: int, *robust: tuple[str, int]) -> dict[str, Any]:
    each = [{"budget": budget, "right": share(hits)} for budget, hits in robust]
    return {"clean": {"right": share(clean)}, "robust": each, "saved_clean": None, "why": None}


def record(*rows: dict[str, Any]) -> dict[str, Any]:
    names = dict.fromkeys(row["bundle"] for row in rows)
    bundles = [{"name": name, "baseline": name == "dense"} for name in names]
    context = {"gpu": None, "cpu": "AMD EPYC", "when": "2026-11-28T04:00:00+00:00"}
    return {"rows": list(rows), "bundles": bundles, "context": context}


def drawn(made: dict[str, Any]) -> dict[str, Axes]:
    found = {}
    for picture in plots.pictures_of(made)[0]:
        panel = Figure(layout="constrained").subplots()
        picture.draw(panel)
        found[picture.name] = panel
    return found


SINGLE = (
    row("b", "free", 4, accuracy=judged(95, ("4/255", 60))), row("b", "route 0", 3.9),
    row("b", "router alone", 0.5), row("b", "all experts", 16),
    row("dense", "free", 8, accuracy=judged(90, ("4/255", 30))),
)  # fmt: skip
SWEEP = tuple(row("b", "free", 3 * n, batch=n, scenario="offline") for n in (2, 8))
FAILED = {**row("b", "route 1", 1), "latency_ms": None}


def test_every_form_has_its_median_and_spread() -> None:
    panel = drawn(record(*SINGLE, *SWEEP, FAILED))["latency"]
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert names == ["b", "free", "route 0", "router alone", "all experts", "dense"]
    marks = {
        names[int(line.get_ydata()[0])]: line.get_xdata()[0]
        for line in panel.get_lines() if len(line.get_xdata()) == 1
    }  # fmt: skip
    assert marks == {"free": 4, "route 0": 3.9, "router alone": 0.5, "all experts": 16, "dense": 8}
    spans = [list(line.get_xdata()) for line in panel.get_lines()[::2]]
    assert spans[0] == pytest.approx([3.2, 8])  # from the least to p90, the highest up to p95
    assert "p90" in panel.get_xlabel()
    assert panel.get_xlim()[0] == 0
    labels = panel.get_legend_handles_labels()[1]
    assert labels == ["routed", "route forced", "part alone", "all experts", "baseline"]


def test_throughput_is_of_free_routing_by_batch() -> None:
    panel = drawn(record(*SINGLE, *SWEEP))["throughput"]
    (line,) = panel.get_lines()
    assert list(line.get_xdata()) == [1, 2, 8]
    assert list(line.get_ydata()) == pytest.approx([250, 1000 / 3, 1000 / 3])
    assert [label.get_text() for label in panel.get_xticklabels()] == ["1", "2", "8"]
    assert panel.get_ylim()[0] == 0


def test_accuracy_stands_at_the_latency_of_a_clip() -> None:
    panel = drawn(record(*SINGLE, *SWEEP))["accuracy"]
    joined = {line.get_xdata()[0]: list(line.get_ydata()) for line in panel.get_lines()
              if line.get_linestyle() == ":"}  # fmt: skip
    assert joined == {4: pytest.approx([95, 60]), 8: pytest.approx([90, 30])}
    assert "4/255" in panel.get_title()
    assert panel.get_ylim() == (0, 100)
    assert [text.get_text() for text in panel.texts] == ["clean", "robust"] * 2
    assert {text.get_ha() for text in panel.texts} == {"left"}
    near = (row("b", "free", 4, accuracy=judged(95, ("2/255", 49), ("L2 2.0", 8), ("L2 3.0", 7))),
            row("c", "free", 4.2, accuracy=judged(95)))  # fmt: skip
    texts = drawn(record(*near))["accuracy"].texts
    assert [(t.get_text(), t.get_ha()) for t in texts] == [
        ("clean", "right"), ("eps 2/255", "right"), ("eps L2 2.0, eps L2 3.0", "right"),
        ("clean", "left"),
    ]  # fmt: skip


def test_saved_clips_clean_stand_for_data_that_was_not_given() -> None:
    found = {**judged(1, ("4/255", 60)), "clean": None, "saved_clean": share(90)}
    panel = drawn(record(row("b", "free", 4, accuracy=found)))["accuracy"]
    assert list(panel.get_lines()[0].get_ydata()) == pytest.approx([90, 60])


def test_what_has_no_rows_is_left_out_and_said() -> None:
    made, left_out = plots.pictures_of(record(row("b", "free", 4)))
    assert [picture.name for picture in made] == ["latency"]
    assert left_out == [
        "no throughput against batch: measure several, --batch 1,2,4,8",
        "no speed against accuracy: give --robust DIR or --accuracy DATA",
    ]
    assert plots.pictures_of(record(FAILED)) == ([], ["no picture: nothing was measured"])
    broken = {**judged(1), "why": "it broke"}
    assert len(plots.pictures_of(record(row("b", "free", 4, accuracy=broken)))[0]) == 1


def test_nothing_measured_writes_nothing(tmp_path: Path) -> None:
    written, left_out = plots.write(record(FAILED), tmp_path / "x.png")
    assert (written, len(left_out)) == ([], 1)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("rows", [
    [row("b", form, 9, scenario="multi", streams=4) for form in ("free", "mixed routes")],
    [row("b", "free", 90, scenario="stream", streams=2, threads=1)],
    [row("b", "free", 9, threads=n) for n in (1, 2)],
    [row("b", "free", 9, backend=name) for name in ("torch", "openvino")],
])  # fmt: skip
def test_every_scenario_can_be_drawn(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    panel = drawn(record(*rows))["latency"]
    assert panel.get_yticklabels()
    svg = tmp_path / "a.svg"
    assert plots.write(record(*rows), svg)[0] == [svg]
    assert svg.read_text().startswith("<?xml")


@pytest.mark.parametrize("name", ["bench.pdf", "bench.jpeg"])
def test_other_formats_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"write FILE.png, FILE.svg or a folder."):
        plots.targets(tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="is a file"):
        plots.targets(tmp_path / "file")
    assert plots.targets(tmp_path / "x.SVG") == [tmp_path / "x.SVG"]
    assert len(plots.targets(tmp_path)) == 6


def test_names_in_a_legend_tell_apart_and_are_never_cut_off() -> None:
    one, two, other = ("b", 1, "onnxruntime"), ("b", 2, "onnxruntime"), ("torch", 1, "torch")
    assert plots._names([one, other]) == ["b", "torch"]
    assert plots._names([one, two, other]) == ["b, 1 thread", "b, 2 threads", "torch, 1 thread"]
    assert plots._names([one, ("b", 1, "torch")]) == [
        "b, 1 thread, onnxruntime", "b, 1 thread, torch",
    ]  # fmt: skip
    assert plots._names([]) == []
    long = "a-bundle-of-a-long-name, 2 threads"
    for labels in (["routed", "part alone"], [long] * 4, ["x" * 90, "y"]):
        beside = plots._columns(labels)
        assert beside == 1 or beside * (max(map(len, labels)) + plots.MARK) <= plots.LETTERS
    assert plots._columns(["routed", "part alone"]) == 2
    assert plots._columns(["a" * 300]) == 1
    assert plots._columns([long] * 4) == 2
