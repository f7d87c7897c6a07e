"""A plan of export: what is to be exported, and how."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmoe import bundle as bundles
from vmoe import checkpoint, registry
from vmoe.checkpoint import Checkpoint
from vmoe.errors import SettingError
from vmoe.models import build, dense_counterpart
from vmoe.runtime.online import ONLINE
from vmoe.settings import opt, to_mapping

from . import accuracy, calibration, lowerable, online, optimize
from .calibration import CalibrationSettings
from .onnx import OPSETS
from .verify import VerifySettings

LOWERINGS = "vmoe.export.lowerings"
WINDOW = "window"


@dataclass(frozen=True)
class ExportSettings(VerifySettings, CalibrationSettings):
    """One plan of export."""

    lowering: str = opt(
        "split",
        "how routing is deployed: split (host routes), if (one file), plugin (one file whose "
        "dispatch a plugin can take) or dense (every expert runs: a baseline only)",
    )
    optimize: str = opt(
        optimize.AUTO,
        "form of the experts; auto measures here, but for int8 (u8s8: joined or flat; s8s8: none), "
        "fp16 and bf16 (none); OpenVINO runs int8 fastest as none",
        choices=optimize.CHOICES,
    )
    form: str = opt(
        WINDOW, "online: a causal model takes one new frame and its states",
        choices=(WINDOW, ONLINE),
    )  # fmt: skip
    opset: int = opt(20, "version of the ONNX operators", at_least=OPSETS[0],
                     at_most=OPSETS[1])  # fmt: skip
    twin: bool = opt(True, "carry the twin in the bundle, for attacks on what was deployed")
    verify_data: str | None = opt(None, "data set of the check; default: camera motion and noise")
    verify_clips: int | None = opt(
        None,
        f"clips of the check [default: {accuracy.CLIPS}; {accuracy.CLIPS_BELOW_FP32} below fp32]",
        at_least=4,
    )
    group: str | None = opt(
        None, "regular expression that splits --verify-data; default: as the twin was trained"
    )
    bisect: bool = opt(False, "where parity fails, name the part and the layer that breaks it")
    name: str | None = opt(None, "the model's name; default: as the checkpoint is called")
    counterpart: bool = opt(
        False, "the dense counterpart with random weights instead, to compare latency"
    )

    def __post_init__(self) -> None:
        """Check every value; a lowering is a file of its folder, a name can name a folder."""
        super().__post_init__()
        registry.load(LOWERINGS, self.lowering, "lowering (--lowering)")
        if self.group is not None and self.verify_data is None:
            raise SettingError("--group splits --verify-data: give that too, or leave it out.")
        if self.name is not None and not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise SettingError(
                f"--name is {self.name!r}; use letters, digits and . _ + - only, to name a folder."
            )
        default = CalibrationSettings()
        given = [
            f"--{name.replace('_', '-')}"
            for name in to_mapping(default)
            if getattr(self, name) != getattr(default, name)
        ]
        if given and not self.int8:
            raise SettingError(f"{' and '.join(given)} is for --int8: give that too.")
        self._check_form()

    def _check_form(self) -> None:
        """Refuse forms that exclude each other."""
        below = self.precision != "fp32"
        if self.optimize not in (optimize.AUTO, "none") and (
            self.fp16 or self.bf16 or (self.int8 and self.optimize == "winograd")
        ):
            raise SettingError(
                f"--optimize {self.optimize} is not for --{self.precision}: use auto or none."
            )
        if self.form == ONLINE and (self.lowering != "split" or below):
            raise SettingError(
                "--form online is for --lowering split in fp32: leave the other out."
            )


@dataclass(frozen=True)
class Plan:
    """What is to be exported.

    Attributes:
        checkpoint: the twin, its labels and provenance.
        file: where the twin lies; None where it was made here, from a seed.
        name: the model's name.
        settings: how.
        seed: of random weights and of the clips of the check.
        sha256: of the file as the twin was read from it.
    """

    checkpoint: Checkpoint
    file: Path | None
    name: str
    settings: ExportSettings
    seed: int = 0
    sha256: str = ""

    @property
    def default_out(self) -> Path:
        """Where the bundle goes if nothing is said."""
        return Path("runs/export") / f"{self.name}-{self.settings.lowering}"


def plan(path: Path, settings: ExportSettings, seed: int = 0) -> Plan:
    """Read a checkpoint, and decide what is to be exported.

    Raises:
        VmoeError: the checkpoint (or the bundle around it) is missing, damaged, or a pickle.
        SettingError: the counterpart of a model that is dense already, a twin without the form
            that is asked, or with a pre-block that no lowering carries.
    """
    sha256 = _sha256(path)  # before: a file that changes from here on is another one
    held = checkpoint.load(path)
    if settings.form == ONLINE:
        online.check(held.twin)
    name = settings.name or _name(path)
    if not settings.counterpart:
        lowerable.check(held.twin)
        return Plan(held, path, name, settings, seed, sha256)
    wider = dense_counterpart(held.twin.settings)
    twin = build(wider, held.twin.spec, seed).eval()
    lowerable.check(twin)
    data: dict[str, Any] = {
        key: held.recipe[key] for key in ("data", "clips") if key in held.recipe
    }
    recipe = {**data, "weights": "random", "seed": seed}
    name = settings.name or f"{name}-dense"
    return Plan(Checkpoint(twin, held.labels, recipe), None, name, settings, seed)


def _sha256(path: Path) -> str:
    """Return a file's hash; empty where it cannot be read, which loading it says."""
    try:
        return bundles.sha256(path)
    except OSError:
        return ""


def _name(path: Path) -> str:
    """Return what a model is called: as its bundle says, or its file, or the file's folder."""
    plain = path.resolve()
    said = plain.parent.name if plain.stem in ("best", "last", "twin") else plain.stem
    if plain.name == bundles.TWIN and plain.with_name(bundles.MANIFEST).is_file():
        said = str(bundles.read(plain.parent).model.get("name", said))
    return re.sub(r"[^\w.+-]+", "-", said).strip("-.+") or "model"


def calibration_of(plan: Plan) -> dict[str, Any] | None:
    """Return where the ranges of int8 come from; None of another precision.

    Raises:
        SettingError: the checkpoint does not say what it was trained on, and nothing is named.
    """
    if not plan.settings.int8:
        return None
    said = to_mapping(plan.settings)
    return {
        "data": plan.settings.calib or calibration.trained_on(plan.checkpoint),
        "split": "train",
        **{key: said[key] for key in ("calib_clips", "calib_adv", "int8_form")},
    }
