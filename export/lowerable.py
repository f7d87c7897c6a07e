"""What cannot be lowered, by name and by its place in the twin."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from vmoe.errors import SettingError
from vmoe.models import VideoMoE

from .onnx import quiet

log = logging.getLogger("vmoe.export")

CARRIED = ("router", "experts")  # what a bundle has parts for


class UnsupportedLayerError(SettingError):
    """A layer that no lowering carries."""


def check(twin: VideoMoE) -> None:
    """Refuse a twin that computes more than a bundle's parts do.

    Raises:
        UnsupportedLayerError: OUD's denoiser, or another head or pre-block outside of router and
            experts.
    """
    if twin.denoiser is not None:
        raise UnsupportedLayerError(
            f"the twin denoises its clips first (denoiser, {type(twin.denoiser).__name__}, of "
            "--method oud-m); no lowering carries that pre-block, so that the bundle would answer "
            "otherwise than the twin. Export a twin of another method."
        )
    for name, module in twin.named_children():
        if name not in CARRIED:
            raise UnsupportedLayerError(
                f"the twin's {name} ({type(module).__name__}) stands outside of router and "
                "experts; no lowering carries it, so that the bundle would answer otherwise than "
                "the twin. Train without it, or move it into the experts."
            )


def explain(twin: VideoMoE, opset: int, e: Exception) -> Exception:
    """Return an error that names the innermost module that cannot be exported; else `e`.

    Every part is exported apart; of one that fails, the modules inside of it, on what they get of
    a clip, and so on inwards. Only called when the whole has failed.

    Args:
        twin: in eval mode, on the CPU.
        opset: version of the ONNX operators.
        e: how the whole failed.
    """
    t, h, w, c = twin.spec.shape
    clip = torch.zeros(2, c, t, h, w)
    places = [f"experts.{i}" for i in range(len(twin.experts))]
    for place in places if twin.router is None else ["router", *places]:
        module = twin.get_submodule(place)
        found = _culprit(module, place, _inputs(module, place, clip), opset)
        if found is not None:
            return found
    return e


def _culprit(
    module: nn.Module, place: str, inputs: dict[str, tuple[Any, ...]], opset: int
) -> UnsupportedLayerError | None:
    """Return what is wrong with a module or, rather, with one inside of it; None where it is not.

    A module that is never called itself (a list of others) is looked into.
    """
    why = None
    if place in inputs:
        why = _why_not(module, inputs[place], opset)
        if why is None:
            return None
    for name, inner in module.named_children():
        found = _culprit(inner, f"{place}.{name}", inputs, opset)
        if found is not None:
            return found
    if why is None:
        return None
    return UnsupportedLayerError(
        f"{place} ({type(module).__name__}) cannot be exported to ONNX: {why} Replace that layer, "
        "and train again."
    )


def _inputs(module: nn.Module, place: str, clip: Tensor) -> dict[str, tuple[Any, ...]]:
    """Run a module; return what it and each inside of it was called with first, by place."""
    seen: dict[str, tuple[Any, ...]] = {}

    def note(name: str) -> Any:
        return lambda _, args: seen.setdefault(name, args) and None

    hooks = [
        inner.register_forward_pre_hook(note(f"{place}.{name}" if name else place))
        for name, inner in module.named_modules()
    ]
    try:
        with torch.no_grad():
            module(clip)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _why_not(module: nn.Module, inputs: tuple[Any, ...], opset: int) -> str | None:
    """Return why a module cannot be exported, in a sentence; None where it can."""
    try:
        with quiet(), torch.no_grad():
            torch.onnx.export(
                module, inputs, dynamo=True, opset_version=opset, external_data=False,
                optimize=False, verbose=False,
            )  # fmt: skip
    except Exception as e:  # the exporter's errors share no base class but Exception
        log.debug("%s", e)
        return _sentence(e)
    return None


def _sentence(e: Exception) -> str:
    """Return the root of an exporter's error as one line."""
    root: BaseException = e
    while root.__cause__ is not None:
        root = root.__cause__
    lines = [line.strip() for line in str(root).splitlines() if line.strip()]
    said = (lines or [type(root).__name__])[0][:200].rstrip(".")
    return f"{said}."
