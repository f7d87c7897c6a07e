"""A record as people read it: one line for each bundle as it is used, a table for each scenario."""

from __future__ import annotations

from typing import Any

import numpy as np

from vmoe.runtime.bench import render
from vmoe.runtime.bench.accuracy import Accuracy, Clean, Robust, Share
from vmoe.runtime.bench.certificate import Certificate, Route
from vmoe.runtime.bench.energy import Energy, Method
from vmoe.runtime.bench.measuring import Samples
from vmoe.runtime.bench.record import About, Record, Row, Streamed
from vmoe.runtime.bench.statistics import Ratio, summarise


def row(bundle: str, form: str, ms: float, **more: Any) -> Row:
    own: dict[str, Any] = {"scenario": "single", "batch": 1, "streams": 1, "threads": None,
                           "backend": "onnxruntime"}  # fmt: skip
    times = np.full(8, float(ms))
    wall = summarise(times, (50, 99))
    return Row(bundle, form, **{**own, "wall": wall, "cpu": wall, **more},
               samples=Samples(times, times))  # fmt: skip


def failed(bundle: str, form: str, why: str, **more: Any) -> Row:
    return row(bundle, form, 1, why=why, wall=None, cpu=None, **more)


def about(name: str, *, baseline: bool = False) -> About:
    return About(name, name, "split", "fp32", "onnxruntime", 2, (8, 64, 64, 3), baseline,
                 "trained", "t", (3, 1))  # fmt: skip


def record(*rows: Row, **more: Any) -> Record:
    names = dict.fromkeys(row.bundle for row in rows)
    return Record(
        command="vmoe-bench", context={}, settings={"percentile": [50.0, 99.0]},
        bundles=tuple(about(name, baseline=name == "dense") for name in names), rows=rows,
        certificates=more.pop("certificates", ()), verdicts=(), **more,
    )  # fmt: skip


def tables(*rows: Row, **more: Any) -> dict[str, list[list[str]]]:
    """Return each table's cells, columns first, by its title."""
    return {
        table.title: [
            [cell.strip() for cell in line.split("|")[1:-1]]
            for i, line in enumerate(table.text.splitlines()) if i != 1
        ]
        for table in render.tables(record(*rows, **more))
    }  # fmt: skip


def test_one_line_for_each_bundle_and_a_table_for_each_scenario() -> None:
    swept = [row("b", "free", 6 * n, batch=n, scenario="offline") for n in (4, 8)]
    made = tables(row("b", "free", 4), row("b", "route 0", 5), *swept, row("c", "free", 2),
                  row("dense", "free", 9))  # fmt: skip
    assert list(made) == ["As used, routed freely", "b: single", "b: offline", "c: single"]
    assert made["As used, routed freely"] == [
        ["bundle", "scenario", "batch", "median ms", "p99 ms", "clips/s"],
        ["b", "single", "1", "4", "4", "250.0"],
        ["b", "offline", "4", "24", "24", "166.7"],
        ["b", "offline", "8", "48", "48", "166.7"],
        ["c", "single", "1", "2", "2", "500.0"],
        ["dense", "single", "1", "9", "9", "111.1"],
    ]
    assert [line[0] for line in made["b: single"]] == ["form", "free", "route 0", "dense"]
    assert [line[:3] for line in made["b: offline"]] == [
        ["form", "batch", "min ms"], ["free", "4", "24"], ["free", "8", "48"],
    ]  # fmt: skip


def test_what_all_rows_share_stands_in_the_title() -> None:
    made = tables(*(row("b", form, 4, scenario="multi", batch=16, streams=16, threads=2)
                    for form in ("free", "mixed routes")))  # fmt: skip
    assert list(made) == [
        "As used, routed freely, streams 16, threads 2",
        "b: multi, streams 16, threads 2",
    ]


def test_the_worst_route_and_the_certificate_stand_in_the_table() -> None:
    ratio = Ratio(1.05, 1.04, None, None)
    routes = (Route(0, 4, 3.8, ratio), Route(1, 5, 4.8, ratio))
    made = tables(row("b", "free", 4), row("b", "route 0", 4), row("b", "route 1", 5),
                  certificates=(Certificate("b", "b", None, routes, 1, ()),))  # fmt: skip
    assert [[line[0], line[2], line[-1]] for line in made["b: single"]] == [
        ["form", "median ms", "/ alone"], ["free", "4", "-"], ["route 0", "4", "1.05"],
        ["route 1", "5", "1.05"], ["worst route", "5", "1.05"],
    ]  # fmt: skip


def test_streams_have_their_drops_and_no_cpu_time() -> None:
    counts = Streamed(10.0, 0.4, 50, 3, 2, 600, 7)
    made = tables(row("b", "free", 40, scenario="stream", streams=2, threads=1, stream=counts,
                      cpu=None))  # fmt: skip
    (title,) = [title for title in made if "stream," in title]
    assert title == "b: stream, streams 2, from capture to label"
    assert made[title] == [
        ["form", "streams", "threads", "windows/s", "median ms", "p99 ms", "windows", "dropped",
         "incomplete", "frames dropped"],
        ["free", "2", "1", "5.0", "40", "40", "50", "3", "2", "7 of 600"],
    ]  # fmt: skip


def test_rows_that_failed_say_why() -> None:
    made = tables(row("b", "free", 4), failed("b", "route 0", "out of memory"),
                  failed("b", "free", "no window", scenario="stream"))  # fmt: skip
    assert made["b: single"][2] == ["route 0", *["-"] * 6, "out of memory"]
    assert made["b: stream, from capture to label"][1][-1] == "no window"
    assert made["As used, routed freely"][2][-1] == "no window"


def test_accuracy_and_energy_stand_beside_the_speed() -> None:
    share = Share(3, 4, 0.75, 0.301, 0.954)
    robust = Robust(8 / 255, "linf", ("pgd",), "transfer from its twin", True, share, (4, 0))
    found = Accuracy(Clean("videos test", share, (3, 1)), (robust,), share)
    drawn = Energy(0.02, 0.019, 0.022, 0.005, 12.5, 3.1, 900)
    method = Method(("CPU, by RAPL",), (), 9.4, 1.0, 3)
    rows = (row("b", "free", 4, accuracy=found, energy=drawn), row("b", "router alone", 1))
    made = tables(*rows, energy=method)
    assert made["As used, routed freely"][1][3:] == [
        "250.0", "75.0 (30.1-95.4)", "75.0 (30.1-95.4)", "20", "5", "12.5",
    ]  # fmt: skip
    assert [line[-1] for line in made["b: single"]] == ["mJ/clip", "20", "-"]
    text = render.text(record(*rows, energy=method))
    assert "Accuracy: 75.0 (30.1-95.4) % of 4 clips of videos test; routes 0: 3, 1: 1" in text
    assert "under pgd, transfer from its twin; routes 0: 4, 1: 0" in text
    assert "Accuracy on the same clips, clean: 75.0" in text
    assert "Energy: 0.02 J/clip (0.019-0.022), 0.005 above idle; 12.5 W, 3.1 above idle" in text
    flat = render.csv(record(*rows)).splitlines()
    assert "clean,clean n,clean low,clean high,robust 8/255," in flat[0]
    assert "joules_per_clip,joules_per_clip_above_idle,watts" in flat[0]
    assert "0.75,4,0.301,0.954" in flat[1]
