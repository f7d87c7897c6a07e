"""benchmarks/route_histogram.py: what vmoe-run wrote, drawn."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
route_histogram = importlib.import_module("route_histogram")


def test_windows_are_drawn_by_expert_and_label(tmp_path: Path) -> None:
    rows = [{"expert": 0, "label": "static"}, {"expert": 2, "label": "shake"}]
    (tmp_path / "routes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [str(tmp_path / "routes.jsonl"), "--out", str(tmp_path / "routes.svg")]
    result = CliRunner().invoke(route_histogram.main, arguments)
    assert result.exit_code == 0, result.output
    assert "<svg" in (tmp_path / "routes.svg").read_text()


def test_no_window_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "routes.jsonl").touch()
    result = CliRunner().invoke(
        route_histogram.main, [str(tmp_path / "routes.jsonl"), "--out", str(tmp_path / "a.png")]
    )
    assert result.exit_code == 2
    assert "holds no window. Make it: vmoe-run --jsonl" in result.output
