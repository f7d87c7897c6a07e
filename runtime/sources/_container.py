"""What a video file's own container says of its length, to tell a broken file from a whole one.

OpenCV reports the end, a cut and a decoding error all as "no more frames", and its frame count
is only an estimate for many formats. So a file counts as broken where its container is cut
short, or where an exact length says that the decoded frames end too soon.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

EBML, SEGMENT, TRACKS, TRACK, TRACK_TYPE = (
    bytes.fromhex(kind) for kind in ("1a45dfa3", "18538067", "1654ae6b", "ae", "83")
)
VIDEO_TRACK = 1
ZEROS = 4096  # a preallocated download that never ended has at least so many zeros at its end


def is_cut(path: Path) -> bool:
    """Return whether the file ends before its container does; False for containers unknown."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if size > 16 * ZEROS:
            file.seek(size - ZEROS)
            if not any(file.read(ZEROS)):
                return True
        if head[:4] == b"RIFF":
            return size < 8 + int.from_bytes(head[4:8], "little")
        if head[:4] == EBML:
            segment = _segment(file)
            return segment is not None and size < segment[1]
        if head[4:8] == b"ftyp":
            return any(end > size for _, _, end in _boxes(file, 0, size))
    return False


def duration_s(path: Path, claimed_s: float) -> float | None:
    """Return the exact length of a file's video, in seconds, or None where none is exact.

    Args:
        path: the file.
        claimed_s: what OpenCV makes of the container's head: of AVI that is the video's own
            length, of Matroska that of the longest track.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF":
            return claimed_s
        if head[:4] == EBML:
            return claimed_s if _track_types(file) == {VIDEO_TRACK} else None
        if head[4:8] == b"ftyp":
            return _mp4_duration_s(file, size)
    return None


def _mp4_duration_s(file: BinaryIO, size: int) -> float | None:
    """Return the length in a video track's header: unlike its count of samples it honours edits."""
    moov = _find(file, b"moov", 0, size)
    header = _find(file, b"mvhd", *moov) if moov else None
    if not moov or not header:
        return None
    scale, _ = _times(file, header[0], track=False)
    for kind, start, end in _boxes(file, *moov):
        if kind == b"trak" and _is_video(file, start, end):
            found = _find(file, b"tkhd", start, end)
            units = _times(file, found[0], track=True)[1] if found else 0
            return units / scale if units and scale else None
    return None


def _boxes(file: BinaryIO, start: int, end: int) -> list[tuple[bytes, int, int]]:
    """Return the boxes between two offsets: kind, start of the content, end."""
    boxes = []
    while start + 8 <= end:
        file.seek(start)
        head = file.read(16)
        length, kind = struct.unpack(">I4s", head[:8])
        content = start + 8
        if length == 1 and len(head) == 16:
            length, content = struct.unpack(">Q", head[8:])[0], start + 16
        elif length == 0:  # to the end of the file
            length = end - start
        if length < content - start:
            break
        boxes.append((kind, content, start + length))
        start += length
    return boxes


def _find(file: BinaryIO, kind: bytes, start: int, end: int) -> tuple[int, int] | None:
    return next(((a, b) for k, a, b in _boxes(file, start, end) if k == kind), None)


def _times(file: BinaryIO, start: int, *, track: bool) -> tuple[int, int]:
    """Return (units per second, length) of an mvhd, or (track id, length) of a tkhd."""
    file.seek(start)
    body = file.read(36).ljust(36, b"\0")
    gap = "4x" if track else ""  # a reserved word stands between a track's id and its length
    if body[0] == 1:
        unit, length = struct.unpack(f">I{gap}Q", body[20 : 36 if track else 32])
        return unit, 0 if length == 2**64 - 1 else length
    unit, length = struct.unpack(f">I{gap}I", body[12 : 24 if track else 20])
    return unit, 0 if length == 2**32 - 1 else length


def _is_video(file: BinaryIO, start: int, end: int) -> bool:
    media = _find(file, b"mdia", start, end)
    handler = _find(file, b"hdlr", *media) if media else None
    if not handler:
        return False
    file.seek(handler[0] + 8)
    return file.read(4) == b"vide"


def _segment(file: BinaryIO) -> tuple[int, int] | None:
    """Return start and end of a Matroska file's contents; None where the file does not say."""
    file.seek(0)
    parts = _elements(file, 0, 1 << 62)
    return next(((start, end) for kind, start, end in parts if kind == SEGMENT), None)


def _track_types(file: BinaryIO) -> set[int]:
    """Return the kinds of a Matroska file's tracks: 1 is video, 2 audio, 17 subtitles."""
    segment = _segment(file)
    types = set()
    for kind, start, end in _elements(file, *segment) if segment else ():
        if kind == TRACKS:
            for track in (e for e in _elements(file, start, end) if e[0] == TRACK):
                for inner, at, to in _elements(file, track[1], track[2]):
                    if inner == TRACK_TYPE:
                        file.seek(at)
                        types.add(int.from_bytes(file.read(to - at), "big"))
            break
    return types


def _elements(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield Matroska's elements between two offsets: kind, start of the content, end."""
    while start < end:
        file.seek(start)
        kind = _number(file, marked=True)
        length = _number(file, marked=False)
        content = file.tell()
        if not kind or not length or set(length) == {0xFF}:  # the end, or a length unknown
            return
        start = content + int.from_bytes(length, "big")
        yield kind, content, start


def _number(file: BinaryIO, *, marked: bool) -> bytes:
    """Read one of Matroska's numbers: the zeros before its first bit say how long it is.

    Returns:
        Its bytes, with that bit (as kinds are written) or without; 0xFF bytes for "unknown".
    """
    first = file.read(1)
    if not first or not first[0]:
        return b""
    width = 9 - first[0].bit_length()
    rest = file.read(width - 1)
    if marked:
        return first + rest
    bits = first[0] & (0xFF >> width)
    unknown = bits == 0xFF >> width and set(rest) <= {0xFF}
    return b"\xff" if unknown else bytes([bits]) + rest
