"""--compare: the threshold's text, the bootstrap against closed forms, planted regressions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vmoe.errors import SettingError, VmoeError
from vmoe.runtime.bench import compare
from vmoe.runtime.bench.compare import (
    FAILED,
    FASTER,
    FEW,
    SAME,
    SLOWER,
    UNCLEAR,
    Comparison,
    Key,
    Side,
)
from vmoe.runtime.bench.statistics import Times

CONTEXT = {
    "cpu": "AMD EPYC", "cores": 2, "gpu": None, "board": None, "virtual": True, "load_1min": 0.1,
    "python": "3.12.1", "versions": {"vmoe": "1", "onnxruntime": "1.20"},
}  # fmt: skip


def key(form: str = "free", **more: Any) -> Key:
    own = {"bundle": "b", "scenario": "single", "batch": 1, "streams": 1, "threads": None,
           "backend": "onnxruntime"}  # fmt: skip
    return Key(**{**own, **more, "form": form})


def noisy(median: float, seed: int, n: int = 200, spread: float = 0.05) -> Times:
    return median * np.exp(spread * np.random.default_rng(seed).standard_normal(n))


def side(times: dict[Key, Times], **more: Any) -> Side:
    failed, cpu = more.pop("failed", {}), more.pop("cpu_ms", {})
    return Side({**CONTEXT, **more}, times, failed, cpu)


def compared(old: Side, new: Side, threshold: float = 0.05) -> Comparison:
    return compare.compare(old, new, threshold)


# ---- the threshold


@pytest.mark.parametrize(
    ("text", "share"),
    [("5%", 0.05), ("0.05", 0.05), (" 2.5 % ", 0.025), ("0", 0.0), (".1", 0.1), ("150%", 1.5)],
)
def test_a_threshold_is_a_share_or_in_per_cent(text: str, share: float) -> None:
    assert compare.parse_threshold(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("5", "--fail-over 5 could mean 5 % or 5 times: write 5% or 0.05."),
        ("1", "--fail-over 1 could mean 1 % or 1 times: write 1% or 0.01."),
        ("-5%", "--fail-over is '-5%': write 5% or 0.05."),
        ("five", "--fail-over is 'five': write 5% or 0.05."),
        ("", "--fail-over is '': write 5% or 0.05."),
    ],
)
def test_a_threshold_of_two_meanings_or_none_is_refused(text: str, says: str) -> None:
    with pytest.raises(SettingError) as found:
        compare.parse_threshold(text)
    assert str(found.value) == says


# ---- the bootstrap


def test_the_error_of_a_median_is_that_of_the_normal_distribution() -> None:
    rng = np.random.default_rng(0)
    found = [compare.standard_error(noisy(5, seed, 400), rng) for seed in range(20)]
    closed = 0.05 * np.sqrt(np.pi / 2 / 400)  # of log times: sigma sqrt(pi / 2n)
    assert np.mean(found) == pytest.approx(closed, rel=0.15)


def test_equal_times_have_no_error() -> None:
    assert compare.standard_error(np.full(9, 5.0), np.random.default_rng(0)) < 1e-12
    assert compare.block_length(np.full(9, 5.0)) == 1


def drifting(seed: int, n: int = 400, keep: float = 0.9) -> Times:
    """Return times whose logarithms follow an AR(1), of deviation 5 %."""
    rng = np.random.default_rng(seed)
    x = [rng.standard_normal()]
    for step in rng.standard_normal(n - 1):
        x.append(keep * x[-1] + np.sqrt(1 - keep**2) * step)
    return 5 * np.exp(0.05 * np.array(x))


def test_blocks_are_as_long_as_times_are_alike() -> None:
    assert np.median([compare.block_length(noisy(5, seed)) for seed in range(20)]) == 1
    lengths = [compare.block_length(drifting(seed)) for seed in range(20)]
    assert 15 <= np.median(lengths) <= 60  # 0.9 ** lag falls below 0.1 at 22
    assert max(lengths) <= 100


def test_drift_widens_the_interval_to_what_medians_vary_by() -> None:
    rng = np.random.default_rng(0)
    truth = np.std([np.log(np.median(drifting(seed))) for seed in range(300)])
    found = np.median([compare.standard_error(drifting(seed), rng) for seed in range(20)])
    alone = 0.05 * np.sqrt(np.pi / 2 / 400)
    assert truth > 3 * alone
    assert 0.5 * truth < found < 1.3 * truth


# ---- rows


def test_only_what_exceeds_threshold_and_noise_is_slower() -> None:
    old = side(
        {key(f): noisy(5, i) for i, f in enumerate("abcd")} | {key("e"): noisy(5, 9, 12, 0.4)}
    )
    new = side({
        key("a"): noisy(5.00, 11), key("b"): noisy(5.15, 12), key("c"): noisy(6, 13),
        key("d"): noisy(4, 14), key("e"): noisy(5.6, 19, 12, 0.4),
    })  # fmt: skip
    made = compared(old, new)
    assert {line.key.form: line.found for line in made.lines} == {
        "a": SAME, "b": SAME, "c": SLOWER, "d": FASTER, "e": SAME,
    }  # fmt: skip
    (worst,) = made.regressions
    assert worst.ratio == pytest.approx(1.2, rel=0.03)
    assert worst.low is not None
    assert worst.high is not None
    assert 1.1 < worst.low < worst.ratio < worst.high < 1.3
    assert worst.minima == pytest.approx(1.2, rel=0.1)
    assert compare.summary(made).startswith(
        "1 of 5 rows is slower by more than 5 %; the worst: b c"
    )
    assert {line.key.form for line in compared(old, new, 0.0).regressions} == {"b", "c"}


def test_a_hundred_unchanged_rows_are_all_the_same() -> None:
    old = side({key(str(i)): noisy(5, i, 50) for i in range(100)})
    new = side({key(str(i)): noisy(5, 1000 + i, 50) for i in range(100)})
    assert compared(old, new, 0.0).regressions == ()


def test_cpu_times_are_shown_and_judge_nothing() -> None:
    busy = (
        side({key(): noisy(5, 0)}, cpu_ms={key(): 4.0}),
        side({key(): noisy(9, 1)}, cpu_ms={key(): 4.1}),
    )
    (line,) = compared(*busy).lines
    assert line.cpu == pytest.approx(1.025)
    assert line.found == SLOWER
    (coarse,) = compared(side({key(): noisy(5, 0)}, cpu_ms={key(): 0.0}), busy[1]).lines
    assert coarse.cpu is None


def test_too_few_calls_are_said_and_never_fail() -> None:
    made = compared(side({key(): np.full(5, 5.0)}), side({key(): np.full(50, 50.0)}))
    (line,) = made.lines
    assert (line.found, line.low) == (FEW, None)
    assert compare.summary(made) == (
        "none of 1 rows is slower by more than 5 %; 1 not judged: fewer than 6 calls."
    )


def test_medians_that_the_minima_do_not_follow_are_unclear() -> None:
    old = noisy(5, 0)
    shifted = np.append(3 * old[1:], old.min())
    made = compared(side({key(): old}), side({key(): shifted}))
    assert made.lines[0].found == UNCLEAR
    assert made.regressions == ()
    assert compare.summary(made) == (
        "none of 1 rows is slower by more than 5 %; 1 unclear: the minima disagree, measure alone."
    )
    back = compared(side({key(): shifted}), side({key(): old}))
    assert back.lines[0].found == UNCLEAR


def test_a_row_that_fails_now_is_a_regression() -> None:
    made = compared(side({key(): noisy(5, 0)}), side({}, failed={key(): "out of memory"}))
    assert [line.found for line in made.regressions] == [FAILED]
    assert "the worst: b free single onnxruntime: fails now." in compare.summary(made)
    assert made.only_old == ()


def test_rows_of_one_side_are_named() -> None:
    one, other = key("route 0"), key("free", batch=8, threads=2, scenario="offline")
    made = compared(side({key(): noisy(5, 0), one: noisy(5, 1)}),
                    side({key(): noisy(5, 2), other: noisy(5, 3)}))  # fmt: skip
    assert (made.only_old, made.only_new) == ((one,), (other,))
    text = compare.to_text(made)
    assert "only in the old one: b single onnxruntime: route 0." in text
    assert "only in this one: b offline batch 8 threads 2 onnxruntime: free." in text


def test_other_machines_versions_and_loads_are_said() -> None:
    old = side({key(): noisy(5, 0)}, cpu="Cortex-A78AE", cores=6, load_1min=5.9)
    new = side({key(): noisy(5, 1)}, versions={"vmoe": "1", "openvino": "2026.1"})
    assert compared(old, new).remarks == (
        "the machines differ: cpu AMD EPYC (was Cortex-A78AE), cores 2 (was 6): the ratios are "
        "theirs, too.",
        "the versions differ: openvino 2026.1 (was none), onnxruntime none (was 1.20).",
        "load 5.9 on 6 cores then: others were running; see minima and CPU.",
    )
    assert compared(old, old).remarks[0].startswith("load")


def test_the_table_reads_old_new_ratio_and_interval() -> None:
    made = compared(side({key(batch=4): np.full(50, 4.0)}), side({key(batch=4): np.full(50, 5.0)}))
    cells = [cell.strip() for cell in compare.to_table(made).splitlines()[2].split("|")[1:-1]]
    assert cells == ["b", "free", "single, batch 4, onnxruntime", "4", "5", "1.25", "1.25-1.25",
                     "1.25", "-", "slower"]  # fmt: skip
    (row,) = compare.to_json(made)["rows"]
    for name, value in {
        "old_ms": 4,
        "new_ms": 5,
        "ratio": 1.25,
        "low": 1.25,
        "minima": 1.25,
    }.items():
        assert row[name] == pytest.approx(value)
    assert {**key(batch=4)._asdict(), "found": SLOWER}.items() <= row.items()


# ---- files


def record(**more: Any) -> dict[str, Any]:
    row = {**key()._asdict(), "why": None, "samples_ms": {"wall": [1.0, 2.0], "cpu": []}}
    failed = {**key("route 0")._asdict(), "why": "it broke"}
    return {"schema_version": 2, "context": CONTEXT, "rows": [row, failed], **more}


def test_a_record_is_read_as_out_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(record()))
    read = compare.load(path, 2)
    assert read.times_ms[key()].tolist() == [1, 2]
    assert read.failed == {key("route 0"): "it broke"}
    compare.check_common(read, [key("route 1"), key()])
    with pytest.raises(VmoeError) as found:
        compare.check_common(read, [key("route 1")])
    assert str(found.value) == (
        f"--compare {path} has no row of this run: it has b free single onnxruntime, this run b "
        "route 1 single onnxruntime. Give the bundles and flags of its command."
    )


def without(values: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != name} for row in values["rows"]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not json", "is not JSON: Expecting value"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is no record of vmoe-bench"),
        ('{"schema_version": 2}', "is no record of vmoe-bench"),
        (json.dumps(record(schema_version=1)), "has schema version 1; this vmoe compares 2"),
        (json.dumps(record(rows=without(record(), "samples_ms"))), "has no samples"),
        (json.dumps(record(rows=without(record(), "batch"))), "damaged: key 'batch' is missing"),
        (json.dumps(record(rows=[3])), "is damaged"),
        (
            json.dumps(record()).replace("[1.0, 2.0]", "[1.0, -2.0]"),
            "damaged: the samples of b free single onnxruntime are no times",
        ),
        (json.dumps(record()).replace("[1.0, 2.0]", '["a"]'), "is damaged"),
    ],
)
def test_a_file_that_is_no_such_record_is_refused_in_one_line(
    tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(VmoeError) as found:
        compare.load(path, 2)
    assert found.value.exit_code == 1
    assert says in str(found.value)
    assert str(found.value).endswith("Measure again: vmoe-bench BUNDLE --out FILE.")
    assert "\n" not in str(found.value)


def test_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        VmoeError, match=r"--compare .*/nowhere: No such file or directory. Measure"
    ):
        compare.load(tmp_path / "nowhere", 2)
    with pytest.raises(VmoeError, match="Is a directory"):
        compare.load(tmp_path, 2)
