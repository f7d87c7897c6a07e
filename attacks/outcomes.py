"""What attacks come to: rows, what became of every clip under them, and the parts it is kept in.

A part is one batch under one row, as plain arrays; parts in memory (a dict) or in files
(`parts.PartFiles`) gather to the same evaluation, whoever made them and in whatever order.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vmoe.attacks.judge import Ints, Seen, SeenAttacked
from vmoe.attacks.modes import TRANSFER
from vmoe.clips import Clips
from vmoe.settings import Settings

Arrays: TypeAlias = dict[str, NDArray[Any]]
Parts: TypeAlias = MutableMapping[str, Arrays]
CLEAN = -1  # the row of the clean clips
BESIDE = SeenAttacked._fields[1:]  # what is seen of adversarial clips alone


@dataclass(frozen=True)
class Row:
    """One attack at one budget, in one mode.

    Attributes:
        attack: its name.
        part: what it attacks: `model`, `router` or `expert`.
        eps: budget, on pixels in [0, 1].
        settings: one for each route_grad that is tried; of one that has none, one.
        mode: how it gets values and gradients (modes.py).
        against: the engine that it is made against, and that judges it beside the twin; empty
            where every model judges.
        begun: the transfer from whose clips it begins; None where the attack itself says.
        origin: of saved clips, the engine that they were made against; empty for the twin.
    """

    attack: str
    part: str
    eps: float
    settings: tuple[Settings, ...]
    mode: str = TRANSFER
    against: str = ""
    begun: Row | None = None
    origin: str = ""

    def once(self) -> Row:
        """Return the row of a dense model: by one route_grad, as all are the same."""
        begun = None if self.begun is None else self.begun.once()
        return replace(self, settings=self.settings[:1], begun=begun)

    @property
    def made_on(self) -> str:
        """The model that its clips are made on: the twin, or an engine's name."""
        return self.against or self.origin or "twin"

    def judged_by(self, model: str) -> bool:
        """Return whether a model (or `twin`) judges its clips."""
        return not self.against or model in ("twin", self.against)

    @property
    def expert(self) -> int | None:
        """Which expert it attacks, or sends clips to; None of any other attack."""
        chosen = (getattr(s, name, None) for s in self.settings for name in ("expert", "to_expert"))
        return next((expert for expert in chosen if expert is not None), None)

    @property
    def norm(self) -> str:
        """The norm of the budget: linf or l2."""
        return str(getattr(self.settings[0], "norm", "linf")) if self.settings else "linf"


@dataclass(frozen=True)
class Outcome:
    """What became of all clips under one row.

    Attributes:
        row: the attack.
        seen: what each model says, by the model's name.
        linf: largest change of a value, in grey levels, measured on the final clips.
        l2: largest L2 change of a clip, on pixels in [0, 1], measured on the final clips.
        forwards: forward passes of each clip, over all route_grads, [N]; judging not counted.
        backwards: backward passes of each clip, over all route_grads, [N].
        dead: of them, those whose gradient was zero or not finite, [N].
        seconds: of making and rounding the clips.
        clips: uint8 [N, T, H, W, 3]; empty where they are not kept.
        asked: how often the engine that they are made against was asked about a clip, of all
            clips together; judging not counted.
    """

    row: Row
    seen: dict[str, SeenAttacked]
    linf: int
    l2: float
    forwards: Ints
    backwards: Ints
    dead: Ints
    seconds: float
    clips: Clips
    asked: int = 0


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


@dataclass(frozen=True)
class Made:
    """Adversarial clips of one batch, and what they cost: passes of each clip, [B].

    `asked` is that of an outcome.
    """

    clips: Clips
    forwards: Ints
    backwards: Ints
    dead: Ints
    seconds: float = 0.0
    asked: int = 0


def key(batch: int, row: int) -> str:
    """Return the name of a part: of a batch under a row, or (row CLEAN) as it is."""
    return f"batch{batch:05d}-{'clean' if row == CLEAN else f'row{row:03d}'}"


def pack_clean(seen: dict[str, Seen]) -> Arrays:
    """Return what models say of the clean clips of a batch, as arrays."""
    return {
        f"{model}.{field}": np.asarray(value)
        for model, s in seen.items()
        for field, value in s._asdict().items()
    }


def pack(made: Made, seen: dict[str, SeenAttacked], linf: int, l2: float, *, keep: bool) -> Arrays:
    """Return a batch under a row as arrays; `keep` says whether its clips are among them."""
    arrays = pack_clean({model: s.seen for model, s in seen.items()})
    for model, s in seen.items():
        arrays |= {f"{model}.{f}": np.asarray(getattr(s, f)) for f in BESIDE}
    cost = {name: getattr(made, name) for name in ("forwards", "backwards", "dead")}
    sizes = {"linf": np.array(linf), "l2": np.array(l2), "seconds": np.array(made.seconds)}
    sizes["asked"] = np.array(made.asked)
    return {**arrays, **cost, **sizes, **({"clips": made.clips} if keep else {})}


def gather(
    parts: Parts, label: Ints, rows: Sequence[Row], models: Iterable[str], batches: int,
    empty: Clips,
) -> Evaluation:  # fmt: skip
    """Put the parts of all batches together.

    Args:
        parts: whole.
        label: [N].
        rows: in their order.
        models: names of those that judged.
        batches: how many there are.
        empty: no clips, uint8 [0, T, H, W, 3], where clips were not kept.
    """
    names = list(models)
    clean = _joined(parts, batches, CLEAN)
    outcomes = []
    for number, row in enumerate(rows):
        held = [parts[key(batch, number)] for batch in range(batches)]
        at = _join(held)
        seen = {
            name: SeenAttacked(_seen(at, name), *(at[f"{name}.{f}"] for f in BESIDE))
            for name in names
            if row.judged_by(name)
        }
        outcomes.append(
            Outcome(
                row, seen, max(int(part["linf"]) for part in held),
                max(float(part["l2"]) for part in held), at["forwards"], at["backwards"],
                at["dead"], sum(float(part["seconds"]) for part in held), at.get("clips", empty),
                sum(int(part["asked"]) for part in held),
            )
        )  # fmt: skip
    return Evaluation(label, {name: _seen(clean, name) for name in names}, tuple(outcomes))


def _joined(parts: Parts, batches: int, row: int) -> Arrays:
    return _join([parts[key(batch, row)] for batch in range(batches)])


def _join(held: Sequence[Arrays]) -> Arrays:
    """Return the arrays of some batches one after the other; of single numbers, nothing."""
    wanted = [name for name, value in held[0].items() if value.ndim]
    return {name: np.concatenate([part[name] for part in held]) for name in wanted}


def _seen(arrays: Arrays, model: str) -> Seen:
    return Seen(*(arrays[f"{model}.{field}"] for field in Seen._fields))
