"""MPEG-TS that is sent here by UDP: udp://127.0.0.1:5000, or a multicast group."""

from __future__ import annotations

from vmoe.runtime import addresses

from . import SourceSettings
from ._live import NetworkSource

JOIN_S = 10.0  # a stream that is joined midway shows nothing before its next key frame


def claims(name: str) -> bool:
    """Return whether a name is a UDP address."""
    return name.lower().startswith("udp://")


def open(name: str, settings: SourceSettings) -> UdpSource:
    """Return the source; it listens at the address given, and nowhere else."""
    return UdpSource(addresses.shown(name), name, settings)


class UdpSource(NetworkSource):
    """See `Source`."""

    open_timeout_s = JOIN_S

    def _why_missing(self) -> str | None:
        return (
            f"nothing that can be decoded came within {self.open_timeout_s:g} s. Send MPEG-TS "
            "there: ffmpeg -re -i VIDEO -f mpegts ADDRESS; and look at the port."
        )
