"""Addresses (URLs), and what of them may be printed: a password never."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

HIDDEN = "***"
SECRETS = re.compile(r"([?&;][^=&;]*(?:pass|pwd|token|key|secret|auth|sig)[^=&;]*=)[^&;#]*", re.I)


def shown(address: str) -> str:
    """Return an address as it may be printed: passwords and tokens as ***.

    A name that is no address is returned as it is.
    """
    scheme, mark, rest = address.partition("://")
    if not mark:
        return address
    at = _password_ends(rest)
    if at > 0:
        user, colon, _ = rest[:at].partition(":")
        rest = f"{user}{colon}{HIDDEN if colon else ''}{rest[at:]}"
    return f"{scheme}://" + SECRETS.sub(rf"\g<1>{HIDDEN}", rest)


def _password_ends(rest: str) -> int:
    """Return the place of the @ behind user and password; -1 where there are none."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        return authority.rindex("@")
    after_colon = authority.partition(":")[2]
    # No port: a password that holds a / itself, which no client reads, but which we would print.
    return rest.rfind("@") if after_colon and not after_colon.isdigit() else -1


def host_and_port(address: str, port: int) -> tuple[str, int]:
    """Return where an address leads; the port given where it names none.

    Raises:
        ValueError: its port is no port, or it has no host.
    """
    split = urlsplit(address)
    if not split.hostname:
        raise ValueError(f"no host in {shown(address)}")
    return split.hostname, port if split.port is None else split.port
