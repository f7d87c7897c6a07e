"""TensorRT plans: what each was built with, whether it is for this machine, and who vouches for it.

A plan is code for one version of TensorRT and one kind of GPU: what a manifest says of it is
compared with this machine before a byte of it is deserialised. And it is code: it is loaded only
when it was built here, which a file in the user's own cache folder says, or on the user's word.

    CACHE/plans/SHA256       an empty file: this user built that plan on this machine
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vmoe import cli
from vmoe.bundle import Part
from vmoe.errors import BundleError, EngineMismatchError

from ._cuda import GpuFacts

log = logging.getLogger("vmoe.runtime")

KEY = "plan"  # of a part's entry in the manifest: what follows, as JSON
NONE, SAME_CAPABILITY, AMPERE_PLUS = "none", "same-compute-capability", "ampere-plus"
HARDWARE = (NONE, SAME_CAPABILITY, AMPERE_PLUS)
AMPERE = (8, 0)
REBUILD = "Build it here: vmoe-export BUNDLE --trt."


class Machine(NamedTuple):
    """What a plan runs on.

    Attributes:
        tensorrt: its version, `10.3.0`.
        system: operating system and processor, `linux-aarch64`.
        gpu: the GPU.
    """

    tensorrt: str
    system: str
    gpu: GpuFacts

    def to_json(self) -> dict[str, Any]:
        """Return it as a report has it."""
        return {"tensorrt": self.tensorrt, "system": self.system, "gpu": self.gpu._asdict()}


def machine(trt: Any, gpu: GpuFacts) -> Machine:
    """Return what this machine is, by its TensorRT and its GPU."""
    return Machine(trt.__version__, f"{sys.platform}-{platform.machine()}", gpu)


@dataclass(frozen=True)
class Built:
    """What a plan was built with; an entry of the manifest.

    Attributes:
        tensorrt: the version.
        cuda: the newest CUDA of the driver, as it was then.
        system: as of `Machine`.
        gpu: the GPU's name.
        capability: its compute capability.
        flags: names of builder flags that are set, and of those that are `no-` cleared.
        batch: the least, the best and the largest batch.
        level: of the builder's optimisation.
        hardware: one of HARDWARE: what other GPUs it may run on.
        version_compatible: whether newer versions of TensorRT may run it.
        onnx: sha256 of the graph that it was built from.
        weights: the file of the bundle that a stripped plan gets its weights from; else empty.
        plugins: the plugins inside, `vmoe::RoutedConv3d 1`; known before it is deserialised.
    """

    tensorrt: str
    cuda: str
    system: str
    gpu: str
    capability: str
    flags: tuple[str, ...]
    batch: tuple[int, int, int]
    level: int
    hardware: str
    version_compatible: bool
    onnx: str
    weights: str = ""
    plugins: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as the manifest has it."""
        return {k: list(v) if isinstance(v, tuple) else v
                for k, v in dataclasses.asdict(self).items()}  # fmt: skip


def built(part: Part) -> Built:
    """Read what a manifest says of a plan.

    Raises:
        BundleError: it says nothing of it, or nothing that can be used.
    """
    said = part.extra.get(KEY)
    try:
        if not isinstance(said, Mapping):
            raise TypeError(f"it is {said!r}")
        lists = {"plugins": [], **said}  # where older manifests name none
        found = Built(**{**lists, **{k: tuple(_list(lists, k)) for k in LISTS}})
        for field in dataclasses.fields(Built):
            value, kind = getattr(found, field.name), type(getattr(_LIKE, field.name))
            if type(value) is not kind:
                raise TypeError(f"{field.name} is {value!r}")
        least, best, most = found.batch
        if not all(type(n) is int for n in found.batch) or not 1 <= least <= best <= most:
            raise ValueError(f"batch is {list(found.batch)}")
        if ("STRIP_PLAN" in found.flags) != bool(found.weights):
            raise ValueError(f"flags are {list(found.flags)}, weights is {found.weights!r}")
        if found.weights and part.hashes.get(found.weights) != found.onnx:
            raise ValueError(f"weights is {found.weights!r}, whose hash is not that of the onnx")
        _version(found.tensorrt), _version(found.capability)
    except (KeyError, TypeError, ValueError) as e:
        raise BundleError(
            f"{part.file}: the manifest does not say what it was built with ({e}). {REBUILD}"
        ) from e
    return found


LISTS = ("flags", "batch", "plugins")


def _list(said: Mapping[str, Any], name: str) -> list[Any]:
    held = said[name]
    if not isinstance(held, list):
        raise TypeError(f"{name} is {held!r}")
    return held


_LIKE = Built("", "", "", "", "", (), (1, 1, 1), 3, NONE, False, "")  # the type of each field


def check_machine(part: Part, was: Built, here: Machine) -> None:
    """Refuse a plan that was built for another machine, before it is deserialised.

    Raises:
        EngineMismatchError: with what it was built for, and what is here.
    """
    differs = [
        *([] if was.system == here.system else [f"{was.system}, not {here.system}"]),
        *_other_version(was, here.tensorrt),
        *_other_gpu(was, here.gpu),
    ]
    if differs:
        raise EngineMismatchError(f"{part.file} was built for {'; '.join(differs)}. {REBUILD}")


def _other_version(was: Built, here: str) -> list[str]:
    if was.tensorrt == here:
        return []
    if was.version_compatible and _version(was.tensorrt) <= _version(here):
        return []
    newer = " or newer" if was.version_compatible else ""
    return [f"TensorRT {was.tensorrt}{newer}, not {here}"]


def _other_gpu(was: Built, here: GpuFacts) -> list[str]:
    if was.hardware == AMPERE_PLUS:
        if _version(here.capability) >= AMPERE:
            return []
        return [f"compute capability 8.0 and newer, not {here.capability}"]
    if was.capability != here.capability:
        return [f"compute capability {was.capability}, not {here.capability} ({here.name})"]
    if was.hardware == NONE and was.gpu != here.name:
        return [f"{was.gpu}, not {here.name}"]
    return []


def _version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version, `10.3.0.post1` as (10, 3, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    if not found:
        raise ValueError(f"version is {text!r}")
    return tuple(int(n) for n in found[0].split("."))


def note(digests: Iterable[str]) -> None:
    """Note that plans were built here by this user; where that cannot be noted, say so."""
    place = cli.cache_folder() / "plans"
    try:
        place.mkdir(parents=True, exist_ok=True)
        for digest in digests:
            (place / digest).touch()
    except OSError as e:
        log.warning("%s cannot be written (%s): to load the plans, say --trust.", place, e.strerror)


def check_trust(part: Part, trust: bool) -> None:
    """Refuse a plan that nobody vouches for.

    Args:
        part: the plan.
        trust: whether the user said so.

    Raises:
        EngineMismatchError: it was not built here, and the user did not say that it is trusted.
    """
    noted = cli.cache_folder() / "plans" / part.hashes[part.file]
    with contextlib.suppress(OSError):
        if trust or noted.is_file():
            return
    raise EngineMismatchError(
        f"{part.file} is a TensorRT plan that was not built here: it is code, and is loaded only "
        f"with --trust. {REBUILD}"
    )


def bucket(n: int, least: int, most: int) -> int:
    """Return the batch that n clips are run with: the next power of two within a plan's range."""
    size = 1
    while size < n:
        size *= 2
    return max(least, min(size, most))
