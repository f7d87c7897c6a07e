"""The guard: its terms in closed form, its promise, and what it does."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tests import bundles
from vmoe.clips import ClipSpec
from vmoe.errors import SettingError
from vmoe.runtime import Engine, Pipeline, StreamSettings, cli, load
from vmoe.runtime.frames import Stop
from vmoe.runtime.guard import ABSTAIN, ENFORCE, MONITOR, VOTE, Guard, calibration, profile, terms
from vmoe.runtime.results import ABSTAINED, Result
from vmoe.runtime.sinks import Sink
from vmoe.runtime.sources._iterator import IteratorSource


def shares(*values: float) -> np.ndarray:
    return np.array(values)


def test_terms_in_closed_form() -> None:
    assert terms.entropy(shares(0.25, 0.25, 0.25, 0.25)) == pytest.approx(1)
    assert terms.entropy(shares(1, 0)) == pytest.approx(0)
    assert terms.entropy(shares(1)) == terms.closeness(shares(1)) == 0
    assert terms.closeness(shares(0.1, 0.7, 0.2)) == pytest.approx(0.5)
    assert terms.change(shares(0.7, 0.3), shares(0.2, 0.8)) == pytest.approx(0.5)
    assert terms.histogram([0, 2, 2, 2], 4) == pytest.approx([0.25, 0, 0.75, 0])


def test_filters() -> None:
    clips = np.zeros((1, 5, 8, 8, 3), np.uint8)
    clips[0, 2] = 200  # a flash of one frame
    assert not terms.filtered(clips, "median").any()
    ramp = np.arange(5, dtype=np.uint8)[None, :, None, None, None] * np.ones_like(clips)
    assert (terms.median(ramp) == ramp).all()
    flat = np.full_like(clips, 90)
    assert np.abs(terms.filtered(flat, "jpeg").astype(int) - 90).max() <= 2
    assert terms.jpeg(clips).shape == clips.shape
    assert (terms.filtered(flat, "bilateral") == 90).all()
    edge = np.where(np.arange(8) < 4, 0, 200).astype(np.uint8)[:, None] * np.ones_like(clips)
    rough = edge + np.random.default_rng(0).integers(0, 9, edge.shape).astype(np.uint8)
    smooth = terms.bilateral(rough).astype(float) - edge
    assert smooth.std() < 0.5 * (rough.astype(float) - edge).std()  # and the edge is still there


def test_windows_are_compared_with_the_one_before_where_they_overlap() -> None:
    found = terms.Terms(2, None)

    def give(share: float, weight: float, epoch: int, t_s: float) -> dict[str, float]:
        return found.of(
            shares(share, 1 - share), shares(weight, 1 - weight), 0, epoch=epoch,
            t_first_s=t_s - 0.3, t_s=t_s, age_s=0.1,
        )  # fmt: skip

    assert "label_change" not in give(0.9, 0.8, 0, 1.0)
    second = give(0.6, 0.7, 0, 1.2)
    assert second["label_change"] == pytest.approx(0.3)
    assert second["route_change"] == pytest.approx(0.1)
    assert "label_change" not in give(0.9, 0.8, 0, 1.6)  # a gap between them
    assert "label_change" not in give(0.9, 0.8, 1, 1.7)  # another epoch


def test_routes_that_drift_and_labels_that_are_late() -> None:
    found = terms.Terms(2, shares(1.0, 0.0))
    got = [
        found.of(shares(1, 0), shares(1, 0), int(i >= 16), epoch=0, t_first_s=i, t_s=i + 0.5,
                 age_s=1.0 if i == 20 else 0.4)
        for i in range(48)
    ]  # fmt: skip
    assert "route_drift" not in got[14]
    assert [got[i]["route_drift"] for i in (15, 31, 47)] == [0, 0.5, 1]
    assert [i for i, one in enumerate(got) if terms.AGE in one] == [20]
    assert got[20][terms.AGE] == pytest.approx(1)


def made(values: np.ndarray, false_alarms: float = 0.05) -> profile.Profile:
    windows = [({"label_change": float(value), terms.AGE: 3.0}, 0) for value in values]
    return profile.make([windows], experts=1, twin="t", hop_s=0.2, filter="off",
                        false_alarms=false_alarms)  # fmt: skip


def test_the_false_alarm_rate_is_kept_on_clean_windows_that_were_not_seen() -> None:
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(20):
        clean = made(rng.exponential(size=400))
        fresh = [clean.strangeness({"label_change": x}) for x in rng.exponential(size=500)]
        rates.append(np.mean([sum(parts.values()) > clean.threshold for parts in fresh]))
    assert 0.02 < np.mean(rates) <= 0.05 + 0.01


def test_strangeness_is_how_rare_a_value_is_on_clean_video() -> None:
    clean = made(np.repeat(np.linspace(0, 1, 101), 2))
    parts = clean.strangeness({"label_change": 0.5, "unknown": 9.0})
    assert parts == {"label_change": pytest.approx(math.log(2), abs=0.03)}
    assert clean.strangeness({"label_change": -1.0})["label_change"] == 0
    beyond = clean.strangeness({"label_change": 2.0})["label_change"]  # u is 0.95, b 0.025
    assert beyond == pytest.approx(math.log(20) + (2 - 0.95) / 0.025, rel=0.06)
    same = made(np.zeros(100)).strangeness({"label_change": 0.1})  # b is at least a hundredth
    assert same == {"label_change": pytest.approx(10)}
    assert clean.strangeness({terms.AGE: 1.0}) == {terms.AGE: 11.0}


def test_too_few_clean_windows_are_refused() -> None:
    with pytest.raises(SettingError, match=r"30 clean windows cannot tell .*0\.01; it takes 200"):
        made(np.arange(30.0), 0.01)


def test_a_profile_is_written_and_read(tmp_path: Path) -> None:
    clean = made(np.linspace(0, 1, 100))
    profile.write(clean, tmp_path / "g.json")
    again = profile.read(tmp_path / "g.json")
    assert again.threshold == clean.threshold
    assert again.quantiles["label_change"] == pytest.approx(clean.quantiles["label_change"])
    text = (tmp_path / "g.json").read_text()
    for old, new in (('"twin"', '"tvin"'), ('"off"', '"blur"'), ("{", "")):
        (tmp_path / "bad.json").write_text(text.replace(old, new, 1))
        with pytest.raises(
            SettingError, match=r"bad\.json is no guard's profile, or damaged\. Make one"
        ):
            profile.read(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text(json.dumps({"schema_version": 9}))
    with pytest.raises(SettingError, match="is of another version; this one reads 2"):
        profile.read(tmp_path / "bad.json")
    with pytest.raises(SettingError, match=r"no\.json: No such file.*--guard-calibrate"):
        profile.read(tmp_path / "no.json")


def test_votes_are_rationed() -> None:
    clean = made(np.linspace(0, 1, 100))
    guard = Guard(ENFORCE, clean, on_alarm=VOTE, vote_share=0.02)
    acted = [
        guard.judge(
            shares(1, 0) if i % 2 else shares(0, 1), shares(1.0), 0, epoch=0, t_first_s=i * 0.1,
            t_s=i * 0.1 + 0.3, age_s=9.0,
        ).acted
        for i in range(6)
    ]  # fmt: skip
    assert acted == [VOTE, VOTE, ABSTAIN, ABSTAIN, ABSTAIN, ABSTAIN]


# --- in a stream --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, spec: ClipSpec) -> Iterator[Engine]:
    path = bundles.write(tmp_path_factory.mktemp("b") / "b", spec)
    with load(path, all_parts=True) as loaded:
        yield loaded


def source(reds: list[int]) -> IteratorSource:
    return IteratorSource([np.full((32, 32, 3), (red, 100, 0), np.uint8) for red in reds], fps=20.0)


def run(
    engine: Engine, reds: list[int], settings: StreamSettings, *sinks: Sink,
    calibrate: str | None = None,
) -> list[Result]:  # fmt: skip
    pipeline = Pipeline(engine, [source(reds)], settings, calibrate=calibrate)
    return list(pipeline.results(sinks))


@pytest.mark.parametrize("look", ["off", "bilateral"])
def test_a_stream_is_calibrated_watched_and_acted_on(
    engine: Engine, tmp_path: Path, look: str
) -> None:
    path = tmp_path / "g.json"
    rng = np.random.default_rng(1)
    clean = [int(red) for red in rng.integers(0, 30, 260)]
    sink = calibration.open(path, bundle=engine.bundle, hop_s=0.1, filter=look, false_alarms=0.05)
    run(engine, clean, StreamSettings(hop=0.1), sink, calibrate=look)
    clean_terms = profile.read(path)
    assert clean_terms.histogram.tolist() == [1, 0, 0]
    assert ("filter_change" in clean_terms.quantiles) == (look != "off")

    attacked = [*clean[:40], *rng.choice([0, 255], 40).tolist()]  # routes and labels jump
    found = {}
    for mode, on_alarm in ((MONITOR, ABSTAIN), (ENFORCE, ABSTAIN), (ENFORCE, VOTE)):
        settings = StreamSettings(hop=0.1, guard=mode, guard_profile=path, on_alarm=on_alarm)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(engine, "run_all", _slow(engine.run_all))
            found[mode, on_alarm] = run(engine, attacked, settings)
    watched, refused, voted = found.values()
    alarms = [r.guard.alarm for r in watched if r.guard]
    assert sum(alarms[:14]) <= 3
    assert sum(alarms[-15:]) >= 5
    assert {r.guard.acted for r in watched if r.guard} == {""}
    assert [r.label == ABSTAINED for r in refused] == alarms
    plain = run(engine, attacked, StreamSettings(hop=0.1))
    assert [r.label for r in watched] == [r.label for r in plain]
    assert all(r.guard is None and r.to_json()["guard"] is None for r in plain)
    by_all = [r for r in voted if r.guard and r.guard.acted == VOTE]
    assert len(by_all) == sum(alarms)
    assert {r.label for r in by_all} == {"waving"}  # what all experts of this model say
    assert min(min(r.age_ms, r.stage_ms["infer_ms"]) for r in by_all) > 20  # the vote counts


def test_after_a_calibration_the_next_command_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = cli.RunSettings(
        source=("a.mp4",), hop=0.2, guard_calibrate=Path("g.json"), guard_filter="bilateral",
        false_alarms=0.05,
    )  # fmt: skip
    said = shlex.split(cli._next_command(Path("b"), settings, live=False))
    given: list[cli.RunSettings] = []
    monkeypatch.setattr(cli, "_run", lambda bundle, settings, **more: given.append(settings))
    done = CliRunner().invoke(cli.command, said[1:], obj=Stop())
    assert done.exit_code == 0, done.output
    assert (given[0].guard, given[0].guard_profile) == (MONITOR, Path("g.json"))
    assert (given[0].source, given[0].hop, given[0].guard_calibrate) == (("a.mp4",), 0.2, None)


def test_a_guard_that_was_silent_is_said_too(engine: Engine) -> None:
    pipeline = Pipeline(engine, [IteratorSource(iter([]))], StreamSettings())
    assert cli._guarded(pipeline) == []
    pipeline.guard_mode = MONITOR
    assert cli._guarded(pipeline) == ["guard (monitor): 0 alarms in 0 windows"]


def test_a_second_look_runs_the_routed_experts_alone(engine: Engine) -> None:
    clips = np.zeros((3, *engine.bundle.spec.shape), np.uint8)
    clips[1, ..., 0] = 255
    ran: list[str] = []
    route = [0, 2, 0]
    wanted = engine.infer(clips, force_route=route).logits
    with pytest.MonkeyPatch.context() as patched:
        run_part = engine._run
        patched.setattr(engine, "_run", lambda name, *a: (ran.append(name), run_part(name, *a))[1])
        assert (engine.expert_logits(clips, route) == wanted).all()
    assert ran == ["expert0", "expert2"]


def test_a_filter_is_refused_where_no_clip_is_run_whole(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engine.bundle.extra, "form", "online")
    why = "the guard's filter is jpeg; a bundle in the online form runs no clip whole"
    with pytest.raises(SettingError, match=why):
        Pipeline(engine, [source([0])], calibrate="jpeg")
    Pipeline(engine, [source([0])], calibrate="off")


def _slow(run_all: Any) -> Any:
    def slow(clip: Any) -> Any:
        time.sleep(0.02)
        return run_all(clip)

    return slow


def test_a_profile_of_another_model_or_pace_is_refused(engine: Engine, tmp_path: Path) -> None:
    other = made(np.linspace(0, 1, 100))
    profile.write(other, tmp_path / "g.json")
    settings = StreamSettings(guard=MONITOR, guard_profile=tmp_path / "g.json", hop=0.3)
    with pytest.raises(SettingError, match=r"profile is of another model \(t\)"):
        Pipeline(engine, [source([0])], settings)
    profile.write(
        profile.Profile(**{**vars(other), "twin": engine.bundle.twin["sha256"]}),
        tmp_path / "g.json",
    )
    with pytest.raises(SettingError, match=r"profile is for --hop 0\.2, not 0\.3"):
        Pipeline(engine, [source([0])], settings)
    with pytest.raises(SettingError, match=r"guard\.json: No such file"):
        Pipeline(engine, [source([0])], StreamSettings(guard=ENFORCE))


def test_a_calibration_that_failed_writes_nothing(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    sink = calibration.open(path, bundle=engine.bundle, hop_s=0.1, filter="off", false_alarms=0.01)
    with pytest.raises(
        SettingError, match=r"clean windows cannot tell a false-alarm rate of 0\.01"
    ):
        run(engine, [0] * 20, StreamSettings(hop=0.1), sink, calibrate="off")
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(SettingError, match=r"g\.json exists.*--overwrite"):
        calibration.open(path, bundle=engine.bundle, hop_s=0.1, filter="off", false_alarms=0.01)
