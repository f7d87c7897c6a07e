"""Windows: frames with true timestamps into clips."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from vmoe import clips
from vmoe.clips import ClipSpec
from vmoe.errors import SettingError, SourceError
from vmoe.runtime import windows as windows_of
from vmoe.runtime.frames import Frame
from vmoe.runtime.online import OnlineWindows
from vmoe.runtime.windows import Window, Windows, default_hop_s

SPEC = ClipSpec(frames=4, spacing_s=0.1, height=8, width=8)


def frames(times_s: Iterable[float], *, first: int = 0, epoch: int = 0) -> list[Frame]:
    """Return frames whose every pixel is their sequence number."""
    return [
        Frame(np.full((16, 16, 3), first + i, np.uint8), t, first + i, epoch, t, 1.0)
        for i, t in enumerate(times_s)
    ]


def run(windows: Windows, given: Iterable[Frame]) -> list[Window]:
    made = [windows.push(frame) for frame in given]
    windows.end()
    return [window for window in made if window is not None]


def seen(window: Window) -> list[int]:
    return [int(frame[0, 0, 0]) for frame in window.clip]


def test_frames_are_chosen_by_time_and_hops_counted_from_the_first_window() -> None:
    made = run(Windows(SPEC, "x", hop_s=0.2), frames(i * 0.05 for i in range(20)))
    assert [seen(w) for w in made] == [
        [0, 2, 4, 6],
        [4, 6, 8, 10],
        [8, 10, 12, 14],
        [12, 14, 16, 18],
    ]
    assert [w.number for w in made] == [0, 1, 2, 3]
    assert (made[1].frame_first, made[1].frame_last) == (4, 10)
    assert made[1].t_first_s == pytest.approx(0.2)
    assert made[1].t_s == pytest.approx(0.5)
    assert made[0].clip.shape == SPEC.shape


def test_default_hop_is_half_of_a_windows_frames_and_at_least_one_spacing() -> None:
    assert default_hop_s(SPEC) == pytest.approx(0.2)
    assert default_hop_s(ClipSpec(frames=1, spacing_s=0.1)) == pytest.approx(0.1)


def test_a_source_as_fast_as_the_spacing_fills_windows() -> None:
    made = run(Windows(SPEC, "x", hop_s=0.1), frames(i * 0.1 for i in range(6)))
    assert [seen(w) for w in made] == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]


def test_frames_of_a_shaking_clock_are_the_nearest_ones() -> None:
    times = [0.0, 0.04, 0.11, 0.14, 0.19, 0.26, 0.31]
    made = run(Windows(SPEC, "x"), frames(times))
    assert [seen(w) for w in made] == [[0, 2, 4, 6]]  # wanted: 0.01, 0.11, 0.21, 0.31


def test_a_window_never_holds_frames_of_two_epochs() -> None:
    first = frames([i * 0.1 for i in range(6)])
    second = frames([0.6 + i * 0.1 for i in range(6)], first=6, epoch=1)
    made = run(Windows(SPEC, "x", hop_s=0.1), first + second)
    assert [w.epoch for w in made] == [0, 0, 0, 1, 1, 1]
    assert min(made[3].clip.ravel()) == 6
    assert [w.gap for w in made] == [False, False, False, True, False, False]


def test_lost_frames_are_counted_and_a_hole_makes_windows_incomplete() -> None:
    given = [f for f in frames(i * 0.1 for i in range(12)) if f.sequence not in (5, 6)]
    windows = Windows(SPEC, "x", hop_s=0.1)
    made = run(windows, given)
    assert (windows.frames, windows.dropped) == (10, 2)
    assert [w.frame_last for w in made] == [3, 4, 10, 11]
    assert windows.incomplete == 3  # those that end with frames 7, 8, 9
    assert [w.dropped for w in made] == [0, 0, 2, 0]


@pytest.mark.parametrize("count", [3, 30])
def test_a_slow_source_is_refused_and_both_spacings_are_named(count: int) -> None:
    with pytest.raises(SourceError, match=r"x has a frame every 400 ms.*every 100 ms.*nearest"):
        run(Windows(SPEC, "x"), frames(i * 0.4 for i in range(count)))


def test_a_slow_source_is_resampled_on_request() -> None:
    made = run(Windows(SPEC, "x", sampling="nearest", hop_s=0.2), frames([0.0, 0.45, 0.9]))
    assert [seen(w) for w in made] == [[0, 1, 1, 1], [1, 2, 2, 2]]


def test_dropped_frames_do_not_make_a_source_slow() -> None:
    given = frames(i * 0.1 for i in range(40))[::4]
    windows = Windows(SPEC, "x")
    assert run(windows, given) == []
    assert windows.frame_s == pytest.approx(0.1)
    assert windows.incomplete > 0


@pytest.mark.parametrize("sampling", ["exact", "nearest"])
@pytest.mark.parametrize("hole_s", [0.6, 60.0])
def test_a_hole_in_the_times_is_a_new_epoch(sampling: str, hole_s: float) -> None:
    times = [i * 0.1 for i in range(8)] + [0.7 + hole_s + i * 0.1 for i in range(8)]
    windows = Windows(SPEC, "x", hop_s=0.1, sampling=sampling)
    made = run(windows, frames(times))
    assert [seen(w) for w in made[:5]] == [[i, i + 1, i + 2, i + 3] for i in range(5)]
    assert [seen(w) for w in made[5:]] == [[i, i + 1, i + 2, i + 3] for i in range(8, 13)]
    assert [w.epoch for w in made] == [0] * 5 + [1] * 5
    assert [w.gap for w in made] == [False] * 5 + [True] + [False] * 4
    assert (windows.incomplete, windows.epoch) == (0, 1)


def test_epochs_of_the_source_and_breaks_add_up() -> None:
    first = frames([0.0, 0.1, 0.2, 0.3, 5.0, 5.1, 5.2, 5.3])
    second = frames([5.4, 5.5, 5.6, 5.7], first=8, epoch=1)
    made = run(Windows(SPEC, "x"), first + second)
    assert [(w.epoch, w.gap) for w in made] == [(0, False), (1, True), (2, True)]


@pytest.mark.parametrize("apart_s", [0.4, 1.0, 30.0])
def test_a_slow_but_regular_source_has_no_breaks(apart_s: float) -> None:
    made = run(Windows(SPEC, "x", sampling="nearest"), frames(i * apart_s for i in range(20)))
    assert len(made) == 19
    assert {(w.epoch, w.gap) for w in made} == {(0, False)}


def test_a_source_that_becomes_slow_is_broken_only_until_that_is_usual() -> None:
    times = [i / 30 for i in range(30)] + [1 + i * 0.5 for i in range(40)]
    made = run(Windows(SPEC, "x", sampling="nearest"), frames(times))
    assert len({w.epoch for w in made}) == 2
    assert [w.epoch for w in made][-30:] == [made[-1].epoch] * 30


@pytest.mark.parametrize("windows", [Windows, OnlineWindows])
def test_a_source_that_becomes_slow_later_is_told_once(
    windows: type[Windows], caplog: pytest.LogCaptureFixture
) -> None:
    times = [i / 30 for i in range(60)] + [2 + i * 0.15 for i in range(100)]
    given = frames(times)
    run(windows(SPEC, "x"), given)
    line = "x has become slow: a frame every 150 ms, where this model wants one every 100 ms"
    assert [line in record.message for record in caplog.records] == [True]
    caplog.clear()
    lost = [f for f in frames(i / 30 for i in range(250)) if f.sequence < 60 or not f.sequence % 5]
    run(windows(SPEC, "x"), lost)  # what was dropped on the way is no fault of the source
    run(windows(SPEC, "x", sampling="nearest"), given)
    assert caplog.records == []


def test_late_is_against_the_last_minute_since_clocks_drift() -> None:
    windows = Windows(SPEC, "x")
    (one,) = frames([0.0])
    for i in range(3000):
        windows.push(replace(one, t_s=i / 10, sequence=i, arrived_s=i / 10 * 1.0005))
    assert windows.late == 0  # against the first frame the last would be 0.15 s late
    windows.push(replace(one, t_s=300.0, sequence=3000, arrived_s=300.4))
    assert windows.late == 1


def test_a_frame_is_prepared_when_a_window_takes_it_and_only_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepared: list[int] = []
    prepare = clips.prepare

    def noting(frame: clips.Frame, spec: ClipSpec) -> clips.Frame:
        prepared.append(int(frame[0, 0, 0]))
        return prepare(frame, spec)

    monkeypatch.setattr(clips, "prepare", noting)
    made = run(Windows(SPEC, "x"), frames(i / 30 for i in range(100)))
    assert prepared == sorted({number for window in made for number in seen(window)})
    assert prepared == list(range(0, 100, 3))[: len(prepared)]  # two of three never are
    prepared.clear()
    made = run(Windows(SPEC, "x", hop_s=1.0), frames(i * 0.1 for i in range(34)))
    assert prepared == [n for window in made for n in seen(window)]  # none between windows


@pytest.mark.parametrize(
    ("size", "share"), [((480, 640), 1 / 3), ((720, 1280), 1 / 3), ((1080, 1920), 1)]
)
def test_which_sizes_are_prepared_for_windows_alone(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], share: float
) -> None:
    prepared: list[int] = []

    def counted(frame: clips.Frame, spec: ClipSpec) -> clips.Frame:
        prepared.append(1)
        return np.zeros(spec.shape[1:], np.uint8)

    monkeypatch.setattr(clips, "prepare", counted)
    pixels = np.broadcast_to(np.uint8(0), (*size, 3))  # as large as it says, in one byte
    spec = ClipSpec(frames=8, spacing_s=0.1, height=8, width=8)
    run(Windows(spec, "x"), [Frame(pixels, i / 30, i, 0, i / 30, 0.0) for i in range(300)])
    assert len(prepared) / 300 == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("room", [0, 5, 100])
def test_all_that_preparing_took_is_in_the_windows_times(
    monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    now = [0.0]
    prepare = clips.prepare

    def slow(frame: clips.Frame, spec: ClipSpec) -> clips.Frame:
        now[0] += 1
        return prepare(frame, spec)

    given = frames(i * 0.02 for i in range(86))  # the last of which ends a window
    monkeypatch.setattr(clips, "prepare", slow)
    monkeypatch.setattr(windows_of, "RAW_BYTES", room * given[0].pixels.nbytes)
    monkeypatch.setattr(windows_of, "time", SimpleNamespace(monotonic=lambda: now[0]))
    made = run(Windows(SPEC, "x"), given)
    assert made[-1].frame_last == len(given) - 1
    assert sum(window.stage_ms["prepare_ms"] for window in made) == 1000 * now[0]
    assert now[0] >= (len(given) - room if room < 100 else 1)


def test_no_frame_is_kept_when_a_source_has_ended() -> None:
    windows, kept = Windows(SPEC, "x"), []
    for frame in frames(i * 0.05 for i in range(20)):
        windows.push(frame)
        kept = [weakref.ref(frame.pixels)]
    del frame
    assert kept[0]() is not None
    windows.end()
    assert kept[0]() is None
    assert windows.frames == 20


def test_frames_as_they_came_are_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    given = frames(i * 0.01 for i in range(200))
    monkeypatch.setattr(windows_of, "RAW_BYTES", 5 * given[0].pixels.nbytes)
    windows, made = Windows(SPEC, "x"), []
    for frame in given:
        made.append(windows.push(frame))
        assert sum(kept.raw_bytes > 0 for kept in windows._ring) <= 5
        assert len(windows._ring) <= 0.36 / 0.01 + 2
    monkeypatch.undo()
    got = [seen(window) for window in made if window is not None]
    assert got == [seen(window) for window in run(Windows(SPEC, "x"), given)]


def test_one_frame_models_have_windows_too() -> None:
    spec = ClipSpec(frames=1, spacing_s=0.1, height=8, width=8)
    assert [seen(w) for w in run(Windows(spec, "x"), frames([0.0, 0.1, 0.2]))] == [[0], [1], [2]]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(SettingError, match="--hop is 0"):
        Windows(SPEC, "x", hop_s=0)
    with pytest.raises(SettingError, match="--sampling is 'fast'"):
        Windows(SPEC, "x", sampling="fast")
