"""What a step frees is kept for the next one, where the C library can."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from vmoe.attacks import heap

FAULTS = """
import ctypes, resource, sys
from vmoe.attacks import heap
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def take():
    held = [libc.malloc(3 << 20) for _ in range(16)]
    for block in held:
        ctypes.memset(block, 1, 3 << 20)
    for block in reversed(held):
        libc.free(ctypes.c_void_p(block))
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
sys.argv[1] == "keep" and heap.keep()
take()
before = faults()
take()
print((faults() - before) * resource.getpagesize() / (48 << 20))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_what_is_freed_is_not_faulted_in_again() -> None:
    def share(how: str) -> float:
        """Return the share of 48 MiB that is faulted in when it is taken a second time."""
        command = [sys.executable, "-c", FAULTS, how]
        return float(subprocess.run(command, check=True, capture_output=True).stdout)

    assert share("leave") > 0.5
    assert share("keep") < 0.1


def test_a_c_library_without_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not heap.keep()
