"""An adversarial video: its windows are the runtime's, its gradients those of what is prepared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import videos
from tests.twins import SPEC, lively
from vmoe import clips
from vmoe.attacks import video
from vmoe.attacks.judge import of_twin
from vmoe.attacks.modes import Deployed
from vmoe.attacks.on_video import read
from vmoe.attacks.video import Fitting, VideoSettings
from vmoe.clips import Clips, ClipSpec
from vmoe.errors import VmoeError
from vmoe.models import VideoMoE
from vmoe.models.moe import MoEOutput
from vmoe.runtime.engine import Prediction
from vmoe.runtime.frames import Stop
from vmoe.runtime.sources import SourceSettings, file
from vmoe.runtime.windows import Windows


class Bufferless(VideoMoE):
    """A twin that has no parameters of its own, as the graphs of an int8 bundle have none."""

    def __init__(self, twin: VideoMoE) -> None:
        torch.nn.Module.__init__(self)
        self.settings, self.spec, self._twin = twin.settings, twin.spec, [twin]

    def forward(self, *given: Any, **how: Any) -> MoEOutput:
        found: MoEOutput = self._twin[0](*given, **how)
        return found


@pytest.mark.parametrize("size", [(96, 128), (32, 32), (40, 33), (20, 90)])
@pytest.mark.parametrize("resize", ["cover", "stretch"])
def test_what_is_prepared_is_linear_but_for_rounding(size: tuple[int, int], resize: str) -> None:
    spec = ClipSpec(frames=4, height=32, width=32, resize=resize)
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    fit = Fitting(*size, spec)
    pixels = torch.from_numpy(frame).float().permute(2, 0, 1)
    made = (fit.rows @ pixels @ fit.columns.T).permute(1, 2, 0).numpy()
    assert np.abs(made - clips.prepare(frame, spec)).max() < 1
    slope = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    back = fit.back(slope)  # the transpose: <A x, g> = <x, A' g>
    straight = (fit.rows @ pixels @ fit.columns.T * slope).sum()
    assert torch.allclose((pixels * back).sum(), straight, rtol=1e-3)


@pytest.mark.parametrize("fps", [20.0, 29.97])
def test_windows_are_those_that_the_runtime_cuts(tmp_path: Path, fps: float) -> None:
    path = videos.write(tmp_path / "in.mkv", frames=40, fps=fps)
    windows, times = video.cut(40, fps, SPEC, "in.mkv")
    cutter, seen = Windows(SPEC, "in.mkv"), []
    for frame in file.open(str(path), SourceSettings(replay=True)).frames(Stop()):
        window = cutter.push(frame)
        if window is not None:
            seen.append(window)
    assert len(windows) == len(seen)
    frames = np.stack([clips.prepare(frame, SPEC) for frame in read(path)[0]])
    for at, t_s, window in zip(windows, times, seen, strict=True):
        assert (frames[at] == window.clip).all()
        assert t_s == pytest.approx(window.t_s, abs=1e-3)


def test_windows_are_attacked_together_within_the_ball() -> None:
    twin = lively()
    frames = np.stack([videos.picture(number) for number in range(30)])
    how = VideoSettings(eps=8 / 255, steps=4, route_grad=("frozen", "straight-through"))
    found = video.perturb(twin, of_twin(twin), frames, 20.0, how)
    change = np.abs(found.frames.astype(int) - frames)
    assert 0 < change.max() <= 8
    used = np.unique(found.windows)
    assert not change[np.setdiff1d(np.arange(30), used)].any()
    said = of_twin(twin)(Fitting(96, 128, SPEC)(found.frames)[found.windows])
    assert (said.logits.argmax(axis=1) == found.after.logits.argmax(axis=1)).all()
    assert (found.before.logits.argmax(axis=1) != found.after.logits.argmax(axis=1)).any()
    label = int(found.after.logits.argmax(axis=1)[0] + 1) % 4
    twin.requires_grad_(False)
    bare = Deployed(of_twin(twin), twin.settings, twin.spec, Bufferless(twin))
    assert not list(bare.parameters()), "as of a bundle that is int8 throughout"
    again = video.perturb(bare, of_twin(twin), frames, 20.0, how)
    assert (again.frames == found.frames).all()
    once = VideoSettings(eps=8 / 255, steps=1, step=0.01, route_grad=("frozen",))
    later = video.perturb(bare, of_twin(twin), frames, 20.0, once, begin=found.frames)
    said, before = (p.logits.argmax(axis=1) for p in (later.after, found.before))
    assert (said != before).sum() >= (found.after.logits.argmax(axis=1) != before).sum()
    assert np.abs(later.frames.astype(int) - found.frames).max() <= 1
    assert later.queries == 4 * len(found.windows), "two looks, and the judge before and after"
    aimed = video.perturb(twin, of_twin(twin), frames, 20.0, how, target=label)
    reached = aimed.after.logits[:, label] - found.before.logits[:, label]
    assert reached.mean() > 0


def test_soft_is_judged_by_the_hard_choice() -> None:
    twin, windows = lively(), np.arange(16).reshape(4, 4)
    frames = np.stack([clips.prepare(videos.picture(number), SPEC) for number in range(16)])
    hard = torch.from_numpy(of_twin(twin)(frames[windows]).logits)
    goal = video.Goal(hard.argmax(dim=1), None)
    changed, gain, slope = video._look(twin, frames, windows, goal, "soft", 16, "cpu")
    assert changed == 0
    assert gain == pytest.approx(float(goal.of(hard, slice(0, 16)).sum()), rel=1e-4)
    assert slope.any()


@pytest.mark.parametrize("calls", [0, 1])
def test_a_model_that_answers_nan_is_refused_with_the_window(calls: int) -> None:
    twin, said = lively(), []
    frames = np.stack([videos.picture(number) for number in range(30)])
    count = len(video.cut(30, 20.0, SPEC, "it")[0])

    def later(asked: Clips, force_route: Sequence[int] | None = None) -> Prediction:
        found = of_twin(twin)(asked, force_route)
        if len(said) >= calls:
            found.logits[count - 1] = np.nan
        said.append(len(asked))
        return found

    model = Deployed(later, twin.settings, twin.spec, twin)
    how = VideoSettings(eps=8 / 255, steps=1, batch=count)
    with pytest.raises(VmoeError, match=f"window {count - 1}: the model answers NaN to it or near"):
        video.perturb(model, later, frames, 20.0, how)
    assert len(said) == calls + 1
