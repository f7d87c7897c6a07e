"""Windows whose frames are shared, for the online form: which frames are taken, and when."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmoe.bundle import Part, Port
from vmoe.clips import ClipSpec
from vmoe.errors import EngineMismatchError, SourceError
from vmoe.runtime import online
from vmoe.runtime.frames import Frame
from vmoe.runtime.online import OnlineWindows
from vmoe.runtime.windows import Window

SPEC = ClipSpec(frames=4, spacing_s=0.1, height=8, width=8)


def frames(times_s: Iterable[float], *, first: int = 0, epoch: int = 0) -> list[Frame]:
    """Return frames whose every pixel is their sequence number."""
    return [
        Frame(np.full((16, 16, 3), (first + i) % 256, np.uint8), t, first + i, epoch, t, 1.0)
        for i, t in enumerate(times_s)
    ]


def run(windows: OnlineWindows, given: Iterable[Frame]) -> list[Window]:
    made = [windows.push(frame) for frame in given]
    windows.end()
    return [window for window in made if window is not None]


def seen(window: Window) -> list[int]:
    return [int(frame[0, 0, 0]) for frame in window.clip]


def at(rate: float, seconds: float = 3.0) -> list[float]:
    return [i / rate for i in range(int(rate * seconds))]


def test_every_frame_taken_ends_a_window_that_shares_the_others() -> None:
    made = run(OnlineWindows(SPEC, "x"), frames(at(20, 0.6)))
    assert [seen(w) for w in made] == [[0, 2, 4, 6], [2, 4, 6, 8], [4, 6, 8, 10]]
    assert [w.slot for w in made] == [3, 4, 5]
    assert [w.number for w in made] == [0, 1, 2]
    assert (made[1].frame_first, made[1].frame_last) == (2, 8)
    assert (made[1].t_first_s, made[1].t_s) == (pytest.approx(0.1), pytest.approx(0.4))


@pytest.mark.parametrize("hop_s", [0.1, 0.2, 0.3, 0.25, 0.05])
def test_windows_come_every_hop(hop_s: float) -> None:
    made = run(OnlineWindows(SPEC, "x", hop_s=hop_s), frames(at(20)))
    ends = [w.t_s for w in made]
    due = 0.3 + hop_s * np.arange(len(ends))
    if hop_s > 0.1:
        assert np.abs(np.array(ends) - due).max() <= 0.1 + 1e-6
    else:  # no window but where a frame was taken
        np.testing.assert_allclose(np.diff(ends), 0.1)
    assert len(ends) == len({w.slot for w in made}) >= int(2.65 / max(hop_s, 0.1))


@pytest.mark.parametrize(
    "rate", [9.85, 10, 12, 12.5, 14.985, 15, 23.976, 24, 25, 29.97, 30, 50, 60]
)
@pytest.mark.parametrize("shake", [0.0, 0.15])
def test_a_steady_source_fills_every_window(rate: float, shake: float) -> None:
    """Whatever its rate, and when its clock shakes by a share of a frame: no hole, no drift."""
    count = int(rate * 30)
    times = np.arange(count) / rate
    times += np.random.default_rng(0).uniform(-shake, shake, count) / rate
    windows = OnlineWindows(SPEC, "x")
    made = run(windows, [Frame(np.zeros((8, 8, 3), np.uint8), float(t), i, 0, 0.0, 0.0)
                         for i, t in enumerate(times)])  # fmt: skip
    assert windows.incomplete == 0
    spacing = max(0.1, 1 / rate)
    assert len(made) == pytest.approx((times[-1] - times[0]) / spacing - 2, abs=3)
    assert [w.slot for w in made] == list(range(3, 3 + len(made)))
    held = np.array([w.t_s - w.t_first_s for w in made])
    assert held.mean() == pytest.approx(3 * spacing, rel=0.02)
    assert np.abs(held - 0.3).max() <= 0.1 + 1e-6


def test_a_hole_is_in_no_window_and_counted() -> None:
    given = [f for f in frames(at(20, 2)) if not 15 <= f.sequence <= 17]
    windows = OnlineWindows(SPEC, "x")
    made = run(windows, given)
    assert not [w for w in made if min(seen(w)) < 15 and max(seen(w)) > 17]
    assert windows.incomplete == 3
    assert windows.dropped == 3
    assert windows.epoch == 0
    assert max(np.diff([w.slot for w in made])) == SPEC.frames  # nothing before it is of use


def test_two_wanted_times_in_a_hole_are_passed_over_at_once() -> None:
    windows = OnlineWindows(SPEC, "x")
    made = run(windows, [f for f in frames(at(10, 2)) if f.sequence not in (10, 11)])
    assert windows.epoch == 0
    assert windows.incomplete == 3  # 12, 13 and 14 end none; 15 does
    assert [w.frame_last for w in made] == [*range(3, 10), *range(15, 20)]


def test_what_was_due_in_a_hole_is_not_made_up_for() -> None:
    windows = OnlineWindows(SPEC, "x", hop_s=0.15)
    made = run(windows, [f for f in frames(at(10, 2)) if f.sequence not in (10, 11)])
    assert windows.incomplete == 2  # due at 10.5 and 13.5
    assert [w.frame_last for w in made] == [3, 5, 6, 8, 9, 15, 17, 18]


def test_frames_too_far_from_their_times_make_no_window() -> None:
    times = at(10, 2)
    times[8] -= 0.045
    times[9] += 0.07  # each may be taken, but in one window they are more than a spacing off
    windows = OnlineWindows(SPEC, "x")
    made = run(windows, frames(times))
    assert windows.incomplete == 3
    assert [w.frame_last for w in made] == [*range(3, 9), *range(12, 20)]
    assert [w.slot for w in made] == [*range(3, 9), *range(12, 20)]  # none was thrown away


def test_an_epoch_begins_anew() -> None:
    first = frames(at(20, 0.6))
    second = frames([7 + t for t in at(20, 0.6)], first=12, epoch=1)
    made = run(OnlineWindows(SPEC, "x"), first + second)
    assert [w.epoch for w in made] == [0, 0, 0, 1, 1, 1]
    assert [w.gap for w in made] == [False, False, False, True, False, False]
    assert min(seen(made[3])) == 12
    assert made[3].slot - made[2].slot == SPEC.frames  # type: ignore[operator]


def test_a_slow_source_is_refused_or_its_frames_repeated() -> None:
    with pytest.raises(SourceError, match="a frame every 200 ms"):
        run(OnlineWindows(SPEC, "x"), frames(at(5, 4)))
    made = run(OnlineWindows(SPEC, "x", sampling="nearest"), frames(at(5, 2)))
    assert [seen(w) for w in made][:3] == [[0, 1, 1, 2], [1, 2, 2, 3], [2, 3, 3, 4]]
    assert [w.slot for w in made][:3] == [4, 6, 8]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.005, 0.3), min_size=20, max_size=80),
    st.sampled_from([0.05, 0.1, 0.25, 0.3, 0.7]),
    st.sampled_from(["exact", "nearest"]),
)
def test_windows_of_any_clock_are_chains_of_neighbours(
    gaps: list[float], hop_s: float, sampling: str
) -> None:
    """Two windows share what lies in both: frame by slot they never disagree."""
    times = np.cumsum(gaps)
    windows = OnlineWindows(SPEC, "x", hop_s=hop_s, sampling=sampling)
    taken: dict[int, int] = {}
    try:
        made = run(windows, frames(times.tolist()))
    except SourceError:
        return
    for window in made:
        assert window.slot is not None
        chosen = seen(window)
        for back, sequence in enumerate(reversed(chosen)):
            assert taken.setdefault(window.slot - back, sequence) == sequence
        assert chosen == sorted(chosen)
        if sampling == "exact":
            assert len(set(chosen)) == SPEC.frames
            off = times[chosen] - SPEC.spacing_s * np.arange(SPEC.frames)
            assert np.ptp(off) <= SPEC.spacing_s + 1e-5  # half a spacing, either way
    assert [w.slot for w in made] == sorted({w.slot for w in made})  # type: ignore[type-var]


def part(*shape: int | None) -> Part:
    ports = (Port("clip", "uint8", (None, None, 8, 8, 3)), Port("state0", "float32", shape))
    after = (Port("logits", "float32", (None, 2)), Port("next_state0", "float32", shape))
    return Part("e.onnx", "onnx", {"e.onnx": "0" * 64}, ports, after, {"asked": "", "found": ""})


def test_first_states_are_zeros_of_the_manifests_shape() -> None:
    states = online.first(part(None, 3, 4), 5)
    assert list(states) == ["state0"]
    assert (states["state0"].shape, states["state0"].dtype) == ((5, 3, 4), np.float32)
    assert not states["state0"].any()
    with pytest.raises(EngineMismatchError, match=r"state0 has shape \[None, None, 4\]"):
        online.first(part(None, None, 4), 5)
