"""Tables, intervals and plain JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vmoe.report import percent, plain, table, to_csv, wilson


def test_table_is_aligned_and_markdown() -> None:
    text = table([["pgd", 12.5, None], ["j|tlga", 3, 1]], ["attack", "robust", "s"])
    assert text.splitlines() == [
        "| attack  | robust |   s |",
        "| ------- | -----: | --: |",
        "| pgd     |   12.5 |   - |",
        "| j\\|tlga |      3 |   1 |",
    ]


def test_table_without_rows_still_has_its_head() -> None:
    assert table([], ["a", "b"]).splitlines() == ["| a   | b   |", "| --- | --- |"]


def test_table_refuses_a_row_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"zip|argument"):
        table([["a", "b", "c"]], ["one", "two"])


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)  # the last is Newcombe's example (Statistics in Medicine 17, 1998)
def test_wilson_as_published(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_ends_at_the_ends_exactly() -> None:
    assert all(wilson(0, n)[0] == 0 and wilson(n, n)[1] == 1 for n in range(1, 200))


def test_nothing_measured_is_no_figure() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert percent(0, 0) == "-"
    assert percent(5, 10) == "50.0 (23.7-76.3)"


def test_plain_is_json() -> None:
    value = plain(
        {"a": np.arange(2), "b": float("nan"), "c": Path("x"), "d": (np.float32(1), None)}
    )
    assert json.loads(json.dumps(value, allow_nan=False)) == {
        "a": [0, 1], "b": None, "c": "x", "d": [1.0, None],
    }  # fmt: skip


def test_csv_has_the_columns_of_all_rows() -> None:
    rows = [{"attack": "a,b", "eps": 8 / 255}, {"attack": "worst-of", "n": 3, "eps": None}]
    assert to_csv(rows) == f'attack,eps,n\n"a,b",{8 / 255!r},\nworst-of,,3\n'
