"""The kernels as they were compiled ahead of time: PTX, and what a launch has to know of it."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vmoe.errors import BundleError, UnknownNameError

SHIPPED = Path(__file__).parent / "kernels.zip"
MANIFEST = "kernels.json"
ONE_ONLY = (90,)  # compiled for that architecture's own instructions: no younger GPU runs it


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Attributes:
        file: of its PTX, or cubin.
        entry: its name inside.
        warps: of one program, 32 threads each.
        shared_bytes: dynamic shared memory of one program.
        params: how many arguments it takes.
        pointers: how many of them, the first ones, are pointers; the others are int32.
    """

    file: str
    entry: str
    warps: int
    shared_bytes: int
    params: int
    pointers: int


@cache
def kernels(place: Path | None = None) -> dict[str, dict[int, Kernel]]:
    """Return all compiled kernels by name and architecture.

    Args:
        place: a folder or zip file that `vmoe.export.plugins.compiled` wrote; None is what vmoe
            carries.

    Raises:
        BundleError: it holds none.
    """
    try:
        read = json.loads(_bytes(place or SHIPPED, MANIFEST))["kernels"]
        return {
            name: {int(arch): Kernel(**facts) for arch, facts in each.items()}
            for name, each in read.items()
        }
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
        raise BundleError(
            f"{place or SHIPPED} holds no compiled kernels. Install vmoe again, or make them: "
            "python -m vmoe.export.plugins.compiled."
        ) from e


def archs(place: Path | None = None) -> tuple[int, ...]:
    """Return the architectures that every kernel was compiled for."""
    every = [set(each) for each in kernels(place).values()]
    return tuple(sorted(set.intersection(*every)))


def arch_for(capability: int, there: tuple[int, ...]) -> int:
    """Return the architecture whose PTX a GPU runs best: its own, or the newest older one.

    Args:
        capability: ten times the GPU's compute capability.
        there: what there is.

    Raises:
        BundleError: the GPU is older than all of them.
    """
    fit = [a for a in there if a == capability or (a < capability and a not in ONE_ONLY)]
    if not fit:
        raise BundleError(
            f"this GPU's compute capability is {capability / 10:.1f}; the routed kernels need "
            f"{min(there) / 10:.1f} or newer. Use --lowering split."
        )
    return max(fit)


def kernel(name: str, arch: int, place: Path | None = None) -> Kernel:
    """Return one kernel for one architecture.

    Raises:
        UnknownNameError: there is no such kernel, or not for that architecture.
    """
    found = kernels(place).get(name)
    if found is None:
        raise UnknownNameError("kernel", name, list(kernels(place)))
    if arch not in found:
        raise UnknownNameError(f"architecture of {name}", str(arch), [str(a) for a in found])
    return found[arch]


def text(found: Kernel, place: Path | None = None) -> bytes:
    """Return what the driver loads; PTX has to end with a zero."""
    return _bytes(place or SHIPPED, found.file) + b"\0"


def _bytes(place: Path, name: str) -> bytes:
    if place.is_dir():
        return (place / name).read_bytes()
    with zipfile.ZipFile(place) as held:
        return held.read(name)
