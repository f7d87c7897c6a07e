"""The training loop: epochs of walks, a schedule, a budget, validation."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vmoe.attacks.methods import pgd
from vmoe.attacks.ranks import Ranks
from vmoe.batches import Batch, Held, rows_of, shuffled
from vmoe.cli import log, progress
from vmoe.data import ClipData
from vmoe.errors import SettingError, VmoeError
from vmoe.loading import Loader
from vmoe.models import VideoMoE, flops
from vmoe.settings import Settings, opt
from vmoe.train import averaging, together
from vmoe.train.passes import Pass, Walk, training
from vmoe.train.schedule import Course, rate
from vmoe.train.state import Row, State
from vmoe.train.validate import Validation, crowded, validate

GIVEN_UP = 1e30  # a loss beyond this, or that is no number, ends the training
PATIENCE = 2  # epochs in a row after which a collapsed routing ends the training


@dataclass(frozen=True)
class LoopSettings(Settings):
    """What the loop itself takes."""

    epochs: int = opt(10, "walks over the training data; a --budget stands in its place",
                      at_least=1)  # fmt: skip
    budget: float = opt(
        0.0, "TFLOPs to spend on all passes of the training, attacks included; 0: by --epochs",
        at_least=0,
    )  # fmt: skip
    batch: int = opt(32, "clips of a batch, over all processes", at_least=2)
    lr: float = opt(3e-3, "highest learning rate of AdamW", above=0)
    weight_decay: float = opt(1e-3, "AdamW's weight decay", at_least=0)
    schedule: str = opt("cosine", "how the rate falls", choices=("cosine", "constant"))
    warmup: float = opt(0.05, "share of the training over which the rate rises", at_least=0)
    clip_norm: float = opt(5.0, "largest norm of an update's gradient; 0: any", at_least=0)
    ema: float = opt(
        0.0, "decay per update of an average of the weights, which is what is validated and kept; "
        "0: none", at_least=0, at_most=1,
    )  # fmt: skip
    bn: str = opt(
        "batch", "what BatchNorm normalises an update by: the batch, or its running statistics, "
        "which then stay as they are", choices=("batch", "running"),
    )  # fmt: skip
    val_steps: int = opt(
        10, "PGD steps of the validation; 0 validates clean clips alone", at_least=0
    )
    val_eps: float = opt(
        8 / 255, "budget of the validation's attack; where --eps is given, that", at_least=0
    )
    on_collapse: str = opt(
        "stop", "what a router does to the training that sends all clips to one expert",
        choices=("stop", "warn"),
    )  # fmt: skip
    seed: int = opt(0, "random seed of weights, order and attacks")


@dataclass(frozen=True)
class Recipe:
    """What is trained by, from the settings of a method.

    Attributes:
        walks: from the share of the training that is done, when an epoch begins, to its walks.
        bf16: whether passes run in bfloat16.
        norm: of the validation's budget.
    """

    walks: Callable[[float], list[Walk]]
    bf16: bool = False
    norm: str = "linf"


class Walked(NamedTuple):
    """One walk over the data.

    Attributes:
        losses: the mean of each pass's.
        gradients: clips that a gradient was taken of through experts, those of updates included.
    """

    losses: dict[str, float]
    gradients: int


def start(twin: VideoMoE, settings: LoopSettings) -> State:
    """Return the state before the first epoch; every process of torchrun takes its part in it."""
    together.share(twin)
    optimiser = torch.optim.AdamW(
        twin.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    average = averaging.Average(twin, settings.ema) if settings.ema else None
    return State(twin, optimiser, average)


def run(
    state: State,
    recipe: Recipe,
    loader: Loader,
    val_data: ClipData,
    settings: LoopSettings,
    ranks: Ranks | None = None,
) -> Iterator[State]:
    """Train; yield the state after every epoch.

    Args:
        state: where to begin: from `start`, or as `state.load` read it.
        recipe: the walks of each epoch.
        loader: of the training's clips, in batches of `settings.batch`; in a process of torchrun,
            its share of them.
        val_data: the validation's clips.
        settings: epochs, batch, rates, seed; everything drawn comes from (seed, epoch, pass), so
            that a training that was interrupted and resumed is the same, bit for bit.
        ranks: this process among those that share each batch.

    Raises:
        VmoeError: the loss is no number any more, or routing has collapsed.
        SettingError: a batch that cannot be shared by so many processes.
    """
    ranks = ranks or Ranks()
    held_val = Held(val_data)
    if settings.batch < 2 * ranks.world:
        raise SettingError(
            f"--batch is {settings.batch}, over {ranks.world} processes: give at least "
            f"{2 * ranks.world}."
        )
    course = Course(settings.epochs, settings.budget, state, settings.batch // 2)
    while not course.over:
        begin, waited_s = time.monotonic(), loader.waited_s
        row, gradients = _walk(state, recipe, loader, settings, course)
        train_s = time.monotonic() - begin
        found = _validated(state, recipe, held_val, settings, ranks)
        row |= found.row() | {"gradients": gradients, "tflops": state.tflops}
        row |= {"epoch_s": time.monotonic() - begin, "train_s": train_s}
        row["wait_share"] = (loader.waited_s - waited_s) / train_s
        state.epoch += 1
        state.rows.append(row)
        state.best = max(state.best, found.figure)
        _report(row, found, settings)
        yield state
        _refuse_collapse(state.rows, settings)


def _walk(
    state: State, recipe: Recipe, loader: Loader, settings: LoopSettings, course: Course
) -> tuple[Row, int]:
    """Train for one epoch; return its losses, and how many gradients of clips it took."""
    walks = recipe.walks(course.done)
    course.begin(len(loader), [name_of(walk) for walk in walks])
    row: Row = {"epoch": state.epoch + 1}
    gradients = 0
    for number, walk in enumerate(walks):
        walked = _Walker(state, walk, number, loader, settings, recipe.bf16, course).go()
        row |= {f"loss_{name.replace(' ', '_')}": loss for name, loss in walked.losses.items()}
        gradients += walked.gradients
    course.end()
    return row, gradients


def _validated(
    state: State, recipe: Recipe, data: ClipData, settings: LoopSettings, ranks: Ranks
) -> Validation:
    """Measure what an epoch has left.

    Raises:
        VmoeError: it answers NaN: its last step has ruined it.
    """
    attack = pgd.Settings(
        eps=settings.val_eps, steps=max(settings.val_steps, 1), norm=recipe.norm,
        early_stop=False,  # flips, too
    )  # fmt: skip
    found = validate(
        state.kept, data, attack if settings.val_steps else None, settings.batch, ranks
    )
    if not found.finite:
        raise VmoeError(
            f"the model answers NaN to validation clips after epoch {state.epoch + 1}: training "
            f"diverged. Give a smaller --lr than {settings.lr:g}."
        )
    return found


def name_of(walk: Walk) -> str:
    """Return the name of a walk: those of its passes."""
    return ", ".join(each.name for each in walk)


class _Walker:
    """One walk over the data, a batch after the other."""

    def __init__(
        self, state: State, walk: Walk, number: int, loader: Loader, settings: LoopSettings,
        bf16: bool, course: Course,
    ) -> None:  # fmt: skip
        """Draw the order and the attacks' seed from (seed, epoch, number of the walk)."""
        self._state, self._walk, self._settings, self._course = state, walk, settings, course
        self._bf16, self._loader = bf16, loader
        self._device = next(state.twin.parameters()).device
        seed = (settings.seed, state.epoch, number)
        self._order = shuffled(len(loader), *seed)[: course.clips]
        self._attack_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._name = name_of(walk)

    def go(self) -> Walked:
        """Walk.

        The FLOPs of everything that it runs, attack, update and terms, are counted on its first
        batch by torch's own counter: clips cost alike, so that the rest is the same per clip.
        """
        losses = dict.fromkeys([each.name for each in self._walk], 0.0)
        gradients, spent, seen = 0, 0.0, 0
        counts = [len(rows) for rows in rows_of(self._order, self._settings.batch)]
        taken = self._loader.batches(self._order, self._state.epoch)
        label = f"epoch {self._state.epoch + 1} {self._name}"
        for step, batch in enumerate(progress(taken, label, len(counts))):
            if self._course.stops(self._name):
                break
            self._set_rate()
            counter, count = flops.Counter(), counts[step]
            with contextlib.nullcontext() if step else counter:
                for each in self._walk:
                    loss, grads = self._pass(each, batch, count, step)
                    losses[each.name] += loss * count
                    gradients += grads
            if not step:
                spent = together.total_float(counter.total) / count
            seen += count
            self._course.spend(self._name, spent, count)
        for each in self._walk:
            if each.after is not None:
                each.after(self._state)
        means = {name: loss / max(seen, 1) for name, loss in losses.items()}
        return Walked(means, int(together.total_float(gradients)))

    def _set_rate(self) -> None:
        how = self._settings
        share = rate(self._course.done, how.warmup, how.schedule)
        for group in self._state.optimiser.param_groups:
            group["lr"] = how.lr * share

    def _pass(self, each: Pass, batch: Batch, count: int, step: int) -> tuple[float, int]:
        """Attack and update on one batch of so many clips; return the loss and the gradients."""
        state, how = self._state, self._settings
        clip, taken = each.prepare(state.twin, batch, self._attack_seed)
        autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16)
        with training(state.twin, each.part, statistics=how.bn == "batch") as parameters:
            with autocast:
                update = each.update(state.twin, batch, clip)
            loss = update.loss * (len(batch.label) / count)  # of the mean over all processes
            value = together.total_float(float(loss.detach()))
            self._refuse(value, f"loss of pass {each.name!r}", step)
            self._descend(each, loss, parameters, step)
        if state.average is not None:
            state.average.update(state.twin)
        return value, taken + update.gradients

    def _descend(self, each: Pass, loss: Tensor, parameters: list[nn.Parameter], step: int) -> None:
        self._state.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        together.sum_gradients(parameters)
        with contextlib.nullcontext() if each.around is None else each.around(self._state.twin):
            norm = torch.nn.utils.clip_grad_norm_(parameters, self._settings.clip_norm or math.inf)
            self._refuse(float(norm), f"gradient's norm of pass {each.name!r}", step)
            self._state.optimiser.step()

    def _refuse(self, value: float, what: str, step: int) -> None:
        """Refuse a loss, or the norm of a gradient, that is beyond all reason, before the step."""
        if not abs(value) < GIVEN_UP:
            raise VmoeError(
                f"the {what} is {value} in epoch {self._state.epoch + 1}, batch {step + 1}: "
                f"training diverged. Give a smaller --lr than {self._settings.lr:g}."
            )


def _report(row: Row, found: Validation, settings: LoopSettings) -> None:
    shown = "  ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "epoch")
    of = "" if settings.budget else f"/{settings.epochs}"
    log.info("epoch %d%s  %s", row["epoch"], of, shown)
    warning = found.collapse()
    if warning:
        log.warning("%s", warning)


def _refuse_collapse(rows: Sequence[Row], settings: LoopSettings) -> None:
    """End a training whose router has sent nearly all clips to one expert for some epochs."""
    last = [crowded(row) for row in rows[-PATIENCE:]]
    if settings.on_collapse == "stop" and len(last) == PATIENCE and all(last):
        raise VmoeError(
            f"routing has collapsed: for {PATIENCE} epochs, up to epoch {len(rows)}, one expert "
            "has received nearly all clips. Train anew with a higher --balance, another "
            "--balance-loss or fewer --experts; --on-collapse warn lets it go on."
        )
