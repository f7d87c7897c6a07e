"""vmoe-attack --video: read a video, perturb all of it, write it without loss, say what changed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

import vmoe
from vmoe import cli
from vmoe import report as texts
from vmoe import video as files
from vmoe.attacks import flags as given_by
from vmoe.attacks import grid
from vmoe.attacks.asked import Asked
from vmoe.attacks.deployed import ALL, How, Target, open_target
from vmoe.attacks.flags import RunSettings
from vmoe.attacks.judge import of_twin
from vmoe.attacks.modes import ADAPTIVE, TRANSFER
from vmoe.attacks.video import Found, Frames, VideoSettings, perturb
from vmoe.cli import log
from vmoe.errors import SettingError, UnknownNameError, VmoeError
from vmoe.runtime.frames import Stop
from vmoe.runtime.online import is_online
from vmoe.runtime.sources import SourceSettings, file
from vmoe.settings import format_eps

SUFFIX = ".mkv"  # the only one of vmoe.video that is lossless
MOST_BYTES = 1 << 30  # of decoded frames; about 5 times as much is held


@dataclass(frozen=True)
class Wanted:
    """What is to be done to a video.

    Attributes:
        source: the video.
        out: where the adversarial one is written, .mkv.
        settings: budget and steps.
        mode: transfer or adaptive.
        label: wanted of every window; None for any other than its own.
    """

    source: Path
    out: Path
    settings: VideoSettings
    mode: str
    label: str | None


def attack(asked: Asked, source: Path, path: Path, which: str, say: Callable[[str], Any]) -> None:
    """Do what --video asks.

    Args:
        asked: the command line.
        source: the video.
        path: what is attacked.
        which: the line that says so.
        say: says a line.

    Raises:
        SettingError: an output that cannot be written, a label that is none of the model's, or a
            video that cannot be attacked.
        SourceError: a video that cannot be read.
        VmoeError: what was read back is not what was written.
    """
    settings = cli.resolve(RunSettings, {**asked.flags, "step": None, "steps": None}, asked.config)
    if not path.is_dir():
        given_by.refuse(asked.given & {"mode", "backend"}, "a checkpoint has no engine")
    _refuse(source, asked.save_adv, settings.mode)
    assert asked.save_adv is not None  # refused above
    if len(settings.eps) > 1:
        raise SettingError("--video is attacked within one budget: give one --eps.")
    values = {name: asked.flags[name] for name in ("step", "steps", "route_grad", "batch")}
    values |= {"eps": next(iter(settings.eps), None)}
    how = VideoSettings(**{name: value for name, value in values.items() if value is not None})
    opened_as = How(asked.twin, asked.device, (), settings.backend)
    with open_target(path, opened_as) as opened:
        _refuse_target(opened, asked.to_label)
        adaptive = settings.mode != (TRANSFER,) and bool(opened.engines)
        mode = ADAPTIVE if adaptive else TRANSFER
        wanted = Wanted(source, asked.save_adv, how, mode, asked.to_label)
        say(which)
        say(f"attack: {mode}, L-infinity, eps {format_eps(how.eps)}, {how.steps} steps")
        if asked.dry_run:
            return
        report = _run(wanted, opened, say)
    if asked.as_json:
        cli.print_json(report)
    else:
        click.echo("\n" + _text(report))
    say(f"video: {asked.save_adv}")
    say(f"next: vmoe-run {path} --source {asked.save_adv}")


def _refuse(source: Path, out: Path | None, modes: tuple[str, ...]) -> None:
    """Refuse, before any work, what cannot be written, and modes that no video has.

    Raises:
        SettingError: see above.
    """
    if out is None:
        raise SettingError("--video wants --save-adv OUT.mkv, where the adversarial video goes.")
    if out.suffix.lower() != SUFFIX:
        raise SettingError(
            f"--save-adv is {out}; an adversarial video is written without loss, to a file "
            f"{out.stem}{SUFFIX}."
        )
    if out.exists():
        raise SettingError(f"{out} exists. Choose another --save-adv.")
    if modes not in ((TRANSFER,), (ADAPTIVE,), (ALL,)):
        raise SettingError(f"--video {source} needs gradients: --mode transfer or adaptive, one.")


def _refuse_target(opened: Target, label: str | None) -> None:
    """Refuse, before any work, what no video can be made for.

    Raises:
        SettingError: several engines, one of the online form, or a label that is none of theirs.
    """
    if len(opened.engines) > 1:
        raise SettingError("--video attacks one engine: leave --compare and --backend all out.")
    if any(is_online(engine.bundle) for engine in opened.engines.values()):
        raise SettingError(
            f"--video cuts windows as vmoe-run does of other bundles; {opened.path} is of the "
            "online form, whose windows share frames: attack an export with --form window."
        )
    if label is not None and label not in opened.labels:
        raise UnknownNameError("label (--to-label)", label, opened.labels)


def _run(asked: Wanted, opened: Target, say: Callable[[str], Any]) -> dict[str, Any]:
    """Attack a video, write it, read it back, and report what the engine says of what was read.

    Raises:
        SettingError: a video that cannot be attacked.
        SourceError: a video that cannot be read.
        VmoeError: what was read back is not what was written.
    """
    target = None if asked.label is None else opened.labels.index(asked.label)
    name, judge = next(iter(opened.judges.items()))
    assert opened.twin is not None  # the caller opened it with one
    model = opened.twin.twin
    if opened.engines:
        ((name, engine),) = opened.engines.items()
        judge = engine.infer
        if asked.mode == ADAPTIVE:
            model = opened.deployed(adaptive=True)[name].model
    else:
        judge = of_twin(model, opened.device)
    frames, fps = read(asked.source)
    say(
        f"video: {asked.source}, {len(frames)} frames of {frames.shape[2]}x{frames.shape[1]}, "
        f"{fps:.4g} a second"
    )
    work = functools.partial(
        perturb, judge=judge, frames=frames, fps=fps, settings=asked.settings, target=target,
        name=str(asked.source), device=opened.device,
    )  # fmt: skip
    found = work(opened.twin.twin)
    if asked.mode == ADAPTIVE:  # from the transfer's frames on, as of clips
        first, found = found, work(model, begin=found.frames)
        found = found._replace(
            queries=first.queries + found.queries, seconds=first.seconds + found.seconds
        )
    with files.writing(asked.out, fps, frames.shape[1:3]) as append:
        for frame in found.frames:
            append(frame)
    again, _ = read(asked.out)
    if again.shape != frames.shape or (again != found.frames).any():
        raise VmoeError(f"{asked.out} does not read back as it was written: FFV1 is lossy here.")
    return _report(asked, opened, found, frames, fps)


def read(path: Path) -> tuple[Frames, float]:
    """Return the frames of a video, as the runtime decodes them, and their rate.

    Raises:
        SourceError: it cannot be read.
        SettingError: it is too long to be held.
    """
    opened = file.open(str(path), SourceSettings(replay=True))
    held, times, size = [], [], 0
    for frame in opened.frames(Stop()):
        held.append(frame.pixels)
        times.append(frame.t_s)
        size += frame.pixels.nbytes
        if size > MOST_BYTES:
            raise SettingError(
                f"{path} has more than {MOST_BYTES >> 20} MiB of frames ({len(held)} are "
                f"{times[-1]:.1f} s): cut it with ffmpeg -t."
            )
    apart = np.diff(times)
    if len(apart) and np.abs(apart - 1 / opened.fps).max() > 0.5 / opened.fps:
        log.warning("%s has frames at uneven times; %g a second are written.", path, opened.fps)
    return np.stack(held), opened.fps


def _report(
    asked: Wanted, opened: Target, found: Found, frames: Frames, fps: float
) -> dict[str, Any]:
    before, after = (p.logits.argmax(axis=1) for p in (found.before, found.after))
    labels = opened.labels
    wanted = after == labels.index(asked.label) if asked.label else after != before
    levels = grid.linf(found.frames[None], frames[None])
    made: dict[str, Any] = texts.plain({
        "vmoe": vmoe.__version__, "target": str(opened.path), "video": str(asked.source),
        "saved": str(asked.out), "mode": asked.mode, "eps": asked.settings.eps,
        "frames": len(frames), "fps": fps, "linf": levels, "windows": len(before),
        "changed": int((before != after).sum()), "reached": int(wanted.sum()),
        "to_label": asked.label, "flips": int((found.before.route != found.after.route).sum()),
        "queries": found.queries, "seconds": found.seconds,
        "said": [
            {"t_s": t, "before": labels[a], "after": labels[b], "routes": [int(c), int(d)]}
            for t, a, b, c, d in zip(
                found.times_s, before, after, found.before.route, found.after.route, strict=True
            )
        ],
    })  # fmt: skip
    return made


def _text(report: dict[str, Any]) -> str:
    """Return a report as text: one line for each run of windows that say the same."""
    rows = []
    runs = itertools.groupby(report["said"], key=lambda w: (w["before"], w["after"]))
    for (before, after), each in runs:
        held = list(each)
        span = f"{held[0]['t_s']:.2f}-{held[-1]['t_s']:.2f}"
        rows.append([span, len(held), before, after])
    shown = texts.table(rows, ("windows that end at, s", "windows", "label", "adversarial label"))
    aim = f", {report['reached']} to {report['to_label']}" if report["to_label"] else ""
    return (
        f"{shown}\n\n{report['changed']} of {report['windows']} windows change their label{aim}; "
        f"{report['flips']} their route; eps {format_eps(report['eps'])}, the largest change in "
        f"the saved frames is {report['linf']} grey levels; {report['queries']} windows asked in "
        f"{report['seconds']:.0f} s"
    )
