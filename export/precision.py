"""Precision: what is asked of a bundle's parts, how it is made, and the proof that it is there.

fp16, bf16   the twin's own modules in half precision, float32 in and out (half.py)
int8         Q/DQ around what ONNX Runtime's quantiser knows, on the fp32 graph (quantise.py)

The router stays fp32 unless told otherwise: it is 2 % of the cost, and a flip of the route is an
error without a bound.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from onnx import ModelProto

from vmoe.errors import SettingError
from vmoe.models import VideoMoE
from vmoe.settings import Settings, opt

from . import layers

KEEP = "router"
NAMED = 3  # how many places a message names


@dataclass(frozen=True)
class PrecisionSettings(Settings):
    """What the parts of a bundle compute in."""

    fp16: bool = opt(False, "experts in half precision (a CPU gains nothing)")
    bf16: bool = opt(False, "experts in bfloat16, for backends that have it")
    int8: bool = opt(False, "experts in 8-bit integers, calibrated on the training split")
    int8_form: str = opt(
        "u8s8",
        "u8s8: what ONNX Runtime and OpenVINO run fastest on a CPU; s8s8: symmetric, zero points "
        "of 0, the only one that TensorRT reads",
        choices=("u8s8", "s8s8"),
    )
    keep_fp32: str = opt(
        KEEP, "regular expression: layers whose place in the twin it matches stay fp32"
    )

    def __post_init__(self) -> None:
        """Check that at most one precision is asked for, and the expression."""
        super().__post_init__()
        asked = [name for name in ("fp16", "bf16", "int8") if getattr(self, name)]
        if len(asked) > 1:
            flags = " and ".join(f"--{name}" for name in asked)
            raise SettingError(f"{flags} exclude each other: choose one.")
        if not asked and self.keep_fp32 != KEEP:
            raise SettingError("--keep-fp32 is for --fp16, --bf16 or --int8: all is fp32 already.")
        if not self.int8 and self.int8_form != "u8s8":
            raise SettingError("--int8-form is for --int8: give that too, or leave it out.")
        try:
            re.compile(self.keep_fp32)
        except re.error as e:
            raise SettingError(
                f"--keep-fp32 is {self.keep_fp32!r}, no regular expression: {e}."
            ) from e

    @property
    def precision(self) -> str:
        """What is asked: fp32, fp16, bf16 or int8."""
        return next((name for name in ("fp16", "bf16", "int8") if getattr(self, name)), "fp32")

    def keeps(self, place: str) -> bool:
        """Return whether a layer, by its place in the twin, stays fp32."""
        return bool(self.keep_fp32) and re.search(self.keep_fp32, place) is not None

    def asked(self, place: str) -> str:
        """Return the precision that is asked of a layer, by its place in the twin."""
        return "fp32" if self.keeps(place) else self.precision


def check(twin: VideoMoE, settings: PrecisionSettings) -> None:
    """Refuse an expression that keeps nothing, or everything.

    Raises:
        SettingError: --keep-fp32 matches no layer, or all of them.
    """
    if settings.precision == "fp32":
        return
    places = list(_places(twin))
    kept = [place for place in places if settings.keeps(place)]
    if len(kept) == len(places):
        raise SettingError(
            f"--keep-fp32 {settings.keep_fp32!r} keeps all {len(places)} layers: nothing is left "
            f"for --{settings.precision}."
        )
    if not kept and settings.keep_fp32 not in ("", KEEP):
        shown = ", ".join(places[:: max(1, len(places) // NAMED)][:NAMED])
        raise SettingError(
            f"--keep-fp32 {settings.keep_fp32!r} matches none of the twin's {len(places)} layers; "
            f"they are called {shown} and so on."
        )


def _places(twin: VideoMoE) -> Iterator[str]:
    """Yield the places of the twin's layers: modules with weights of two axes or more."""
    for name, module in twin.named_modules():
        if any(parameter.ndim > 1 for parameter in module.parameters(recurse=False)):
            yield name


class Proof(NamedTuple):
    """Asked and found in one part.

    Attributes:
        part: its name.
        asked: how many layers in each precision.
        found: the same.
        tensors: how many weights are stored in each precision.
        differs: places in the twin whose layer is not what was asked.
    """

    part: str
    asked: dict[str, int]
    found: dict[str, int]
    tensors: dict[str, int]
    differs: tuple[str, ...]


def prove(model: ModelProto, part: str, settings: PrecisionSettings) -> Proof:
    """Compare what a part computes in with what was asked of it, layer by layer."""
    held = layers.of_model(model, part)
    return Proof(
        part,
        layers.counts(settings.asked(layer.place) for layer in held),
        layers.counts(layer.precision for layer in held),
        layers.tensors(model),
        tuple(
            f"{layer.place} ({layer.precision})"
            for layer in held
            if layer.precision != settings.asked(layer.place)
        ),
    )


def text(counts: dict[str, int]) -> str:
    """Return precisions as one word: `int8`, or `fp32+int8` of a part that has both."""
    return "+".join(counts)
