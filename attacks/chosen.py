"""The clips that are attacked: chosen from data, or read back as they were saved."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmoe import adversarial, cli
from vmoe.adversarial import AdversarialClips, Attacked
from vmoe.attacks.deployed import Target, identity, same_clips
from vmoe.attacks.evaluate import Evaluation, Row
from vmoe.attacks.flags import RunSettings
from vmoe.attacks.grid import l2, linf, radius
from vmoe.attacks.methods import load as load_method
from vmoe.clips import Clips, ClipSpec
from vmoe.data import DataSettings, open_data
from vmoe.errors import SettingError
from vmoe.settings import format_eps, from_mapping, to_mapping

CLIPS_SEED = 0  # which clips are taken: the same for every --seed, so that runs compare


@dataclass(frozen=True)
class Chosen:
    """The clips that are attacked.

    Attributes:
        clean: uint8 [N, T, H, W, 3].
        label: index among the model's labels, [N].
        index: number of each clip in its data set, [N].
        name: of data and split.
    """

    clean: Clips
    label: NDArray[np.int64]
    index: NDArray[np.int64]
    name: str

    @property
    def sha256(self) -> str:
        """Hash of clips, labels and numbers: two runs of the same one saw the same."""
        digest = hashlib.sha256(self.clean.tobytes())
        for values in (self.label, self.index):
            digest.update(values.tobytes())
        return digest.hexdigest()


def choose(settings: RunSettings, spec: ClipSpec, labels: tuple[str, ...]) -> Chosen:
    """Take n clips of the data, the same for every seed; labels are matched by name.

    Raises:
        SettingError: fewer clips than wanted, or a label that the model does not know.
    """
    how = DataSettings(group=settings.group or "", fold=settings.fold or 1, augment=("none",))
    data = open_data(settings.data, settings.split, spec, how)
    name = f"{settings.data} {settings.split}"
    if settings.n > len(data):
        raise SettingError(f"--n is {settings.n}; {name} has {len(data)} clips.")
    strange = [label for label in data.labels if label not in labels]
    if strange:
        raise SettingError(
            f"{name} has the label {strange[0]!r}, which the model does not know; "
            f"it knows {', '.join(labels)}."
        )
    order = np.random.default_rng(CLIPS_SEED).permutation(len(data))
    index = np.sort(order[: settings.n]).astype(np.int64)
    taken = [data[int(i)] for i in cli.progress(index, "clips read", len(index))]
    label = np.array([labels.index(data.labels[k]) for _, k in taken], np.int64)
    return Chosen(np.stack([clip for clip, _ in taken]), label, index, name)


def load(path: Path, opened: Target) -> AdversarialClips:
    """Read saved clips; refuse those of another model, and those beyond their own budget.

    Raises:
        SettingError: they are of another model, or not what they say.
        VmoeError: they cannot be read.
    """
    saved = adversarial.load(path)
    same_clips(
        (f"{path}", saved.spec, saved.labels), (f"{opened.path}", opened.spec, opened.labels),
        "make the clips anew: vmoe-attack --save-adv",
    )  # fmt: skip
    for attacked in saved.attacked:
        _refuse_beyond(path, attacked, saved.clean)
    return saved


def _refuse_beyond(path: Path, attacked: Attacked, clean: Clips) -> None:
    what = f"clips of {attacked.attack} at eps {format_eps(attacked.eps, attacked.norm)}"
    if attacked.norm == "linf":
        levels, most = linf(attacked.clips, clean), radius(attacked.eps)
        if levels > most:
            raise SettingError(
                f"{path}: {what} change by {levels} grey levels, more than {most}: make the clips "
                "anew."
            )
    elif l2(attacked.clips, clean) > attacked.eps + 1e-6:
        found = l2(attacked.clips, clean)
        raise SettingError(
            f"{path}: {what} change by {found:.4g} (L2), more than that: make the clips anew."
        )


def as_chosen(saved: AdversarialClips) -> Chosen:
    """Return the clean clips of saved ones."""
    label, index = np.array(saved.label, np.int64), np.array(saved.index, np.int64)
    return Chosen(saved.clean, label, index, str(saved.origin.get("data")))


def rows_of(saved: AdversarialClips, opened: Target) -> list[tuple[Row, Clips]]:
    """Return the rows of saved clips, and their clips; of an engine that is here, by its name here.

    Raises:
        UnknownNameError: they were made by an attack that is not here.
        SettingError: with settings that it does not take.
    """
    rows = []
    for attacked in saved.attacked:
        method = load_method(attacked.attack)
        how = [from_mapping(method.Settings, each, "saved clips") for each in attacked.settings]
        row = Row(
            attacked.attack, method.PART, attacked.eps, tuple(how), attacked.mode,
            origin=_origin(attacked.against, saved, opened),
        )  # fmt: skip
        rows.append((row, attacked.clips))
    return rows


def _origin(against: str, saved: AdversarialClips, opened: Target) -> str:
    """Return the name of the engine that clips were made against: no other's that is here."""
    held = saved.origin.get("engines")
    digest = held.get(against) if isinstance(held, dict) else None
    for name, engine in opened.engines.items():
        if digest is not None and identity(engine) == digest:
            return name
    return f"another {against}" if against in opened.engines else against


def save(path: Path, opened: Target, chosen: Chosen, found: Evaluation, seed: int) -> None:
    """Write the clips of an evaluation.

    Raises:
        SettingError: the folder exists.
        OutputError: it cannot be written.
    """
    attacked = tuple(
        Attacked(
            outcome.row.attack, outcome.row.eps, [to_mapping(s) for s in outcome.row.settings],
            outcome.clips, outcome.row.norm, outcome.row.mode, outcome.row.against,
        )
        for outcome in found.outcomes
    )  # fmt: skip
    origin: dict[str, Any] = {"data": chosen.name, "seed": seed, "twin_sha256": opened.twin_sha256}
    origin["engines"] = {name: identity(engine) for name, engine in opened.engines.items()}
    label, index = tuple(chosen.label.tolist()), tuple(chosen.index.tolist())
    clips = AdversarialClips(
        opened.spec, opened.labels, chosen.clean, label, index, attacked, origin
    )
    adversarial.save(clips, path)
