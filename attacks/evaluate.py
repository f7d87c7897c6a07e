"""Evaluate models on clips under a list of attacks; everything judged on uint8 clips.

    twin = checkpoint.load(path).twin
    rows = plan(["pgd", "j-tlga"], [8 / 255])
    found = evaluate(twin, clips, label, rows, {"twin": of_twin(twin)})

Clips are made on the twin, or on an engine in its place (modes.py), rounded to the grid of a
deployed clip (`grid`), and only then judged, by every model given: what a figure of this file says
holds for a clip that can be deployed. An attack on the whole model is run once for each route_grad,
and counts with the worst per sample. A clip that is wrong without a perturbation counts as broken
by every attack: the clean clip lies in the ball, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from vmoe.attacks import grid
from vmoe.attacks.judge import (
    Ints,
    Judge,
    SeenAttacked,
    Verdict,
    l_lip_of,
    look,
    rule,
)
from vmoe.attacks.loop import improves
from vmoe.attacks.methods import every_setting, load, settings_of
from vmoe.attacks.modes import TRANSFER, Deployed
from vmoe.attacks.outcomes import (
    CLEAN,
    Arrays,
    Evaluation,
    Made,
    Outcome,
    Parts,
    Row,
    gather,
    key,
    pack,
    pack_clean,
)
from vmoe.batches import to_tensor
from vmoe.cli import progress
from vmoe.clips import Clips
from vmoe.errors import SettingError, UnknownNameError, VmoeError
from vmoe.models import ROUTE_GRADS, VideoMoE
from vmoe.runtime.engine import Prediction

__all__ = [
    "Evaluation", "Job", "Outcome", "Row", "evaluate", "fitting", "plan", "replay",
]  # fmt: skip

NONE: Mapping[str, Deployed] = MappingProxyType({})


def plan(
    attacks: Sequence[str],
    eps: Sequence[float],
    route_grads: Sequence[str] = ROUTE_GRADS,
    **values: Any,
) -> list[Row]:
    """Return the rows of some attacks at some budgets.

    Args:
        attacks: names, with hyphens or underscores.
        eps: budgets, on pixels in [0, 1].
        route_grads: what attacks on the whole model try.
        values: settings; each attack takes those that it has.

    Raises:
        UnknownNameError: no such attack, no such route_grad, a setting that no attack has.
        SettingError: a value out of its range, or that an attack refuses.
    """
    known = every_setting() if values else set()
    for name in sorted(values.keys() - known):
        raise UnknownNameError("setting of an attack", name, known)
    rows = []
    for budget in eps:
        for spelt in attacks:
            name = spelt.replace("_", "-")
            given = {**values, "eps": budget, "grid": True}
            each = (settings_of(name, {**given, "route_grad": way}) for way in route_grads)
            rows.append(Row(name, load(name).PART, budget, tuple(dict.fromkeys(each))))
    return rows


@dataclass(frozen=True)
class Job:
    """Clips in batches, each to be attacked under every row and judged.

    Attributes:
        clips: clean, uint8 [N, T, H, W, 3].
        label: [N].
        index: number of each clip in its data set, [N].
        rows: the attacks.
        judges: the models that judge, by name.
        make: makes the adversarial clips of some clips under a row.
        batch: clips attacked at once. What float32 kernels say depends on it in the last bits, so
            that batches are never cut otherwise, however the work is shared.
        keep_clips: keep the adversarial clips.
    """

    clips: Clips
    label: Ints
    index: Ints
    rows: Sequence[Row]
    judges: Mapping[str, Judge]
    make: Callable[[Row, slice], Made]
    batch: int = 16
    keep_clips: bool = False

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return -(-len(self.clips) // self.batch)

    def missing(self, parts: Parts, batches: Sequence[int]) -> dict[int, list[int]]:
        """Return the rows (CLEAN among them) that parts lack of some batches."""
        wanted = (CLEAN, *range(len(self.rows)))
        return {b: [row for row in wanted if key(b, row) not in parts] for b in batches}

    def fill(self, parts: Parts, share: tuple[int, int] = (0, 1)) -> None:
        """Make the parts that are not there yet.

        Args:
            parts: what is finished; every part is put there as soon as it is.
            share: (rank, of how many): whose batches, every n-th.

        Raises:
            VmoeError: a model answers NaN; names model and clip.
        """
        rank, world = share
        todo = self.missing(parts, range(rank, self.batches, world))

        def steps() -> Iterator[None]:
            for batch, lacking in todo.items():
                if lacking:
                    yield from self._fill(parts, batch, lacking)

        total = sum(row != CLEAN for rows in todo.values() for row in rows)
        for _ in progress(steps(), "batches attacked", total):
            pass

    def gather(self, parts: Parts) -> Evaluation:
        """Put the parts of all batches together."""
        clips = self.clips[:0]
        return gather(parts, self.label, self.rows, self.judges, self.batches, clips)

    def _fill(self, parts: Parts, batch: int, lacking: Sequence[int]) -> Iterator[None]:
        at = slice(batch * self.batch, (batch + 1) * self.batch)
        judges = {name: self._sure(name, at) for name in self.judges}
        answers = {name: judge(self.clips[at]) for name, judge in judges.items()}
        for row in lacking:
            if row == CLEAN:
                seen = {name: look(answer) for name, answer in answers.items()}
                parts[key(batch, row)] = pack_clean(seen)
                continue
            parts[key(batch, row)] = self._under(self.rows[row], at, judges, answers)
            yield

    def _under(
        self, row: Row, at: slice, judges: Mapping[str, Judge], answers: Mapping[str, Prediction]
    ) -> Arrays:
        """Attack one batch under one row, and judge it by every model."""
        made, clean, label = self.make(row, at), self.clips[at], self.label[at]
        seen = {}
        for name, judge in ((n, j) for n, j in judges.items() if row.judged_by(n)):
            before = answers[name]
            verdict, after = rule(row.part, row.expert, judge, made.clips, label, before.route)
            kept = judge(made.clips, before.route.tolist()).logits.argmax(axis=1)
            seen[name] = SeenAttacked(
                look(after), verdict.success, kept,
                l_lip_of(before.scores, after.scores, clean, made.clips),
                l_lip_of(before.logits, after.logits, clean, made.clips),
            )  # fmt: skip
        sizes = grid.linf(made.clips, clean), grid.l2(made.clips, clean)
        return pack(made, seen, *sizes, keep=self.keep_clips)

    def _sure(self, name: str, at: slice) -> Judge:
        """Return a judge of one batch that refuses NaN, of which every comparison is False."""
        judge, index = self.judges[name], self.index[at]

        def sure(clips: Clips, force_route: Sequence[int] | None = None) -> Prediction:
            answer = judge(clips, force_route)
            silent = np.isnan(answer.logits).any(axis=1) | np.isnan(answer.scores).any(axis=1)
            if silent.any():
                raise VmoeError(
                    f"clip {index[silent][0]}: the {name} answers NaN to it or near it; no figure "
                    "of this model would mean anything. Look at its weights."
                )
            return answer

        return sure


def job(
    twin: VideoMoE | None,
    clips: Clips,
    label: Ints,
    rows: Sequence[Row],
    judges: Mapping[str, Judge],
    *,
    engines: Mapping[str, Deployed] = NONE,
    index: Ints | None = None,
    batch: int = 16,
    device: torch.device | str = "cpu",
    keep_clips: bool = False,
) -> Job:
    """Return what `evaluate` does as a job: to be shared, or kept in files.

    Raises:
        SettingError: an attack on a router or an expert that the twin does not have.
    """
    any_of = next(model for model in (twin, *engines.values()) if model is not None)
    rows = fitting(len(any_of.experts), any_of.spec.frames, rows)
    numbers = np.arange(len(clips)) if index is None else index
    newest: dict[tuple[Any, ...], Made] = {}  # adaptive rows begin from it

    def transferred(row: Row, at: slice) -> Made:
        key = row.attack, row.eps, at.start
        if key not in newest:
            assert twin is not None  # no other row asks for it
            some = _Some(clips[at], label[at], numbers[at])
            newest.clear()
            newest[key] = _make(twin, judges["twin"], row, some, device)
        return newest[key]

    def make(row: Row, at: slice) -> Made:
        if row.mode == TRANSFER:
            return transferred(row, at)
        begin = transferred(row.begun, at).clips if row.begun is not None else None
        some = _Some(clips[at], label[at], numbers[at], begin)
        return _make(engines[row.against], judges[row.against], row, some, device)

    return Job(clips, label, numbers, rows, judges, make, batch, keep_clips)


def evaluate(
    twin: VideoMoE | None,
    clips: Clips,
    label: Ints,
    rows: Sequence[Row],
    judges: Mapping[str, Judge],
    *,
    engines: Mapping[str, Deployed] = NONE,
    index: Ints | None = None,
    batch: int = 16,
    device: torch.device | str = "cpu",
    keep_clips: bool = False,
) -> Evaluation:
    """Attack the twin, or engines, round, and judge.

    Args:
        twin: what the gradients are of, on `device`; None where only queries are made.
        clips: clean, uint8 [N, T, H, W, 3].
        label: [N].
        rows: the attacks, as of `plan`.
        judges: the models that judge, by name; of the twin itself `of_twin`.
        engines: by their names among the judges, what rows `against` them attack.
        index: number of each clip in its data set, [N]; starts are drawn from it.
        batch: clips attacked at once.
        device: where the twin is.
        keep_clips: keep the adversarial clips, to be saved.

    Raises:
        SettingError: an attack on a router or an expert that the twin does not have.
        VmoeError: a model answers NaN; names model and clip.
    """
    work = job(
        twin, clips, label, rows, judges, engines=engines,
        index=index, batch=batch, device=device, keep_clips=keep_clips,
    )  # fmt: skip
    return _whole(work)


def replay(
    clips: Clips,
    label: Ints,
    attacked: Sequence[tuple[Row, Clips]],
    judges: Mapping[str, Judge],
    *,
    index: Ints | None = None,
    batch: int = 16,
) -> Evaluation:
    """Judge adversarial clips that were made before.

    Args:
        clips: clean, uint8 [N, T, H, W, 3].
        label: [N].
        attacked: rows, and their clips of the same shape.
        judges: the models that judge, by name.
        index: number of each clip in its data set, [N].
        batch: clips judged at once.

    Raises:
        VmoeError: a model answers NaN; names model and clip.
    """
    held = {id(row): found for row, found in attacked}
    numbers = np.arange(len(clips)) if index is None else index

    def make(row: Row, at: slice) -> Made:
        nothing = np.zeros(len(clips[at]), np.int64)
        return Made(held[id(row)][at], nothing, nothing, nothing)

    rows = [row for row, _ in attacked]
    return _whole(Job(clips, label, numbers, rows, judges, make, batch))


def _whole(work: Job) -> Evaluation:
    parts: Parts = {}
    work.fill(parts)
    return work.gather(parts)


def fitting(experts: int, frames: int, rows: Sequence[Row]) -> list[Row]:
    """Return rows as they attack a model: a dense one, by one route_grad, as all are the same.

    Raises:
        SettingError: a row attacks a router, an expert or frames that the model does not have.
    """
    for row in rows:
        if row.part == "router" and experts == 1:
            raise SettingError(
                f"{row.attack} attacks a router, and this model is dense (1 expert): leave it out."
            )
        if row.expert is not None and row.expert >= experts:
            flag = "--expert" if row.part == "expert" else "--to-expert"
            raise SettingError(
                f"{flag} is {row.expert}; this model has experts 0 to {experts - 1}."
            )
        touched = getattr(row.settings[0], "touched_frames", 0)
        if touched > frames:
            raise SettingError(f"--touched-frames is {touched}; a clip of this model has {frames}.")
    return list(rows) if experts > 1 else [row.once() for row in rows]


@dataclass(frozen=True)
class _Some:
    """Clips of one batch that are attacked: uint8, labels, numbers; where to begin, if given."""

    clean: Clips
    label: Ints
    index: Ints
    begin: Clips | None = None


def _make(
    model: VideoMoE, own: Judge, row: Row, some: _Some, device: torch.device | str
) -> Made:  # fmt: skip
    """Attack one batch with every route_grad; per sample, the worst after rounding.

    With early stop, the next route_grad sees only the clips that still stand after rounding; a
    clip that is wrong as it is costs nothing. What it begins from is kept where nothing is worse.
    """
    method = load(row.attack)
    clean, label, index, begin = some.clean, some.label, some.index, some.begin
    start = time.perf_counter()
    clip, target = to_tensor(clean, device), torch.as_tensor(label, device=device)
    number = torch.as_tensor(index)

    def judged(clips: Clips, at: Ints) -> Verdict:
        return rule(row.part, row.expert, own, clips, label[at], route[at])[0]

    every = np.arange(len(clean))
    route = own(clean).route
    best, success = clean.copy(), judged(clean, every).success
    loss = np.full(len(clean), -np.inf)
    asked = model.asked if isinstance(model, Deployed) else 0
    if isinstance(model, Deployed):
        model.begin = None
    if begin is not None and isinstance(model, Deployed):
        place, given = {int(i): k for k, i in enumerate(index)}, to_tensor(begin, device)
        model.begin = lambda numbers: given[[place[int(i)] for i in numbers]]
        verdict = judged(begin, every)
        best, loss, success = begin.copy(), verdict.loss, success | verdict.success
    cost = np.zeros((3, len(clean)), np.int64)
    for settings in row.settings:
        at = np.flatnonzero(~success) if getattr(settings, "early_stop", False) else every
        if not len(at):
            break
        found = method.attack(model, clip[at], target[at], settings, number[at])
        rounded = grid.to_grid(found.adversarial, clean[at], row.eps, row.norm)
        verdict = judged(rounded, at)
        better = improves(verdict.success, verdict.loss, success[at], loss[at])
        best[at[better]], loss[at[better]] = rounded[better], verdict.loss[better]
        success[at] |= verdict.success
        passes = found.forwards, found.backwards, found.dead
        cost[:, at] += np.stack([each.cpu().numpy() for each in passes])
    forwards, backwards, dead = cost
    asked = model.asked - asked if isinstance(model, Deployed) else 0
    return Made(best, forwards, backwards, dead, time.perf_counter() - start, asked)
