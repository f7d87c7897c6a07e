"""What an adversary's video goes through before a model sees it: camera size, codec, uint8.

    clip -> size of the camera's picture -> codec -> decoded uint8 -> prepared as the runtime does

Who judges, judges through the real codec: H.264 by ffmpeg (libx264), Motion JPEG by OpenCV. Every
clip is coded as a video of its own, so that no clip hangs on those beside it. Gradients pass a
likeness of it (`Likeness`), the expectation over the qualities around the one that is named.

Source: expectation over transformation, Athalye, Engstrom, Ilyas and Kwok, ICML 2018; rounding
with a slope, that of (x - [x])^3, Shin and Song, "JPEG-resistant adversarial images", 2017.
"""

from __future__ import annotations

import functools
import hashlib
import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vmoe import clips as prepared
from vmoe.attacks.judge import Judge
from vmoe.clips import Clips, ClipSpec
from vmoe.errors import MissingDependencyError, SettingError, UnknownNameError, VmoeError
from vmoe.runtime.engine import Prediction

REMEMBERED = 4  # batches of clips
NONE, MJPEG, H264 = "none", "mjpeg", "h264"
QUALITIES = {MJPEG: (1, 100), H264: (0, 51)}
INTRA, INTER = 1 / 3, 1 / 6  # what x264 adds before it rounds down
APART = {MJPEG: 10, H264: 3}  # between two qualities of an expectation
# ITU-T T.81, annex K: luminance and chrominance.
LUMA = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113,
    92, 49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
CHROMA = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99,
    47, 66, 99, 99, 99, 99, 99, 99, *(99,) * 32,
)  # fmt: skip


