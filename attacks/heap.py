"""What a step frees is kept for the next one.

glibc gives the end of its heap back to the system once more than a few megabytes of it are free. A
step of an attack frees nearly all that it took, so that the next one would fault the same pages in
again: 3000 of them of 4 KiB, 8 % of a step, of the model that ships in batches of 8. So does a step
of training: nearly a fifth of its CPU time (j-tlat, r3d18 of width 0.125 in batches of 16).
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT_BYTES = 1 << 30  # free bytes at the end of the heap, before they are given back
MAPPED_BYTES = 32 << 20  # blocks from here on are mapped one by one; glibc allows no more


def keep() -> bool:
    """Keep freed memory in this process from now on; return whether its C library can."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS; Windows, whose CDLL wants a name
        return False
    # both: to set one ends glibc's own choice of the other
    return bool(mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES) and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
