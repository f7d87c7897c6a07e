"""Accuracy: what a bundle loses against its twin, on clean clips and on adversarial ones.

Both answer the same clips, so that a difference is one of the clips that they disagree about. On
clean clips the accuracy is judged. Of adversarial ones it is each clip that the engine alone gets
wrong, as `vmoe-attack --gate-robust` makes and counts them (vmoe.attacks.gate); those that are
wrong as they are count there, too, and here by the gate `clean`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vmoe import adversarial
from vmoe.adversarial import AdversarialClips
from vmoe.attacks import gate
from vmoe.attacks.modes import TRANSFER
from vmoe.checkpoint import Checkpoint
from vmoe.clips import Clips, ClipSpec
from vmoe.data import DataSettings, open_data
from vmoe.errors import SettingError
from vmoe.runtime import Engine

from . import parity
from .calibration import trained_eps
from .gates import Gate, GateSettings
from .parity import Findings, Ints

log = logging.getLogger("vmoe.export")

CLIPS = 64  # of a check
CLIPS_BELOW_FP32 = 256  # where answers may differ, a point must be more than one clip
NOISE = 16  # of them, where the clips are the built-in ones: nothing that a camera would see
UNKNOWN = -1  # label of a clip that has none of the twin's
ATTACKED = 16  # clips of the gate `robust`
ATTACKED_BELOW_FP32 = 64
STEPS = 10  # of PGD
SHOWN = 12  # letters of a hash


class Sample(NamedTuple):
    """Clips of a check.

    Attributes:
        clips: uint8 [N, T, H, W, 3].
        label: [N]; UNKNOWN where the clip has no label, or none of the twin's.
    """

    clips: Clips
    label: Ints

    @property
    def known(self) -> NDArray[np.intp]:
        """The clips that have a label."""
        return np.flatnonzero(self.label != UNKNOWN)


@dataclass(frozen=True)
class Compared:
    """Twin and engine on the same labelled clips.

    Attributes:
        what: the clips: `clean`, or an attack and its budget.
        clips: how many.
        twin_right: how many the twin gets right.
        engine_right: how many the engine gets right.
        lost: right by the twin, wrong by the engine.
        won: the other way round.
        agree: how many get the same label from both, right or wrong.
    """

    what: str
    clips: int
    twin_right: int
    engine_right: int
    lost: int
    won: int
    agree: int

    @property
    def drop(self) -> float:
        """Accuracy that is lost, in points."""
        return 100 * (self.twin_right - self.engine_right) / self.clips

    @property
    def broken(self) -> float:
        """Clips that the engine gets wrong and the twin does not, in per cent of all."""
        return 100 * self.lost / self.clips

    def to_report(self) -> dict[str, Any]:
        """Return it as report.json has it."""
        return {
            "clips": self.clips,
            "twin_pct": 100 * self.twin_right / self.clips,
            "engine_pct": 100 * self.engine_right / self.clips,
            "drop_points": self.drop,
            "broken_on_engine_alone_pct": self.broken,
            "lost": self.lost,
            "won": self.won,
            "top1_agreement_pct": 100 * self.agree / self.clips,
        }


def sample(
    spec: ClipSpec,
    labels: tuple[str, ...],
    data: str | None,
    seed: int,
    group: str = "",
    clips: int = CLIPS,
    fold: int = 1,
) -> Sample:
    """Return the clips of a check, of the split `val`.

    Args:
        spec: the clips that the model takes.
        labels: the twin's; clips of a data set with others have none.
        data: a data set, of which the first clips are taken; None is rendered camera motion, then
            noise, black and white.
        seed: of what is drawn.
        group: regular expression that splits a folder, as the twin was trained.
        clips: how many.
        fold: official split of a data set that has several, as the twin was trained.

    Raises:
        SettingError: no such data.
    """
    noise = min(NOISE, clips // 4) if data is None else 0
    how = DataSettings(clips=clips - noise, group=group, seed=seed, fold=fold)
    opened = open_data(data or "camera-motion", "val", spec, how)
    taken = [opened[i] for i in range(min(clips - noise, len(opened)))]
    label = np.array([label for _, label in taken], np.int64)
    if opened.labels != labels:
        label[:] = UNKNOWN
    found = np.stack([clip for clip, _ in taken])
    if not noise:
        return Sample(found, label)
    drawn = np.random.default_rng(seed).integers(0, 256, (noise, *spec.shape), dtype=np.uint8)
    for clip, value in zip(drawn[::-1], (255, 0), strict=False):  # all white, all black
        clip[:] = value
    nameless = np.full(noise, UNKNOWN, np.int64)
    return Sample(np.concatenate([found, drawn]), np.concatenate([label, nameless]))


def compare(what: str, twin: Ints, engine: Ints, label: Ints) -> Compared:
    """Compare what twin and engine say of clips with their labels."""
    broken, lost = twin != label, engine != label
    return Compared(
        what, len(label), int((~broken).sum()), int((~lost).sum()),
        int(gate.lost(broken, lost).sum()), int(gate.lost(lost, broken).sum()),
        int((twin == engine).sum()),
    )  # fmt: skip


def clean(found: Findings, sample: Sample, settings: GateSettings) -> tuple[Gate, dict[str, Any]]:
    """Judge the accuracy on clean clips.

    Where no clip has a label of the twin's, its own answers stand for them.
    """
    known = sample.known
    if len(known):
        labels, at = sample.label[known], known
    else:
        labels, at = found.twin_said, np.arange(found.clips)
    made = compare("clean", found.twin_said[at], found.engine_said[at], labels)
    judged = Gate("clean", "clean accuracy lost", made.drop, settings.gate_clean, " points")
    said = {"labels": "the data's" if len(known) else "the twin's own answers"}
    return judged, {"clean": {**said, **made.to_report()}}


class Adversarial(NamedTuple):
    """Clips of one attack on the twin.

    Attributes:
        attack: its name.
        budget: as it is shown.
        clips: uint8 [N, T, H, W, 3].
        label: [N].
        twin_said: index of the label that the twin gives each, [N].
    """

    attack: str
    budget: str
    clips: Clips
    label: Ints
    twin_said: Ints

    @property
    def what(self) -> str:
        """The attack and its budget."""
        return f"{self.attack} {self.budget}"


def robust(
    attacked: Sequence[Adversarial], engine: Engine, settings: GateSettings
) -> tuple[Gate, dict[str, Any]]:
    """Judge a bundle by the clips that it loses to any attack, and the twin to none of a budget.

    That of the budget by which it loses most counts.
    """
    made, within = [], defaultdict(list)
    for of in _told_apart(attacked):
        said = parity.infer(engine, of.clips).logits.argmax(axis=1)
        made.append(compare(of.what, of.twin_said, said, of.label))
        within[of.budget].append((of.attack, of.twin_said != of.label, said != of.label))
    counts = []
    for budget, tried in within.items():
        names, *broken = zip(*tried, strict=True)
        twin, own = (np.any(each, axis=0) for each in broken)
        lost, won = int(gate.lost(twin, own).sum()), int(gate.lost(own, twin).sum())
        counts.append((lost, won, len(twin), f"{', '.join(names)} {budget}"))
    lost, won, clips, what = max(counts, key=lambda each: each[0])
    what = (
        f"adversarial clips broken on the engine alone ({what}: {lost} of {clips}; on the twin "
        f"alone {won})"
    )
    judged = Gate("robust", what, 100 * lost / clips, settings.gate_robust, " %")
    return judged, {"robust": {compared.what: compared.to_report() for compared in made}}


def _told_apart(attacked: Sequence[Adversarial]) -> Iterator[Adversarial]:
    """Yield the clips of attacks under names of their own: the second `pgd` is `pgd (2)`."""
    count: Counter[str] = Counter()
    for of in attacked:
        count[of.what] += 1
        again = f" ({count[of.what]})" if count[of.what] > 1 else ""
        yield of._replace(attack=of.attack + again)


def attack(held: Checkpoint, sample: Sample, count: int, seed: int) -> list[Adversarial]:
    """Return what `gate.make` makes of some clips of a sample, of known label if possible.

    Args:
        held: the twin, and the budget that it was trained under.
        sample: clips.
        count: how many to attack, at least 1.
        seed: of the attack.
    """
    which = (sample.known if len(sample.known) else np.arange(len(sample.clips)))[:count]
    clips, label = sample.clips[which], sample.label[which]
    if not len(sample.known):
        label = parity.twin_says(held.twin, clips)
    eps = trained_eps(held)
    made = gate.make(held.twin, clips, label, eps, STEPS, seed)
    said = parity.twin_says(held.twin, made)
    return [Adversarial(gate.ATTACK, _eps(eps), made, label, said)]


def given(held: Checkpoint, folder: Path, sha256: str) -> list[Adversarial]:
    """Return the adversarial clips of a folder; arguments and errors are those of `saved`."""
    found, others = saved(held, folder, sha256)
    if others:
        log.warning(
            "--robust %s: %d of %d attacks left out: their clips were made on an engine.",
            folder, others, others + len(found.attacked),
        )  # fmt: skip
    label = np.array(found.label, np.int64)
    return [
        Adversarial(
            of.attack, _eps(of.eps) if of.norm == "linf" else f"l2 {of.eps:.4g}",
            of.clips, label, parity.twin_says(held.twin, of.clips),
        )
        for of in found.attacked
    ]  # fmt: skip


def saved(held: Checkpoint, folder: Path, sha256: str) -> tuple[AdversarialClips, int]:
    """Read the clips of a folder that were made on a twin, and prove that it was this one.

    Args:
        held: the twin.
        folder: of vmoe-attack --save-adv.
        sha256: of the twin's file.

    Returns:
        Those clips, and how many attacks were left out, as their clips were made on an engine.

    Raises:
        VmoeError: the folder holds none, or is damaged.
        SettingError: they are clips of another spec or of other labels, or made on another twin, or
            all on an engine.
    """
    found = adversarial.load(folder)
    again = "Make them on this twin: vmoe-attack CKPT --save-adv DIR"
    if found.spec != held.twin.spec or found.labels != held.labels:
        other = "another clip spec" if found.spec != held.twin.spec else "other labels"
        raise SettingError(f"--robust {folder} holds clips of {other} than the twin's. {again}")
    on = found.origin.get("twin_sha256")
    if on != sha256:
        which = f"{on[:SHOWN]}..." if isinstance(on, str) else "nothing"
        raise SettingError(
            f"--robust {folder} holds clips that were made on another twin: it names {which} as "
            f"its sha256, which is {sha256[:SHOWN]}... {again}"
        )
    on_twin = tuple(each for each in found.attacked if each.mode == TRANSFER)
    if not on_twin:
        raise SettingError(f"--robust {folder} holds no clips that were made on a twin. {again}")
    return dataclasses.replace(found, attacked=on_twin), len(found.attacked) - len(on_twin)


def _eps(eps: float) -> str:
    return f"{eps * 255:.4g}/255"
