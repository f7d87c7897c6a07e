"""Weights that others have trained, as a start for experts, fitted by their names and shapes.

A file is safetensors, or of torch.save; of the latter tensors alone are read (weights_only), so
that no code of it runs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vmoe import checkpoint, registry
from vmoe.errors import SettingError, VmoeError
from vmoe.models import VideoMoE
from vmoe.models.moe import FAMILIES

log = logging.getLogger("vmoe.train")

NESTED = ("state_dict", "model_state_dict", "model_state", "model")  # where trainers keep weights
WRAPPERS = re.compile(r"^(?:(?:module|model|backbone|_orig_mod)\.)+")
HEAD = "fc."  # the classifier, in every family
COUNTER = "num_batches_tracked"  # no weight; older files have none
WIDTHS = (1.0, 0.5, 0.25, 0.125, 0.75, 2.0)  # which a file is tried at, to say what it would fit
SAFE = (2, 10)  # before, weights_only itself could be made to run code (CVE-2026-24747)


def read(path: Path) -> dict[str, Tensor] | None:
    """Read the tensors of a file by their bare names; None of a checkpoint of vmoe's own.

    Raises:
        VmoeError: missing, damaged, with more than tensors in it, or without any.
    """
    if checkpoint.is_pickle(path):
        held = _found(_weights_only(path))
    else:
        held, metadata = checkpoint.read_safetensors(path)
        if checkpoint.HEADER in metadata:
            return None
    tensors = {WRAPPERS.sub("", name): tensor for name, tensor in held.items()}
    if not tensors:
        raise VmoeError(f"{path} holds no tensors with names: no weights of a model.")
    if len(tensors) < len(held):
        raise VmoeError(f"{path} holds two models, under different prefixes: save one of them.")
    return tensors


def _weights_only(path: Path) -> Any:
    """Read what torch.save wrote, by the unpickler that knows tensors and containers alone."""
    if _version() < SAFE:
        raise VmoeError(
            f"{path} is a pickle, and torch {torch.__version__} can be made to run code even with "
            f"weights_only. Install torch {SAFE[0]}.{SAFE[1]} or newer, or give safetensors."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # of a damaged file, the unpickler raises anything
        more = re.search(r"GLOBAL ([\w.]+)", str(e))
        if more is None:
            raise VmoeError(f"{path} is damaged, or no file of torch.save.") from e
        raise VmoeError(
            f"{path} holds {more[1]}, which is no tensor and could run code when it is read: "
            "refused. Give a file of its state_dict() alone, best as safetensors."
        ) from e


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def _found(value: Any) -> dict[str, Tensor]:
    """Return the named tensors of what was read, out of what trainers keep around them."""
    if not isinstance(value, Mapping):
        return {}
    for key in NESTED:
        if isinstance(value.get(key), Mapping):
            return _found(value[key])
    return {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}


def take(twin: VideoMoE, tensors: Mapping[str, Tensor], path: Path) -> str:
    """Copy weights into every expert of a twin; return what was taken, and what stays fresh.

    A classifier of other labels stays fresh, each expert's own, and so does the router.

    Args:
        twin: changed in place.
        tensors: by their names in the experts' network.
        path: of the file, for what is said.

    Raises:
        SettingError: of another architecture or width; the message names what they would fit.
        VmoeError: values that are not finite.
    """
    networks = [expert.get_submodule("1") for expert in twin.experts]  # behind Normalise
    wanted = networks[0].state_dict()
    why = _unfit(wanted, tensors)
    if why:
        mine = twin.settings
        raise SettingError(
            f"--init-from {path} does not fit --arch {mine.arch} --width {mine.width:g}: {why}. "
            f"{_what_fits(mine.arch, tensors)}"
        )
    head = all(_same(wanted, tensors, name) for name in wanted if name.startswith(HEAD))
    taken = {
        name: tensors[name]
        for name in wanted
        if name in tensors and (head or not name.startswith(HEAD))
    }
    for name, tensor in taken.items():
        if not tensor.isfinite().all():
            raise VmoeError(f"{path} is damaged: its {name} holds values that are not finite.")
    for network in networks:
        network.load_state_dict(taken, strict=False)
    _say_normalisation(twin)
    fresh = [] if head else [_head_said(wanted, tensors)]
    fresh += ["the router"] if twin.router is not None else []
    text = f"{len(taken)} tensors of {path} in each of {len(networks)} expert(s)"
    return f"{text}; fresh: {', '.join(fresh)}" if fresh else text


def _unfit(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Return why tensors are not those of a network, but for its classifier; empty if they are.

    What stands outside of the network's own modules (another head) does not matter. More layers
    inside of them do: the names of a ResNet-34 hold all those of a ResNet-18.
    """
    needed = [name for name in wanted if not name.startswith(HEAD) and not name.endswith(COUNTER)]
    for name in needed:
        if name not in tensors:
            return f"it has no {name}"
        if not _same(wanted, tensors, name):
            return f"its {name} is {_said(tensors[name])}, not {_said(wanted[name])}"
    inside = {name.split(".")[0] for name in needed}
    more = [name for name in tensors if name.split(".")[0] in inside and name not in wanted]
    return f"it has {more[0]}, which this family has not" if more else ""


def _same(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], name: str) -> bool:
    if name not in tensors:
        return False
    mine, theirs = wanted[name], tensors[name]
    plain = theirs.layout == torch.strided and not theirs.is_meta
    alike = mine.is_floating_point() == theirs.is_floating_point()
    return plain and alike and mine.shape == theirs.shape


def _said(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f" ({tensor.layout})"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{layout}"


def _what_fits(arch: str, tensors: Mapping[str, Tensor]) -> str:
    """Return what a file would fit, in a sentence; the family that is asked for comes first."""
    names = registry.names(FAMILIES)
    for name in sorted(names, key=lambda other: other != arch):
        for width in WIDTHS:
            if not _unfit(_shapes(name, width), tensors):
                return f"Its tensors fit --arch {name} --width {width:g}."
    public = ", ".join(f"{name} takes {known.name}" for name, known in _public(names))
    return f"Its tensors fit no family of vmoe; at --width 1, {public}."


def _shapes(arch: str, width: float) -> dict[str, Tensor]:
    """Return the state of a network without values."""
    with torch.device("meta"):
        network: nn.Module = _family(arch).build(width, 2)
    return network.state_dict()


def _family(arch: str) -> ModuleType:
    return registry.load(FAMILIES, arch, "expert family (--arch)")


def _public(names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield the families that public weights fit by name, and what is known of those."""
    for name in names:
        known = getattr(_family(name), "PRETRAINED", None)
        if known is not None:
            yield name, known


def _head_said(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    name = f"{HEAD}weight"
    there = f"{len(tensors[name])} labels" if name in tensors else "none"
    return f"the classifier ({there} there, {len(wanted[name])} here)"


def _say_normalisation(twin: VideoMoE) -> None:
    """Say how public weights of a family want their clips normalised, where this run does not.

    A file does not say whose weights it holds, so that nothing is changed. Public weights have the
    family's own width.
    """
    spec = twin.spec
    for _, known in _public([twin.settings.arch]):
        if twin.settings.width == 1 and (spec.mean, spec.std) != (known.mean, known.std):
            log.warning(
                "%s was trained with --mean %s --std %s, this run has %s and %s: if these are its "
                "weights, give those flags.",
                known.name, *map(_numbers, (known.mean, known.std, spec.mean, spec.std)),
            )  # fmt: skip


def _numbers(values: Iterable[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
