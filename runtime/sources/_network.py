"""Why an address cannot be opened: FFmpeg does not say, so its host is asked."""

from __future__ import annotations

import socket

from vmoe.runtime import addresses

ASK_S = 2.0


def why_not(address: str, port: int) -> str:
    """Return what is wrong with a TCP address that gives no video, and what to do.

    Args:
        address: a URL; it is not repeated, since it may hold a password.
        port: the port where it names none.
    """
    try:
        host, port = addresses.host_and_port(address, port)
    except ValueError as e:
        return f"{e}. Write scheme://user:password@host:port/path."
    try:
        socket.create_connection((host, port), timeout=ASK_S).close()
    except (socket.gaierror, UnicodeError):  # such as cam..local
        return f"the host {host} is not known. Look at its name."
    except TimeoutError:
        return f"{host} port {port} does not answer. Is it on, and on this network?"
    except OSError as e:
        return f"{host} port {port}: {e.strerror}. Is it on, and is the port right?"
    return (
        f"{host} port {port} answers, but gives no video that can be decoded. Look at the path, "
        "user and password; play it with ffplay."
    )
