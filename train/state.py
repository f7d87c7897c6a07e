"""Where a training stands, and the one file that it is kept in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vmoe import checkpoint, latest
from vmoe.errors import VmoeError
from vmoe.models import VideoMoE
from vmoe.train.averaging import Average

FILE = latest.STATE

Row: TypeAlias = "dict[str, float]"


@dataclass
class State:
    """What `--resume` needs, beside the recipe.

    Attributes:
        average: of the weights, where one is kept.
        epoch: epochs that are done.
        rows: one for each of them, as in results.csv.
        best: the validation's figure of the best epoch so far.
        tflops: spent on all passes so far.
        costs: FLOPs of a clip in each walk, by its name.
    """

    twin: VideoMoE
    optimiser: torch.optim.Optimizer
    average: Average | None = None
    epoch: int = 0
    rows: list[Row] = field(default_factory=list)
    best: float = -1.0
    tflops: float = 0.0
    costs: dict[str, float] = field(default_factory=dict)

    @property
    def kept(self) -> VideoMoE:
        """The twin that is validated and kept: the average, where there is one."""
        return self.twin if self.average is None else self.average.twin


NUMBERS = ("epoch", "rows", "best", "tflops", "costs")


def save(state: State, recipe: dict[str, Any], folder: Path) -> None:
    """Write the whole state as one file, so that a kill at any moment leaves a whole one."""
    tensors = {f"twin.{name}": t for name, t in state.twin.state_dict().items()}
    if state.average is not None:
        tensors |= {f"average.{name}": t for name, t in state.average.state_dict().items()}
    for index, values in state.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{key}": torch.as_tensor(v) for key, v in values.items()}
    header = {"recipe": recipe, **{name: getattr(state, name) for name in NUMBERS}}
    checkpoint.write_tensors(tensors, header, folder / FILE)


def recipe_of(folder: Path) -> dict[str, Any]:
    """Return the recipe of the run in a folder.

    Raises:
        VmoeError: no state there.
    """
    if not folder.exists():
        raise VmoeError(
            f"{folder} does not exist: there is no run to go on with. Look under runs/."
        )
    if folder.is_dir() and not (folder / FILE).exists():
        raise VmoeError(
            f"{folder} holds no {FILE}: no epoch of it was finished. Start it anew elsewhere."
        )
    recipe: dict[str, Any] = checkpoint.read_tensors(folder / FILE)[1]["recipe"]
    return recipe


def load(state: State, recipe: dict[str, Any], folder: Path) -> State:
    """Return the state that `save` wrote, in the twin and the optimiser of a fresh one.

    Raises:
        VmoeError: no state there, or one of another recipe.
    """
    tensors, header = checkpoint.read_tensors(folder / FILE)
    if header.get("recipe") != recipe:
        changed = _changed(header.get("recipe", {}), recipe)
        raise VmoeError(f"{folder} was trained otherwise ({changed}): resume with its own flags.")
    state.twin.load_state_dict(_under(tensors, "twin."))
    if state.average is not None:
        state.average.load_state_dict(_under(tensors, "average."))
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _under(tensors, "optimiser.").items():
        index, key = name.split(".")
        states.setdefault(int(index), {})[key] = tensor
    plan = state.optimiser.state_dict()
    state.optimiser.load_state_dict({"state": states, "param_groups": plan["param_groups"]})
    for name in NUMBERS:
        setattr(state, name, header[name])
    return state


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _changed(old: Any, new: Any, name: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        parts = (_changed(old.get(k), new.get(k), k) for k in keys if old.get(k) != new.get(k))
        return ", ".join(parts)
    return f"{name} {old} then, {new} now"
