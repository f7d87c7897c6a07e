"""MPEG-TS that is sent here by UDP: udp://127.0.0.1:5000, or a multicast group."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from vmoe.runtime import addresses

from . import SourceSettings
from ._live import NetworkSource

JOIN_S = 10.0  # a stream that is joined midway shows nothing before its next key frame


def claims(name: str) -> bool:
    """Return whether a name is a UDP address."""
    return name.lower().startswith("udp://")


def open(name: str, settings: SourceSettings) -> UdpSource:
    """Return the source; it listens at the address given, and nowhere else."""
    return UdpSource(addresses.shown(name), bound(name), settings)


def bound(address: str) -> str:
    """Return an address with its host as FFmpeg's `localaddr`, without which all are listened to.

    A multicast group is joined, not bound to; a `localaddr` of the user's own stays.
    """
    try:
        host = urlsplit(address).hostname
    except ValueError:
        return address
    if not host or "localaddr=" in address or _is_multicast(host):
        return address
    return f"{address}{'&' if '?' in address else '?'}localaddr={host}"


def _is_multicast(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_multicast
    except ValueError:  # a name
        return False


class UdpSource(NetworkSource):
    """See `Source`."""

    open_timeout_s = JOIN_S

    def _why_missing(self) -> str | None:
        return (
            f"nothing that can be decoded came within {self.open_timeout_s:g} s. Send MPEG-TS "
            "there: ffmpeg -re -i VIDEO -f mpegts ADDRESS; the address must be one of this machine "
            "or a multicast group; and look at the port."
        )
