"""The training loop: epochs of passes, a cosine schedule, validation, a state that resumes."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from vmoe import checkpoint
from vmoe.batches import Batch, Held, batches, shuffled
from vmoe.cli import log, progress
from vmoe.data import ClipData
from vmoe.errors import VmoeError
from vmoe.models import VideoMoE, flops
from vmoe.settings import Settings, opt
from vmoe.train.passes import Pass, Update, training
from vmoe.train.validate import Validation, validate

STATE = "state.safetensors"
LARGEST_GRADIENT = 5.0  # norm over a pass's parameters
GIVEN_UP = 1e30  # a loss beyond this, or that is no number, ends the training

Row: TypeAlias = "dict[str, float]"


@dataclass(frozen=True)
class LoopSettings(Settings):
    """What the loop itself takes."""

    epochs: int = opt(10, "walks over the training data", at_least=1)
    batch: int = opt(32, "clips of a batch", at_least=2)
    lr: float = opt(3e-3, "highest learning rate of AdamW", above=0)
    weight_decay: float = opt(1e-3, "AdamW's weight decay", at_least=0)
    warmup: float = opt(0.05, "share of the training over which the rate rises", at_least=0)
    val_steps: int = opt(
        10, "PGD steps of the validation; 0 validates clean clips alone", at_least=0
    )
    val_eps: float = opt(8 / 255, "budget of the validation's attack", at_least=0, at_most=1)
    seed: int = opt(0, "random seed of weights, order and attacks")


@dataclass
class State:
    """Where a training stands: what `--resume` needs, beside the recipe.

    Attributes:
        epoch: epochs that are done.
        rows: one for each of them, as in results.csv.
        best: the validation's figure of the best epoch so far.
    """

    twin: VideoMoE
    optimiser: torch.optim.Optimizer
    epoch: int
    rows: list[Row]
    best: float


class Walked(NamedTuple):
    """One walk over the data.

    Attributes:
        loss: its mean.
        gradients: clips that a gradient was taken of through experts, those of updates included.
        flops: floating-point operations of one clip.
    """

    loss: float
    gradients: int
    flops: float


def start(twin: VideoMoE, settings: LoopSettings) -> State:
    """Return the state before the first epoch."""
    optimiser = torch.optim.AdamW(
        twin.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    return State(twin, optimiser, 0, [], -1.0)


def run(
    state: State,
    passes: list[Pass],
    train_data: Callable[[int], ClipData],
    val_data: ClipData,
    settings: LoopSettings,
) -> Iterator[State]:
    """Train; yield the state after every epoch.

    Args:
        state: where to begin: from `start`, or from `load`.
        passes: the recipe.
        train_data: from an epoch's number to its clips.
        val_data: the validation's clips.
        settings: epochs, batch, rates, seed; everything drawn comes from (seed, epoch, pass), so
            that a training that was interrupted and resumed is the same, bit for bit.

    Raises:
        VmoeError: the loss is no number any more.
    """
    device = next(state.twin.parameters()).device
    held_val = Held(val_data)
    while state.epoch < settings.epochs:
        begin = time.monotonic()
        data = Held(train_data(state.epoch))
        row: Row = {"epoch": state.epoch + 1}
        gradients, spent = 0, 0.0
        for number, walk in enumerate(passes):
            walked = _walk(state, walk, number, len(passes), data, settings, device)
            row[f"loss_{walk.name.replace(' ', '_')}"] = walked.loss
            gradients += walked.gradients
            spent += walked.flops
        found = _validate(state.twin, held_val, settings)
        row |= found.row()
        row |= {"gradients_per_clip": gradients / len(data), "gflops_per_clip": spent / 1e9}
        row["epoch_s"] = time.monotonic() - begin
        state.epoch += 1
        state.rows.append(row)
        state.best = max(state.best, found.figure)
        _report(row, found, settings)
        yield state


def _walk(
    state: State, walk: Pass, number: int, of: int, data: Held,
    settings: LoopSettings, device: torch.device,
) -> Walked:  # fmt: skip
    """Walk over the data once.

    The FLOPs of everything that it runs, attack, update and terms, are counted on its first batch
    by torch's own counter: clips cost alike, so that the rest is the same per clip.
    """
    seed = (settings.seed, state.epoch, number)
    order = shuffled(len(data), *seed)
    attack_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    total, gradients, spent, steps = 0.0, 0, 0.0, math.ceil(len(data) / settings.batch)
    label = f"epoch {state.epoch + 1}/{settings.epochs} {walk.name}"
    for step, batch in enumerate(
        progress(batches(data, settings.batch, device, order), label, steps)
    ):
        done = (state.epoch + (number + step / steps) / of) / settings.epochs
        for group in state.optimiser.param_groups:
            group["lr"] = settings.lr * rate(done, settings.warmup)
        counter = flops.Counter()
        with contextlib.nullcontext() if step else counter:
            clip, taken = walk.prepare(state.twin, batch, attack_seed)
            update = _step(state, walk, batch, clip)
        if not step:
            spent = counter.total / len(batch.label)
        loss = float(update.loss.detach())
        if not abs(loss) < GIVEN_UP:
            raise VmoeError(
                f"the loss of pass {walk.name!r} is {loss} in epoch {state.epoch + 1}: "
                f"training diverged. Give a smaller --lr than {settings.lr:g}."
            )
        total += loss * len(batch.label)
        gradients += taken + update.gradients
    return Walked(total / len(data), gradients, spent)


def _step(state: State, walk: Pass, batch: Batch, clip: Tensor) -> Update:
    """Update the pass's part of the twin on one batch."""
    with training(state.twin, walk.part) as parameters:
        update = walk.update(state.twin, batch, clip)
        state.optimiser.zero_grad(set_to_none=True)
        update.loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
        state.optimiser.step()
    return update