@dataclass(frozen=True)
class Channel:
    """A camera's picture and its codec.

    Attributes:
        codec: none, mjpeg or h264.
        quality: of mjpeg 1 to 100, the best; of h264 the CRF, 0 (the best) to 51.
        camera: width and height of the camera's frames; None where they are those of a clip.
        draws: how many qualities a gradient is the mean over.
    """

    codec: str = NONE
    quality: int = 0
    camera: tuple[int, int] | None = None
    draws: int = 1
    _coded: dict[bytes, Clips] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        """Return what is said of it."""
        coded = "no codec" if self.codec == NONE else f"{self.codec}, quality {self.quality}"
        size = f", camera {self.camera[0]}x{self.camera[1]}" if self.camera else ""
        draws = f", gradients over {self.draws} qualities" if self.draws > 1 else ""
        return f"{coded}{size}{draws}"

    def require(self, spec: ClipSpec) -> None:
        """Refuse, before any work, a codec that is not here.

        Raises:
            MissingDependencyError: ffmpeg, or its libx264, is not installed.
            SettingError: a picture of odd size, which H.264 does not code.
        """
        if self.codec != H264:
            return
        if shutil.which("ffmpeg") is None:
            raise MissingDependencyError(
                "ffmpeg, which codes --codec h264, is not installed: apt install ffmpeg, or "
                "https://ffmpeg.org/download.html."
            )
        height, width = self.picture(spec)
        if height % 2 or width % 2:
            raise SettingError(
                f"--codec h264 codes pictures of even size, these are {width}x{height}: say "
                "--camera-size."
            )

    def picture(self, spec: ClipSpec) -> tuple[int, int]:
        """Return height and width of what a clip shows of the camera's frame, in its pixels."""
        if self.camera is None:
            return spec.height, spec.width
        scale = min(self.camera[0] / spec.width, self.camera[1] / spec.height)
        return 2 * round(spec.height * scale / 2), 2 * round(spec.width * scale / 2)

    def real(self, clips: Clips, spec: ClipSpec) -> Clips:
        """Return clips as they arrive, uint8 [N, T, h, w, 3], through the real codec.

        The newest are remembered: several models judge the same ones.
        """
        key = hashlib.sha256(clips.tobytes()).digest()
        if key not in self._coded:
            self._coded[key] = self._through(clips, spec)
            for old in list(self._coded)[:-REMEMBERED]:
                del self._coded[old]
        return self._coded[key]

    def _through(self, clips: Clips, spec: ClipSpec) -> Clips:
        import cv2

        size = self.picture(spec)
        shown = clips
        if size != (spec.height, spec.width):
            how = cv2.INTER_LINEAR if size[0] >= spec.height else cv2.INTER_AREA
            sized = [[cv2.resize(f, size[::-1], interpolation=how) for f in clip] for clip in clips]
            shown = np.array(sized, np.uint8)
        if self.codec == H264:
            shown = _h264(shown, self.quality, spec.spacing_s)
        elif self.codec == MJPEG:
            shown = np.array([[_jpeg(f, self.quality) for f in clip] for clip in shown], np.uint8)
        return np.array([[prepared.prepare(f, spec) for f in clip] for clip in shown], np.uint8)

    def judge(self, judge: Judge, spec: ClipSpec) -> Judge:
        """Return a judge that sees clips as they arrive."""

        def through(clips: Clips, force_route: Sequence[int] | None = None) -> Prediction:
            return judge(self.real(clips, spec), force_route)

        return through

    def likenesses(self, clip: Tensor, spec: ClipSpec) -> list[Tensor]:
        """Return what may arrive of clips, [B, 3, T, h, w], with gradients, one for each draw."""
        size, flat = self.picture(spec), clip.transpose(1, 2).flatten(0, 1)
        sized = flat
        if size != (spec.height, spec.width):
            sized = functional.interpolate(flat, size, mode="bilinear", align_corners=False)
        found = []
        for quality in self._qualities():
            coded = sized
            if self.codec == MJPEG:
                coded = like_jpeg(sized, quality)
            elif self.codec == H264:
                coded = like_h264(sized, quality, spec.frames)
            if size != (spec.height, spec.width):
                coded = functional.interpolate(coded, (spec.height, spec.width), mode="area")
            arrived = coded.clamp(0, 1).view(len(clip), -1, *coded.shape[1:]).transpose(1, 2)
            found.append(arrived)
        return found

    def _qualities(self) -> list[int]:
        """Return the qualities of the draws: the one that is named, then those around it."""
        if self.codec == NONE:
            return [0]
        low, high = QUALITIES[self.codec]
        steps = [(k + 1) // 2 * (1 if k % 2 else -1) for k in range(self.draws)]
        return [min(max(self.quality + APART[self.codec] * k, low), high) for k in steps]


def parse(codec: str | None, camera: str | None, draws: int | None) -> Channel | None:
    """Return the channel of --codec, --camera-size and --eot; None where a clip arrives as it is.

    Raises:
        UnknownNameError: no such codec.
        SettingError: a quality or a size that is none, or a flag without effect.
    """
    name, _, text = (codec or NONE).partition(":")
    if name not in (NONE, *QUALITIES):
        raise UnknownNameError("codec", name, (NONE, *QUALITIES))
    quality = 0
    if name != NONE:
        low, high = QUALITIES[name]
        if not text.isdigit() or not low <= int(text) <= high:
            raise SettingError(
                f"--codec is {codec}; write {name}:QUALITY, a whole number from {low} to {high}."
            )
        quality = int(text)
    elif text:
        raise SettingError(f"--codec is {codec}; none has no quality.")
    size = None
    if camera is not None:
        parts = camera.lower().split("x")
        if len(parts) != 2 or not all(part.isdigit() and int(part) >= 8 for part in parts):
            raise SettingError(f"--camera-size is {camera!r}; write WIDTHxHEIGHT, such as 640x480.")
        size = int(parts[0]), int(parts[1])
    if draws is not None and name == NONE:
        raise SettingError("--eot has no effect: no --codec is given; leave it out.")
    if name == NONE and size is None:
        return None
    return Channel(name, quality, size, draws or 1)


def like_jpeg(frames: Tensor, quality: int) -> Tensor:
    """Return frames, [F, 3, H, W] in [0, 1], nearly as JPEG would leave them, with gradients."""
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    tables = [_scaled(table, scale, frames) for table in (LUMA, CHROMA)]
    return _planes(frames, lambda plane, i: _coded(plane - 128, tables[i]) + 128, "bilinear")


def like_h264(frames: Tensor, crf: int, count: int) -> Tensor:
    """Return frames nearly as H.264 would leave them, with gradients.

    Every frame is the one before as it arrived, and what is left, by blocks of 8x8 in steps of
    2^((QP - 4) / 6), QP the CRF. Motion, modes and filters are left out: of clips coded at their
    own 64 pixels half of the error is another one, at a camera's size most is this.

    Args:
        frames: [F, 3, H, W] in [0, 1], clip after clip.
        crf: 0 to 51.
        count: frames of a clip.
    """
    step = torch.full((8, 8), 2 ** ((crf - 4) / 6), dtype=frames.dtype, device=frames.device)

    def code(plane: Tensor, _: int) -> Tensor:
        arrived: list[Tensor] = []
        for frame in plane.reshape(-1, count, *plane.shape[1:]).unbind(dim=1):
            before = arrived[-1] if arrived else torch.full_like(frame, 128)
            offset = INTER if arrived else INTRA
            arrived.append(before + _coded(frame - before, step, offset))
        return torch.stack(arrived, dim=1).flatten(0, 1)

    return _planes(frames, code, "nearest")


def _planes(frames: Tensor, code: Callable[[Tensor, int], Tensor], enlarge: str) -> Tensor:
    """Code luminance (0), and both chrominances (1) at half the size, in [0, 255]."""
    r, g, b = (255 * frames).unbind(dim=1)
    y = 0.299 * r + 0.587 * g + 0.114 * b  # ITU-R BT.601
    cb, cr = 128 + 0.564 * (b - y), 128 + 0.713 * (r - y)
    half = functional.avg_pool2d(torch.stack([cb, cr], dim=1), 2, ceil_mode=True)
    y = code(y, 0)
    coded = torch.stack([code(half[:, 0], 1), code(half[:, 1], 1)], dim=1)
    how = {"align_corners": False} if enlarge == "bilinear" else {}
    whole = functional.interpolate(coded, scale_factor=2, mode=enlarge, **how)
    cb, cr = (whole[:, i, : y.shape[1], : y.shape[2]] - 128 for i in range(2))
    rgb = torch.stack([y + cr / 0.713, y - 0.344 * cb - 0.714 * cr, y + cb / 0.564], dim=1)
    return rgb / 255


def _coded(plane: Tensor, steps: Tensor, offset: float = 0.5) -> Tensor:
    """Return a plane, [F, H, W], whose blocks of 8x8 were rounded to steps in the DCT's terms.

    Values are those of rounding, [x] = sign(x) floor(|x| + offset), the slope that of (x - [x])^3.
    """
    high, wide = plane.shape[1:]
    edge = (0, -wide % 8, 0, -high % 8)
    padded = functional.pad(plane[:, None], edge, mode="replicate")[:, 0]
    rows, columns = padded.shape[1] // 8, padded.shape[2] // 8
    blocks = padded.reshape(-1, rows, 8, columns, 8).transpose(2, 3)
    waves = _cosines().to(plane)
    terms = waves @ blocks @ waves.T / steps
    size = terms.detach().abs()
    whole = (size + offset).floor() * terms.detach().sign()
    slope = (terms - whole) ** 3
    rounded = whole + slope - slope.detach()
    back: Tensor = waves.T @ (rounded * steps) @ waves
    return back.transpose(2, 3).reshape(-1, 8 * rows, 8 * columns)[:, :high, :wide]


def _scaled(table: Sequence[int], scale: float, like: Tensor) -> Tensor:
    """Return a table of JPEG at a quality, as libjpeg scales it, [8, 8]."""
    steps = torch.tensor(table, dtype=like.dtype, device=like.device).view(8, 8)
    return ((steps * scale + 50) / 100).floor().clamp(1, 255)


@functools.cache
def _cosines() -> Tensor:
    """Return the orthonormal DCT of 8 values, [8, 8]."""
    k, n = torch.arange(8.0)[:, None], torch.arange(8.0)[None]
    waves = torch.cos(math.pi / 8 * (n + 0.5) * k) / 2
    waves[0] /= math.sqrt(2)
    return waves


def _jpeg(frame: Any, quality: int) -> Any:
    import cv2

    ok, data = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not ok:
        raise VmoeError(f"OpenCV cannot code a JPEG of {frame.shape[1]}x{frame.shape[0]}.")
    decoded: Any = cv2.imdecode(data, cv2.IMREAD_COLOR)
    return decoded[..., ::-1]


def _h264(clips: Clips, crf: int, spacing_s: float) -> Clips:
    """Code each clip as a video of its own, and decode it; one ffmpeg for all of them, each way."""
    n, t, high, wide, _ = clips.shape
    names = [f"{i}.mkv" for i in range(n)]
    cuts = [
        f"[s{i}]trim=start_frame={i * t}:end_frame={(i + 1) * t},setpts=PTS-STARTPTS[o{i}]"
        for i in range(n)
    ]
    split = f"[0:v]split={n}" + "".join(f"[s{i}]" for i in range(n))
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24"]
    size = ["-s", f"{wide}x{high}", "-r", f"{1 / spacing_s:g}"]
    each = ["-c:v", "libx264", "-crf", str(crf), "-pix_fmt", "yuv420p", "-threads", "1"]
    coded = [part for i in range(n) for part in ("-map", f"[o{i}]", *each, names[i])]
    read = [part for name in names for part in ("-threads", "1", "-i", name)]
    joined = "".join(f"[{i}:v]" for i in range(n)) + f"concat=n={n}:v=1"
    with tempfile.TemporaryDirectory() as folder:
        graph = ";".join([split, *cuts])
        _ffmpeg([*raw, *size, "-i", "-", "-filter_complex", graph, *coded], folder, clips.tobytes())
        arrived = _ffmpeg([*read, "-filter_complex", joined, *raw, "-"], folder)
    if len(arrived) != clips.size:
        raise VmoeError(f"ffmpeg gives {len(arrived)} bytes back for {clips.size}: it lost frames.")
    return np.frombuffer(arrived, np.uint8).reshape(clips.shape)


def _ffmpeg(arguments: Sequence[str], folder: str, given: bytes = b"") -> bytes:
    """Run ffmpeg in a folder; return what it writes.

    Raises:
        MissingDependencyError: it was built without libx264.
        VmoeError: it fails.
    """
    command = ["ffmpeg", "-v", "error", "-y", *arguments]
    done = subprocess.run(command, input=given, capture_output=True, cwd=Path(folder), check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it says nothing"]
        if any("libx264" in line for line in said):
            raise MissingDependencyError(
                "the ffmpeg that is installed has no libx264, which codes --codec h264: "
                "apt install ffmpeg, or a build from https://ffmpeg.org/download.html."
            )
        raise VmoeError(f"ffmpeg failed: {said[-1]}")
    return done.stdout
