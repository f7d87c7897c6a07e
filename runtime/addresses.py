"""Addresses (URLs), and what of them may be printed: a password never."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

HIDDEN = "***"
# Of a query, and of the paths in which some cameras take them: /user=admin_password=x_channel=1
SECRETS = re.compile(r"((?:pas|psw|pwd|token|key|secret|auth|sig)[^=&;?#/@]*=)[^&;#]*", re.I)


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
    # A password may hold / ? or # itself, which no client reads, but which we would print.
    at = max(re.split(r"[?#]", rest, maxsplit=1)[0].rfind("@"), rest.partition("/")[0].rfind("@"))
    if at >= 0:
        return at
    after_colon = re.split(r"[/?#]", rest, maxsplit=1)[0].partition(":")[2]
    return rest.rfind("@") if after_colon and not after_colon.isdigit() else -1


def host_and_port(address: str, port: int) -> tuple[str, int]:
    """Return where an address leads; the port given where it names none.

    Raises:
        ValueError: its port is no port, or it has no host.
    """
    try:
        split = urlsplit(address)
        host, own_port = split.hostname, split.port
    except ValueError:  # its message may hold half of a password
        raise ValueError("its host cannot be read, or its port is no number") from None
    if not host:
        raise ValueError(f"no host in {shown(address)}")
    return host, port if own_port is None else own_port
