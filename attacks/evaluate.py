"""Evaluate models on clips under a list of attacks; everything judged on uint8 clips.

    twin = checkpoint.load(path).twin
    rows = plan(["pgd", "j-tlga"], [8 / 255])
    found = evaluate(twin, clips, label, rows, {"twin": of_twin(twin)})

Clips are made on the twin, rounded to the grid of a deployed clip (`grid`), and only then judged,
by every model given: what a figure of this file says holds for a clip that can be deployed. An
attack on the whole model is run once for each route_grad, and counts with the worst per sample.
A clip that is wrong without a perturbation counts as broken by every attack: the clean clip lies
in the ball, too.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vmoe import registry
from vmoe.attacks import grid
from vmoe.attacks.judge import (
    Ints,
    Judge,
    Seen,
    SeenAttacked,
    look,
    of_twin,
    router_l_lip,
    rule,
)
from vmoe.batches import to_tensor
from vmoe.cli import progress
from vmoe.clips import Clips
from vmoe.errors import SettingError
from vmoe.models import ROUTE_GRADS, VideoMoE
from vmoe.runtime.engine import Prediction
from vmoe.settings import Settings

METHODS = "vmoe.attacks.methods"


@dataclass(frozen=True)
class Row:
    """One attack at one budget.

    Attributes:
        attack: its name.
        part: what it attacks: `model`, `router` or `expert`.
        eps: L-infinity budget, on pixels in [0, 1].
        settings: one for each route_grad that is tried; of one that has none, one.
    """

    attack: str
    part: str
    eps: float
    settings: tuple[Settings, ...]

    @property
    def expert(self) -> int:
        """Which expert it attacks; 0 where it attacks none alone."""
        return int(getattr(self.settings[0], "expert", 0)) if self.settings else 0


@dataclass(frozen=True)
class Outcome:
    """What became of all clips under one row.

    Attributes:
        row: the attack.
        seen: what each model says, by the model's name.
        linf: largest change of a value, in grey levels, measured on the final clips.
        forwards: forward passes for each sample, over all route_grads.
        backwards: backward passes for each sample, over all route_grads.
        seconds: of making and rounding the clips.
        clips: uint8 [N, T, H, W, 3]; empty where they are not kept.
    """

    row: Row
    seen: dict[str, SeenAttacked]
    linf: int
    forwards: int
    backwards: int
    seconds: float
    clips: Clips


@dataclass(frozen=True)
class Evaluation:
    """Everything that was seen, one value for each clip.

    Attributes:
        label: [N].
        clean: what each model says of the clean clips, by the model's name.
        outcomes: one for each row.
    """

    label: Ints
    clean: dict[str, Seen]
    outcomes: tuple[Outcome, ...]


@dataclass
class _Tally:
    """What is gathered of one row, batch by batch."""

    seen: dict[str, list[SeenAttacked]] = field(default_factory=dict)
    clips: list[Clips] = field(default_factory=list)
    linf: int = 0
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Made:
    """Adversarial clips of one batch, and what they cost."""

    clips: Clips
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0


def plan(
    attacks: Sequence[str],
    eps: Sequence[float],
    route_grads: Sequence[str] = ROUTE_GRADS,
    **values: Any,
) -> list[Row]:
    """Return the rows of some attacks at some budgets.

    Args:
        attacks: names.
        eps: budgets, on pixels in [0, 1].
        route_grads: what attacks on the whole model try.
        values: settings; each attack takes those that it has.

    Raises:
        UnknownNameError: no such attack, no such route_grad.
        SettingError: a value out of its range.
    """
    rows = []
    for budget in eps:
        for name in attacks:
            method = registry.load(METHODS, name, "attack")
            fields = {f.name for f in dataclasses.fields(method.Settings)}
            given = {k: v for k, v in values.items() if k in fields} | {"eps": budget, "grid": True}
            ways = [{"route_grad": way} for way in route_grads] if "route_grad" in fields else [{}]
            settings = tuple(method.Settings(**given, **way) for way in ways)
            rows.append(Row(name.replace("_", "-"), method.PART, budget, settings))
    return rows


def evaluate(
    twin: VideoMoE,
    clips: Clips,
    label: Ints,
    rows: Sequence[Row],
    judges: Mapping[str, Judge],
    *,
    index: Ints | None = None,
    batch: int = 16,
    device: torch.device | str = "cpu",
    keep_clips: bool = False,
) -> Evaluation:
    """Attack the twin, round, and judge.

    Args:
        twin: what the gradients are of, on `device`.
        clips: clean, uint8 [N, T, H, W, 3].
        label: [N].
        rows: the attacks, as of `plan`.
        judges: the models that judge, by name; of the twin itself `of_twin`.
        index: number of each clip in its data set, [N]; starts are drawn from it.
        batch: clips attacked at once.
        device: where the twin is.
        keep_clips: keep the adversarial clips, to be saved.

    Raises:
        SettingError: an attack on a router or an expert that the twin does not have.
    """
    _check(twin, rows)
    numbers = np.arange(len(clips)) if index is None else index

    def make(row: Row, at: slice) -> _Made:
        return _make(twin, row, clips[at], label[at], numbers[at], device)

    return _walk(clips, label, rows, judges, make, batch, keep_clips)


def _check(twin: VideoMoE, rows: Sequence[Row]) -> None:
    """Refuse, before any work, rows that attack what the twin does not have."""
    last = len(twin.experts) - 1
    for row in rows:
        if row.part == "router" and twin.router is None:
            raise SettingError(
                f"{row.attack} attacks a router, and this model is dense (1 expert): leave it out."
            )
        if row.expert > last:
            raise SettingError(f"--expert is {row.expert}; this model has experts 0 to {last}.")


def replay(
    clips: Clips,
    label: Ints,
    attacked: Sequence[tuple[Row, Clips]],
    judges: Mapping[str, Judge],
    *,
    batch: int = 16,
) -> Evaluation:
    """Judge adversarial clips that were made before.

    Args:
        clips: clean, uint8 [N, T, H, W, 3].
        label: [N].
        attacked: rows, and their clips of the same shape.
        judges: the models that judge, by name.
        batch: clips judged at once.
    """
    made = {id(row): found for row, found in attacked}

    def make(row: Row, at: slice) -> _Made:
        return _Made(made[id(row)][at])

    return _walk(clips, label, [row for row, _ in attacked], judges, make, batch, False)


def _walk(
    clips: Clips, label: Ints, rows: Sequence[Row], judges: Mapping[str, Judge],
    make: Callable[[Row, slice], _Made], batch: int, keep_clips: bool,
) -> Evaluation:  # fmt: skip
    """Go through the batches: judge clean clips, make adversarial ones, judge those."""
    clean: dict[str, list[Seen]] = {name: [] for name in judges}
    tallies = [_Tally(seen={name: [] for name in judges}) for _ in rows]

    def steps() -> Iterator[None]:
        for start in range(0, len(clips), batch):
            at = slice(start, start + batch)
            answers = {name: judge(clips[at]) for name, judge in judges.items()}
            for name, answer in answers.items():
                clean[name].append(look(answer))
            for row, tally in zip(rows, tallies, strict=True):
                made = make(row, at)
                _judge(row, made.clips, clips[at], label[at], judges, answers, tally)
                _count(tally, made, clips[at], keep_clips)
                yield

    total = len(rows) * -(-len(clips) // batch)
    for _ in progress(steps(), "batches attacked", total):
        pass
    outcomes = tuple(_outcome(row, t, clips) for row, t in zip(rows, tallies, strict=True))
    return Evaluation(label, {name: _join(parts) for name, parts in clean.items()}, outcomes)


def _make(
    twin: VideoMoE, row: Row, clean: Clips, label: Ints, index: Ints, device: torch.device | str
) -> _Made:  # fmt: skip
    """Attack one batch with every route_grad; per sample, the worst after rounding."""
    method, own = registry.load(METHODS, row.attack, "attack"), of_twin(twin, device)
    start, forwards, backwards = time.perf_counter(), 0, 0
    clip, target = to_tensor(clean, device), torch.as_tensor(label, device=device)
    route = own(clean).route
    wrong, _ = rule(row.part, row.expert, own, clean, label, route)
    best, success = clean.copy(), wrong.success.copy()
    loss = np.full(len(clean), -np.inf)
    for settings in row.settings:
        found = method.attack(twin, clip, target, settings, torch.as_tensor(index))
        rounded = grid.to_grid(found.adversarial, clean, row.eps)
        verdict, _ = rule(row.part, row.expert, own, rounded, label, route)
        same = verdict.success == success
        better = (verdict.success & ~success) | (same & (verdict.loss > loss))
        best[better], loss[better] = rounded[better], verdict.loss[better]
        success |= verdict.success
        forwards += int(found.forwards.sum())
        backwards += int(found.backwards.sum())
    return _Made(best, forwards, backwards, time.perf_counter() - start)


def _judge(
    row: Row, made: Clips, clean: Clips, label: Ints, judges: Mapping[str, Judge],
    answers: Mapping[str, Prediction], tally: _Tally,
) -> None:  # fmt: skip
    for name, judge in judges.items():
        route = answers[name].route
        verdict, answer = rule(row.part, row.expert, judge, made, label, route)
        kept = judge(made, route.tolist()).logits.argmax(axis=1)
        term = router_l_lip(answers[name].scores, answer.scores, clean, made)
        tally.seen[name].append(SeenAttacked(look(answer), verdict.success, kept, term))


def _count(tally: _Tally, made: _Made, clean: Clips, keep_clips: bool) -> None:
    tally.linf = max(tally.linf, grid.linf(made.clips, clean))
    tally.forwards, tally.backwards = (
        tally.forwards + made.forwards, tally.backwards + made.backwards,
    )  # fmt: skip
    tally.seconds += made.seconds
    if keep_clips:
        tally.clips.append(made.clips)


def _outcome(row: Row, tally: _Tally, clips: Clips) -> Outcome:
    seen = {
        name: SeenAttacked(
            _join([part.seen for part in parts]),
            np.concatenate([part.success for part in parts]),
            np.concatenate([part.kept for part in parts]),
            np.concatenate([part.l_lip for part in parts]),
        )
        for name, parts in tally.seen.items()
    }
    kept = np.concatenate(tally.clips) if tally.clips else clips[:0]
    return Outcome(
        row, seen, tally.linf, tally.forwards, tally.backwards, tally.seconds, kept
    )  # fmt: skip


def _join(parts: Sequence[Seen]) -> Seen:
    return Seen(*(np.concatenate(values) for values in zip(*parts, strict=True)))
