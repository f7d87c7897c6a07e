"""The online form: frame by frame a bundle says what the causal twin says of whole clips."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from tests import bundles as tiny
from tests import videos
from tests.twins import lively
from vmoe import bundle as bundles
from vmoe import checkpoint, registry
from vmoe.batches import to_tensor
from vmoe.checkpoint import Checkpoint
from vmoe.clips import Clips, ClipSpec
from vmoe.errors import SettingError
from vmoe.export import ExportSettings, bisect, online
from vmoe.export.onnx import Parts
from vmoe.export.pipeline import Plan, write
from vmoe.models import ModelSettings, VideoMoE, build
from vmoe.runtime import Engine, Pipeline, StreamSettings, load
from vmoe.runtime.backends import ENGINES
from vmoe.runtime.engines import SERVER
from vmoe.runtime.frames import Frame, Stop
from vmoe.runtime.online import Follower, OnlineWindows
from vmoe.runtime.sources import RUNNING

SPEC = ClipSpec(frames=11, spacing_s=0.1, height=32, width=32)
LABELS = ("a", "b", "c", "d")
EXPERTS = 3
RUN = "from vmoe.runtime.cli import main; main(prog_name='vmoe-run')"
ERROR = 2e-5  # of logits up to about 10


@pytest.fixture(scope="module")
def twin() -> VideoMoE:
    """Return a causal twin whose norms are no identity and whose router does choose."""
    made = build(ModelSettings("tsm-online", 0.1, EXPERTS, len(LABELS)), SPEC, seed=3).eval()
    drawn = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in made.experts.state_dict().items():
            if value.dim() == 1 and "fc" not in name:
                value.copy_(0.5 + torch.rand(value.shape, generator=drawn))
    made.router = lively(EXPERTS, len(LABELS)).router
    return made


@pytest.fixture(scope="module")
def parts(twin: VideoMoE) -> Parts:
    return online.from_twin(twin, 20)


@pytest.fixture(scope="module")
def path(twin: VideoMoE, parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    file = tmp_path_factory.mktemp("twin") / "twin.safetensors"
    held = Checkpoint(twin, LABELS)
    checkpoint.save(held, file)
    made = ExportSettings(form="online")
    plan = Plan(held, file, "causal", made, sha256=bundles.sha256(file))
    write(plan, parts, folder)
    return folder


@pytest.fixture(scope="module", params=registry.names(ENGINES))
def engine(request: pytest.FixtureRequest, path: Path) -> Iterator[Engine]:
    module = registry.load(ENGINES, request.param, "backend")
    if SERVER in module.FORMATS:
        pytest.skip("a server's backend is tested with one, in test_triton.py")
    why = module.why_unavailable()
    if why:
        pytest.skip(why)
    with load(path, request.param, "cpu", threads=1) as loaded:
        yield loaded


def stream(frames: int, n: int = 1, seed: int = 0) -> Clips:
    """Return streams of coarse noise, whose tint changes now and then, uint8 [N, S, H, W, 3]."""
    rng = np.random.default_rng(seed)
    size = (n, frames, SPEC.height // 8, SPEC.width // 8, 3)
    coarse = rng.integers(40, 216, size).repeat(8, axis=2).repeat(8, axis=3)
    tints = rng.integers(-120, 120, (n, -(-frames // 7), 1, 1, 3)).repeat(7, axis=1)[:, :frames]
    return np.clip(coarse + tints, 0, 255).astype(np.uint8)


def of_twin(twin: VideoMoE, expert: int, clips: Clips) -> NDArray[np.float32]:
    with torch.no_grad():
        said: NDArray[np.float32] = twin.run_expert(expert, to_tensor(clips)).numpy()
    return said


def test_the_manifest_and_the_graphs_say_what_they_are(path: Path) -> None:
    bundle = bundles.read(path)
    assert bundle.extra == {"form": "online"}
    inputs = {p.name: (p.dtype, p.shape) for p in bundle.parts["expert1"].inputs}
    outputs = {p.name: p.shape for p in bundle.parts["expert1"].outputs}
    assert inputs["clip"] == ("uint8", (None, None, 32, 32, 3))
    assert inputs["state0"] == ("float32", (None, 1, 8, 8))
    assert inputs["recent"] == ("float32", (None, 3, len(LABELS)))
    assert list(inputs) == ["clip", *(f"state{i}" for i in range(8)), "recent"]
    assert outputs == {
        "logits": (None, len(LABELS)),
        **{f"next_{name}": shape for name, (_, shape) in inputs.items() if name != "clip"},
    }
    onnx.checker.check_model(path / "expert1.onnx", full_check=True)
    assert [p.shape for p in bundle.parts["router"].inputs] == [(None, *SPEC.shape)]


def test_bisect_finds_the_layer_of_a_causal_expert_too(twin: VideoMoE, parts: Parts) -> None:
    bounds, clips = {"experts": 1e-4, "router": 1e-4}, stream(SPEC.frames, 3)
    assert bisect.find(twin, parts, parts, clips, bounds).part is None
    wrong = onnx.ModelProto()
    wrong.CopyFrom(parts.experts[1])
    weight = next(t for t in wrong.graph.initializer if "layer3.0.conv1" in t.name)
    values = numpy_helper.to_array(weight) + 1
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    broken = Parts(parts.router, [parts.experts[0], wrong, parts.experts[2]])
    found = bisect.find(twin, parts, broken, clips, bounds)
    assert (found.part, found.block) == ("expert1", "experts.1.1.layer3.0")
    assert found.layers == ("experts.1.1.layer3.0.conv1",)


@pytest.mark.parametrize("n", [1, 3])
def test_whole_clips_are_answered_as_by_the_twin(engine: Engine, twin: VideoMoE, n: int) -> None:
    clips = stream(SPEC.frames, n)
    with torch.no_grad():
        wanted = twin(to_tensor(clips), "frozen")
    got = engine.infer(clips)
    assert got.route.tolist() == wanted.route.tolist()
    np.testing.assert_allclose(got.logits, wanted.logits, atol=ERROR)


@pytest.mark.parametrize(("n", "piece"), [(1, 1), (3, 1), (2, 4)])
def test_a_stream_is_answered_as_the_twin_answers_its_clips(
    engine: Engine, twin: VideoMoE, n: int, piece: int
) -> None:
    frames, states = stream(30, n), None
    for end in range(piece, 31, piece):
        logits, states = engine.follow(1, frames[:, end - piece : end], states)
        if end >= SPEC.frames:
            wanted = of_twin(twin, 1, frames[:, end - SPEC.frames : end])
            assert wanted.std() > 100 * ERROR
            np.testing.assert_allclose(logits, wanted, atol=ERROR)


def test_the_error_that_an_export_measures(engine: Engine) -> None:
    assert online.error(engine, stream(SPEC.frames, 2)) < ERROR


def test_states_that_are_mixed_up_are_an_error_that_whole_clips_do_not_show(
    path: Path, twin: VideoMoE, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(path, wrong)
    model = onnx.load(path / "expert2.onnx", load_external_data=False)
    names = {"next_state1": "next_state2", "next_state2": "next_state1"}  # of one shape
    for node in model.graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]
    onnx.save(model, wrong / "expert2.onnx")
    manifest, old = wrong / "vmoe.json", bundles.sha256(path / "expert2.onnx")
    manifest.write_text(manifest.read_text().replace(old, bundles.sha256(wrong / "expert2.onnx")))
    clips = stream(SPEC.frames, 2)
    with load(wrong, "onnxruntime", "cpu", threads=1) as engine:
        whole = engine.infer(clips, force_route=2).logits
        np.testing.assert_allclose(whole, of_twin(twin, 2, clips), atol=ERROR)
        assert online.error(engine, clips) > 10 * ERROR


@pytest.mark.parametrize("seed", range(4))
def test_a_follower_says_of_every_window_what_the_window_says(engine: Engine, seed: int) -> None:
    """Through flips, holes, breaks, and windows that are dropped before the engine."""
    rng = np.random.default_rng(seed)
    times = 0.05 * np.arange(160) + rng.uniform(-0.01, 0.01, 160)
    times[90:] += 0.13  # a hole
    times[130:] += 5.0  # a break
    frames = stream(160, 1, seed)[0]
    windows = OnlineWindows(SPEC, "x", hop_s=float(rng.choice([0.1, 0.2, 0.5])))
    follower, labelled, routes = Follower(engine), 0, []
    for i, (t, pixels) in enumerate(zip(times, frames, strict=True)):
        window = windows.push(Frame(pixels, float(t), i, 0, float(t), 0.0))
        if window is None or rng.random() < 0.1:
            continue
        got, wanted = follower.infer(window), engine.infer(window.clip[None])
        assert got.route.tolist() == wanted.route.tolist()
        np.testing.assert_allclose(got.logits, wanted.logits, atol=ERROR)
        np.testing.assert_allclose(got.scores, wanted.scores, atol=1e-6)
        routes.append(int(got.route[0]))
        labelled += 1
    assert len(set(routes)) > 1
    assert windows.incomplete
    assert windows.epoch == 1
    assert 2 <= follower.warm_ups < labelled
    assert follower.frames < labelled * SPEC.frames


class Given:
    """A source of noise, 20 frames a second, that is connected anew in the middle."""

    name, live, fps, state = "given", False, 20.0, RUNNING

    def frames(self, stop: Stop) -> Generator[Frame, None, None]:
        for i, pixels in enumerate(stream(120)[0]):
            yield Frame(pixels, i / 20, i, int(i >= 60), time.monotonic(), 0.1)


def test_a_pipeline_follows_the_stream(engine: Engine) -> None:
    frames = stream(120)[0]
    pipeline = Pipeline(engine, [Given()], StreamSettings(top=len(LABELS)))
    got = list(pipeline.results())
    assert (pipeline.online, pipeline.hop_s) == (True, SPEC.spacing_s)
    assert [r.frame_last for r in got] == [*range(20, 60, 2), *range(80, 120, 2)]
    assert [r.epoch for r in got] == [0] * 20 + [1] * 20
    tally = pipeline.tally
    assert 2 <= tally.warm_ups < 20
    assert tally.frames_run < len(got) * SPEC.frames / 2
    assert "frame by frame" in "".join(tally.lines())
    for r in got[::3]:
        clip = frames[r.frame_first : r.frame_last + 1 : 2]
        wanted = engine.infer(clip[None])
        assert r.expert == wanted.route[0]
        shares = torch.from_numpy(wanted.logits[0]).softmax(0)
        assert dict(r.top) == pytest.approx(dict(zip(LABELS, shares.tolist(), strict=True)))


def test_vmoe_run_follows_a_file(path: Path, tmp_path: Path) -> None:
    video = videos.write(tmp_path / "a.avi", 40, 20.0)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), "--source", str(video), "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["frame_last"] for r in results] == list(range(20, 40, 2))
    assert "every 0.10 s, frame by frame" in done.stderr
    assert "frame by frame: " in done.stderr


def test_what_has_no_online_form_is_refused(twin: VideoMoE) -> None:
    short = build(twin.settings, dataclasses.replace(SPEC, frames=8))
    with pytest.raises(SettingError, match=r"clips have 8 frames.*train with --frames 9 or more"):
        online.from_twin(short, 20)
    with pytest.raises(SettingError, match=r"tsm is not causal: train --arch tsm-online"):
        online.from_twin(lively(2), 20)


def test_a_window_bundle_follows_no_stream(tmp_path: Path, spec: ClipSpec) -> None:
    with (
        load(tiny.write(tmp_path / "b", spec)) as engine,
        pytest.raises(SettingError, match="no expert 0 that follows a stream"),
    ):
        engine.follow(0, np.zeros((1, 1, 32, 32, 3), np.uint8))


def test_frames_of_another_shape_are_refused(engine: Engine) -> None:
    with pytest.raises(SettingError, match=r"frames are uint8 \[1, 0, 32, 32, 3\]"):
        engine.follow(0, np.zeros((1, 0, 32, 32, 3), np.uint8))
    with pytest.raises(SettingError, match=r"frames are float32 \[1, 1, 32, 32, 3\]"):
        engine.follow(0, np.zeros((1, 1, 32, 32, 3), np.float32))  # type: ignore[arg-type]
