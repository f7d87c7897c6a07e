"""An adversarial video: one perturbation of all its frames, under which windows change their label.

    frames uint8 [F, H, W, 3] -> prepared as the runtime does -> its windows -> engine and twin

Windows overlap, so that a frame serves several of them, and they are attacked together. Frames
change on the grid of uint8, at the size of the video: what is found is what is written.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vmoe import clips
from vmoe.attacks.grid import radius
from vmoe.attacks.judge import Bools, Judge
from vmoe.attacks.loop import as_found
from vmoe.attacks.losses import answer, margin, silent
from vmoe.attacks.modes import Deployed
from vmoe.batches import to_tensor
from vmoe.cli import progress
from vmoe.clips import ClipSpec
from vmoe.errors import SettingError, VmoeError
from vmoe.models import VideoMoE
from vmoe.runtime.engine import Prediction
from vmoe.runtime.frames import Frame
from vmoe.runtime.windows import Windows
from vmoe.settings import Settings, opt

Frames = NDArray[np.uint8]  # [F, H, W, 3]
SURE = 1.0  # a window whose logits are wrong by so much is left alone


@dataclass(frozen=True)
class VideoSettings(Settings):
    """How a video is attacked."""

    eps: float = opt(8 / 255, "L-infinity budget, on pixels in [0, 1]", above=0, at_most=1)
    steps: int = opt(30, "gradient steps", at_least=1)
    step: float = opt(0.25, "first step, as a share of eps; the last is one grey level", above=0)
    route_grad: tuple[str, ...] = opt(
        ("straight-through",), "how gradients pass the hard choice; taken in turn"
    )
    batch: int = opt(16, "windows attacked at once", at_least=1)


class Found(NamedTuple):
    """What came of a video.

    Attributes:
        frames: the best found, uint8 [F, H, W, 3], within eps of the given ones.
        before: what the engine says of each window as given.
        after: what it says of each window of `frames`.
        windows: the frames of each window, [N, T].
        times_s: when each window ends, [N].
        queries: windows that model and judge were asked about.
        seconds: of all of it.
    """

    frames: Frames
    before: Prediction
    after: Prediction
    windows: NDArray[np.int64]
    times_s: NDArray[np.float64]
    queries: int
    seconds: float


def cut(count: int, fps: float, spec: ClipSpec, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the windows that the runtime cuts of a video of a constant rate.

    Args:
        count: how many frames it has.
        fps: frames per second; timestamps are whole milliseconds, as Matroska has them.
        spec: of the clips.
        name: of the video, for errors.

    Returns:
        The frames of each window, int [N, T], and the time of its last one in seconds, [N].

    Raises:
        SourceError: its frames are too far apart for the spec.
        SettingError: it is shorter than one window.
    """
    cutter = Windows(spec, name)
    made = []
    for number in range(count):
        pixels = np.zeros((spec.height, spec.width, 3), np.uint8)
        pixels[0, 0] = number >> 16 & 255, number >> 8 & 255, number & 255  # read back below
        t_s = round(1000 * number / fps) / 1000
        made.append(cutter.push(Frame(pixels, t_s, number, 0, 0.0, 0.0)))
    cutter.end()
    found = [window for window in made if window is not None]
    if not found:
        raise SettingError(
            f"{name} has {count} frames, {count / fps:.2f} s: too short for one window of "
            f"{spec.window_s:g} s."
        )
    marks = np.stack([window.clip[:, 0, 0] for window in found]).astype(np.int64)
    return marks @ np.array([1 << 16, 1 << 8, 1]), np.array([window.t_s for window in found])


class Fitting:
    """What `clips.prepare` does to frames of one size, and its transpose: it is linear, but rounds.

    Attributes:
        rows: [h, H], `prepared = rows frame columns^T`.
        columns: [w, W].
    """

    def __init__(self, height: int, width: int, spec: ClipSpec) -> None:
        """Find both matrices, by preparing frames that are 0 but for a line."""
        self._spec = spec
        self.rows = torch.from_numpy(_along(height, width, spec, 0))
        self.columns = torch.from_numpy(_along(height, width, spec, 1))

    def __call__(self, frames: Frames) -> Frames:
        """Prepare frames as the runtime does, uint8 [F, h, w, 3]."""
        return np.stack([clips.prepare(frame, self._spec) for frame in frames])

    def back(self, slope: Tensor) -> Tensor:
        """Return the gradient of a frame, [3, H, W], from that of the prepared one, [3, h, w]."""
        return self.rows.T @ slope @ self.columns


def _along(height: int, width: int, spec: ClipSpec, axis: int) -> NDArray[np.float32]:
    """Return the matrix of one axis, [out, in]: what a line of a frame gives to each of it."""
    lines = []
    for first in range(0, (height, width)[axis], 3):  # a line in each channel
        frame: Any = np.zeros((height, width, 3), np.float32)
        for channel, line in enumerate(range(first, min(first + 3, frame.shape[axis]))):
            frame[(slice(None),) * axis + (line,)][..., channel] = 1
        out: Any = clips.prepare(frame, spec)  # of floats, which are not rounded
        lines.append(out[:, 0] if axis == 0 else out[0])
    return np.ascontiguousarray(np.concatenate(lines, axis=1)[:, : (height, width)[axis]])


