"""What a video file's own container says of its length, to tell a broken file from a whole one.

OpenCV reports the end, a cut and a decoding error all as "no more frames", and its frame count
is only an estimate for many formats. So a file counts as broken where its container is cut
short, or where an exact length says that the decoded frames end too soon.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

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
        if head[:4] == b"\x1a\x45\xdf\xa3":
            return size < _segment_end(file)
        if head[4:8] == b"ftyp":
            return any(end > size for _, _, end in _boxes(file, 0, size))
    return False


def duration_s(path: Path) -> float | None:
    """Return the exact length of an mp4's video track as shown, or None where none is exact.

    It is the track header's: unlike the count of samples it honours edits of the track.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(12)[4:8] != b"ftyp":
            return None
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


def _segment_end(file: BinaryIO) -> int:
    """Return where a Matroska file's segment ends; 0 where the file does not say."""
    file.seek(4)
    size, unknown = _vint(file)
    if unknown:
        return 0
    file.seek(file.tell() + size)
    if file.read(4) != b"\x18\x53\x80\x67":
        return 0
    size, unknown = _vint(file)
    return 0 if unknown else file.tell() + size


def _vint(file: BinaryIO) -> tuple[int, bool]:
    """Read one of Matroska's lengths; return it, and whether it says "unknown"."""
    first = (file.read(1) or b"\xff")[0]
    width = 9 - first.bit_length() if first else 8
    rest = int.from_bytes(file.read(width - 1), "big")
    bits = 7 * width
    value = ((first & (0xFF >> width)) << (8 * (width - 1))) | rest
    return value, value == (1 << bits) - 1
