"""An RTSP camera or server, over TCP unless told; reopened when it is lost."""

from __future__ import annotations

from vmoe.runtime import addresses

from . import SourceSettings, _network
from ._live import NetworkSource

SCHEMES = ("rtsp://", "rtsps://")
PORT = 554


def claims(name: str) -> bool:
    """Return whether a name is an RTSP address."""
    return name.lower().startswith(SCHEMES)


def open(name: str, settings: SourceSettings) -> RtspSource:
    """Return the source; its server is asked when frames are."""
    return RtspSource(addresses.shown(name), name, settings)


class RtspSource(NetworkSource):
    """See `Source`."""

    def _why_missing(self) -> str | None:
        return _network.why_not(self._address, PORT)
