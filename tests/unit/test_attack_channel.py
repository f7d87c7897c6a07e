"""What clips go through: the real codec clip by clip, and a likeness of it with gradients."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.twins import SPEC, random_clips
from vmoe.attacks import channel
from vmoe.attacks.channel import Channel
from vmoe.batches import to_tensor
from vmoe.clips import Clips, ClipSpec
from vmoe.data import DataSettings, open_data
from vmoe.errors import MissingDependencyError, SettingError, VmoeError

NEEDS_FFMPEG = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
CLIPS = random_clips(3)


@pytest.fixture(scope="module")
def seen() -> Clips:
    """Return rendered clips: codecs are made for pictures, not for noise."""
    data = open_data("camera-motion", "test", ClipSpec(), DataSettings(augment=("none",)))
    return np.stack([data[i][0] for i in range(3)])


def coded(*codecs: tuple[str, int]) -> list[Channel]:
    return [Channel(*codec) for codec in codecs]


@NEEDS_FFMPEG
@pytest.mark.parametrize("which", coded(("h264", 23), ("mjpeg", 80)))
def test_a_clip_is_coded_alone(which: Channel) -> None:
    whole = which.real(CLIPS, SPEC)
    assert whole.shape == CLIPS.shape
    assert whole.dtype == np.uint8
    assert (whole[1:2] == which.real(CLIPS[1:2], SPEC)).all()
    assert 0.2 < np.abs(whole.astype(int) - CLIPS).mean() < 8


@pytest.mark.parametrize("quality", [30, 80])
def test_the_likeness_of_jpeg_is_like_it_and_has_a_gradient(quality: int, seen: Clips) -> None:
    which, spec = Channel("mjpeg", quality), ClipSpec()
    real, clip = to_tensor(which.real(seen, spec)), to_tensor(seen).requires_grad_()
    (made,) = which.likenesses(clip, spec)
    assert (real - made).abs().mean().item() < (real - clip).abs().mean().item() / 2
    (slope,) = torch.autograd.grad(made.sum(), clip)
    assert (slope.abs().amax(dim=(1, 2, 3, 4)) > 0).all()


@NEEDS_FFMPEG
def test_the_likeness_of_h264_is_like_it_at_a_camera_s_size(seen: Clips) -> None:
    which, spec = Channel("h264", 23, (160, 120)), ClipSpec()
    real, clip = to_tensor(which.real(seen, spec)), to_tensor(seen)
    (made,) = which.likenesses(clip, spec)
    assert float((real - made).abs().mean()) < 0.8 * float((real - clip).abs().mean())


def test_a_camera_s_picture_keeps_the_clip_s_shape() -> None:
    spec = ClipSpec()
    assert Channel(camera=(640, 480)).picture(spec) == (480, 480)
    assert Channel(camera=(322, 243)).picture(spec) == (244, 244)  # even, for H.264
    assert Channel().picture(spec) == (64, 64)
    which = Channel(camera=(160, 128))
    real = to_tensor(which.real(CLIPS, SPEC))
    (made,) = which.likenesses(to_tensor(CLIPS), SPEC)
    assert float((255 * (real - made)).abs().max()) < 2


def test_an_expectation_is_over_the_qualities_around_the_one_named() -> None:
    assert Channel("h264", 23, draws=4)._qualities() == [23, 26, 20, 29]
    assert Channel("mjpeg", 95, draws=3)._qualities() == [95, 100, 85]
    assert len(Channel("mjpeg", 50, draws=3).likenesses(to_tensor(CLIPS), SPEC)) == 3


def test_what_is_parsed() -> None:
    assert channel.parse(None, None, None) is None
    assert channel.parse("none", None, None) is None
    assert channel.parse("h264:23", "640x480", 3) == Channel("h264", 23, (640, 480), 3)
    assert channel.parse("none", "640x480", None) == Channel(camera=(640, 480))
    with pytest.raises(SettingError, match="--codec is none:3; none has no quality"):
        channel.parse("none:3", None, None)


@NEEDS_FFMPEG
def test_pictures_of_odd_size_are_refused() -> None:
    odd = ClipSpec(frames=4, height=33, width=33)
    with pytest.raises(SettingError, match="codes pictures of even size, these are 33x33"):
        Channel("h264", 23).require(odd)
    Channel("h264", 23, (64, 64)).require(odd)
    Channel("mjpeg", 23).require(odd)


def test_a_picture_beyond_what_jpeg_holds() -> None:
    with pytest.raises(VmoeError, match=r"OpenCV cannot code a JPEG of 65536x1\."):
        channel._jpeg(np.zeros((1, 65536, 3), np.uint8), 80)


def test_an_ffmpeg_that_loses_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "ffmpeg"
    command.write_text("#!/bin/sh\ncat >/dev/null\nprintf lost\n")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(VmoeError, match=f"ffmpeg gives 4 bytes back for {CLIPS.size}: it lost"):
        Channel("h264", 23).real(CLIPS, SPEC)


@pytest.mark.parametrize(
    ("says", "kind", "why"),
    [
        ("Unknown encoder 'libx264'", MissingDependencyError, "has no libx264"),
        ("Cannot allocate memory", VmoeError, "ffmpeg failed: Cannot allocate memory"),
    ],
)
def test_an_ffmpeg_that_fails(
    says: str, kind: type[Exception], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "ffmpeg"
    command.write_text(f'#!/bin/sh\necho "{says}" >&2\nexit 1\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(kind, match=why):
        Channel("h264", 23).real(CLIPS, SPEC)