def _validate(twin: VideoMoE, data: ClipData, settings: LoopSettings) -> Validation:
    return validate(twin, data, settings.val_steps, settings.val_eps, settings.batch)


def rate(done: float, warmup: float) -> float:
    """Return the learning rate as a share of its highest: a linear rise, then half a cosine.

    Args:
        done: share of the training that is done, in [0, 1].
        warmup: share over which the rate rises.
    """
    if done < warmup:
        return 0.02 + 0.98 * done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1 - warmup, 1e-9)))


def _report(row: Row, found: Validation, settings: LoopSettings) -> None:
    shown = "  ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "epoch")
    log.info("epoch %d/%d  %s", row["epoch"], settings.epochs, shown)
    warning = found.collapse()
    if warning:
        log.warning("%s", warning)


def save(state: State, recipe: dict[str, Any], folder: Path) -> None:
    """Write the whole state as one file, so that a kill at any moment leaves a whole one."""
    tensors = {f"twin.{name}": t for name, t in state.twin.state_dict().items()}
    for index, values in state.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{key}": torch.as_tensor(v) for key, v in values.items()}
    header = {"recipe": recipe, "epoch": state.epoch, "rows": state.rows, "best": state.best}
    checkpoint.write_tensors(tensors, header, folder / STATE)


def recipe_of(folder: Path) -> dict[str, Any]:
    """Return the recipe of the run in a folder.

    Raises:
        VmoeError: no state there.
    """
    recipe: dict[str, Any] = checkpoint.read_tensors(folder / STATE)[1]["recipe"]
    return recipe


def load(state: State, recipe: dict[str, Any], folder: Path) -> State:
    """Return the state that `save` wrote, in the twin and the optimiser of a fresh one.

    Raises:
        VmoeError: no state there, or one of another recipe.
    """
    tensors, header = checkpoint.read_tensors(folder / STATE)
    if header.get("recipe") != recipe:
        changed = _changed(header.get("recipe", {}), recipe)
        raise VmoeError(f"{folder} was trained otherwise ({changed}): resume with its own flags.")
    state.twin.load_state_dict(_under(tensors, "twin."))
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _under(tensors, "optimiser.").items():
        index, key = name.split(".")
        states.setdefault(int(index), {})[key] = tensor
    plan = state.optimiser.state_dict()
    state.optimiser.load_state_dict({"state": states, "param_groups": plan["param_groups"]})
    state.epoch, state.rows, state.best = header["epoch"], header["rows"], header["best"]
    return state


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _changed(old: Any, new: Any, name: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        parts = (_changed(old.get(k), new.get(k), k) for k in keys if old.get(k) != new.get(k))
        return ", ".join(parts)
    return f"{name} {old} then, {new} now"