def perturb(
    model: VideoMoE, judge: Judge, frames: Frames, fps: float, settings: VideoSettings,
    *, target: int | None = None, name: str = "the video", device: torch.device | str = "cpu",
    begin: Frames | None = None,
) -> Found:  # fmt: skip
    """Change a video's frames so that its windows get other labels, or one that is wanted.

    Maximises the sum over windows of min(max_{i != y} F_i - F_y, SURE), y what is said of the clean
    window (of a target t, min(F_t - max_{i != t} F_i, SURE)), by sign steps that shrink. The best
    frames are those that most windows are changed by, then those of the largest sum.

    Args:
        model: where values and gradients come from: the twin, or an engine with its twin.
        judge: what says the labels.
        frames: uint8 [F, H, W, 3].
        fps: frames per second.
        settings: budget and steps.
        target: index of the label that is wanted; None for any other.
        name: of the video, for errors.
        device: where the model is.
        begin: frames within eps to begin from, kept where nothing is better; None is the video's.

    Raises:
        SourceError: its frames are too far apart for the model.
        SettingError: it is shorter than one window, or nothing can be changed within eps.
        VmoeError: a model answers NaN; names the window.
    """
    most = radius(settings.eps)
    if not most:
        raise SettingError(f"--eps is {settings.eps:g}: no grey level of a uint8 frame can change.")
    began = time.perf_counter()
    spec = model.spec
    windows, times = cut(len(frames), fps, spec, name)
    fit = Fitting(frames.shape[1], frames.shape[2], spec)
    before = _answers(judge, fit(frames), windows, settings.batch)
    label = torch.from_numpy(before.logits.argmax(axis=1))
    goal = Goal(label, target)
    moved = (frames if begin is None else begin).copy()
    best, held = moved.copy(), (-1, -np.inf)
    used = np.unique(windows)
    asked = model.asked if isinstance(model, Deployed) else 0
    with as_found(model):
        for k in progress(range(settings.steps + 1), "steps", settings.steps + 1):
            way = settings.route_grad[k % len(settings.route_grad)]
            changed, gain, slope = _look(
                model, fit(moved), windows, goal, way, settings.batch, device
            )
            if (changed, gain) > held:
                best, held = moved.copy(), (changed, gain)
            if k < settings.steps:
                size = max(1, round(settings.step * most * (1 - k / settings.steps)))
                for f in used:
                    moved[f] = _stepped(moved[f], frames[f], fit.back(slope[f]), size, most)
    after = _answers(judge, fit(best), windows, settings.batch)
    looks = len(windows) * (settings.steps + 1)
    queries = 2 * len(windows) + (model.asked - asked if isinstance(model, Deployed) else looks)
    return Found(
        best, before, after, windows, times, queries, time.perf_counter() - began
    )  # fmt: skip


class Goal(NamedTuple):
    """What is wanted of windows: any label but their own, [N], or one target."""

    label: Tensor
    target: int | None

    def of(self, logits: Tensor, at: slice) -> Tensor:
        """Return how far the goal is reached, [b]: above 0 where it is."""
        if self.target is None:
            return margin(logits, self.label[at].to(logits.device))
        return -margin(logits, torch.full((len(logits),), self.target, device=logits.device))


def _look(
    model: VideoMoE, prepared: Frames, windows: NDArray[np.int64], goal: Goal, way: str, batch: int,
    device: torch.device | str,
) -> tuple[int, float, Tensor]:  # fmt: skip
    """Return how many windows are changed, the loss, and its gradient by prepared frame."""
    slope = torch.zeros(len(prepared), 3, *prepared.shape[1:3])
    changed, gain = 0, 0.0
    for start in range(0, len(windows), batch):
        at = slice(start, start + batch)
        clip = to_tensor(prepared[windows[at]], device).requires_grad_()
        out, hard = answer(model, clip, way)
        _refuse_silent(silent(hard, out.scores).cpu().numpy(), start)
        loss = goal.of(out.logits, at).clamp_max(SURE).sum()
        (found,) = torch.autograd.grad(loss, clip)
        each = found.cpu().permute(0, 2, 1, 3, 4).flatten(0, 1)  # by window, then frame
        slope.index_add_(0, torch.from_numpy(windows[at].reshape(-1)), each)
        reached = goal.of(hard.detach(), at)  # of the hard choice, also by `soft`
        changed += int((reached > 0).sum())
        gain += float(reached.clamp_max(SURE).sum())
    return changed, gain, slope


def _stepped(moved: Frames, clean: Frames, slope: Tensor, size: int, most: int) -> Frames:
    """Return a frame after one step, uint8 [H, W, 3], within `most` levels of the clean one."""
    up = size * slope.sign().permute(1, 2, 0).numpy().astype(np.int16)
    low, high = clean.astype(np.int16) - most, clean.astype(np.int16) + most
    stepped = np.clip(moved.astype(np.int16) + up, low, high)
    made: Frames = np.clip(stepped, 0, 255).astype(np.uint8)
    return made


def _answers(judge: Judge, prepared: Frames, windows: NDArray[np.int64], batch: int) -> Prediction:
    """Return what is said of every window."""
    parts = [judge(prepared[windows[i : i + batch]]) for i in range(0, len(windows), batch)]
    found = Prediction(*(np.concatenate(each) for each in zip(*parts, strict=True)))
    answers = np.concatenate([found.logits, found.scores], axis=1)
    _refuse_silent(np.asarray(np.isnan(answers).any(axis=1)), 0)
    return found


def _refuse_silent(which: Bools, first: int) -> None:
    """Refuse windows, numbered from the first, that a model answers NaN to."""
    if which.any():
        raise VmoeError(
            f"window {first + int(np.flatnonzero(which)[0])}: the model answers NaN to it or near "
            "it; no label of this model would mean anything. Look at its weights."
        )
