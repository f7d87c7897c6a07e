"""The figures of benchmarks/: what is reached, and how a line says it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import figures
from benchmarks.figures import Figure
from vmoe.errors import SettingError


@pytest.mark.parametrize(
    ("value", "better", "ok"),
    [(1.05, "lower", True), (1.06, "lower", False), (1.05, "higher", True), (1.0, "higher", False),
     (None, "lower", None)],
)  # fmt: skip
def test_a_figure_is_reached_in_its_own_direction(
    value: float | None, better: str, ok: bool | None
) -> None:
    assert Figure("f", value, "ratio", 1.05, better).ok is ok


def test_a_line_is_what_the_design_says() -> None:
    made = Figure("f", 0.3123456, "ratio", 0.45, n=50, spread=0.02, more={"minima": 0.31})
    assert made.to_json() == {
        "figure": "f", "value": 0.3123, "unit": "ratio", "reach": 0.45, "better": "lower",
        "n": 50, "spread": 0.02, "ok": True, "minima": 0.31,
    }  # fmt: skip
    missing = Figure("f", None, "s", 1.5, why="no model ships")
    assert missing.to_json()["value"] is None
    assert missing.to_json()["why"] == "no model ships"


def test_results_carry_the_command_and_the_machine(tmp_path: Path) -> None:
    machine = {"when": "now", "cpu": "a cpu", "cores": 2, "gpu": None, "load_1min": 0.1,
               "python": "3.11", "versions": {"numpy": "2"}}  # fmt: skip
    made = [Figure("f", 0.3, "ratio", 0.45), Figure("g", None, "s", 1.5, why="none here")]
    paths = [tmp_path / "r.json", tmp_path / "r.md"]
    figures.check_files(paths, overwrite=False)
    figures.write(paths, "Title", made, machine, {"More": "| a |"}, {"rows": []})
    record = json.loads(paths[0].read_text())
    assert [figure["figure"] for figure in record["figures"]] == ["f", "g"]
    assert record["command"].startswith("python benchmarks/")
    page = paths[1].read_text()
    assert "a cpu, 2 cores" in page
    assert "none here" in page
    assert "## More" in page


def test_results_of_another_kind_are_refused_before_any_work() -> None:
    with pytest.raises(SettingError, match=r"results are \.json or \.md"):
        figures.check_files([Path("line.txt")], overwrite=True)


def test_results_that_exist_are_refused_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "line.json"
    path.write_text("a full run")
    with pytest.raises(SettingError, match=r"line\.json exists.*--overwrite"):
        figures.check_files([path], overwrite=False)
    figures.check_files([path], overwrite=True)
    assert path.read_text() == "a full run"
