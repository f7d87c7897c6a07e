"""What the reproduction trains and tests on: camera-motion, and UT-Interaction by its recordings.

camera-motion's clips are rendered once for all cells: every seed has the same training clips, and
test clips of its own. UT-Interaction has too few clips for one test split: of each of three folds,
every third recording (`seqNN`, all the clips of which were filmed together) is the test, every
sixth the validation; the folder of a fold holds links to the user's files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cells import Held, Task, Turns

from vmoe import output
from vmoe.cli import log
from vmoe.clips import ClipSpec
from vmoe.data import DataSet, DataSettings, open_data
from vmoe.errors import SettingError
from vmoe.models import ModelSettings

EPS = 4 / 255
SPEC = ClipSpec(8, 0.1, 64, 64)
ARCH, WIDTH, EXPERTS = "tsm", 0.125, 4
SEQUENCE = re.compile(r"seq\d+")
FOLDS = 3
PARTS = ("test", "train", "val", "test", "train", "train")  # of every six recordings


@dataclass(frozen=True)
class Size:
    """How much of everything; `quick` tells the direction.

    Attributes:
        train, val, test: clips of camera-motion; test of each seed.
        tflops: budget of a training; of a trial; of the standard start's epochs (camera-motion).
        steps: of the test's attacks.
    """

    train: int = 6000
    val: int = 120
    test: int = 200
    tflops: float = 2.0
    trial_tflops: float = 0.8
    ut_tflops: float = 0.5
    start_epochs: int = 36
    steps: int = 10


QUICK = Size(200, 20, 20, 0.02, 0.02, 0.02, 1, 3)


def camera_motion(folder: Path, seed: int, size: Size) -> Task:
    """Return camera-motion with the test clips of a seed."""
    train = _rendered(folder, "train", size.train)
    test = _rendered(folder, "test", max(3, seed + 1) * size.test)
    at = np.arange(size.test) + size.test * seed
    mine = Held(test.clips[at], test.label[at], test.labels)
    model = ModelSettings(ARCH, WIDTH, EXPERTS, len(train.labels))
    turns, val = Turns(train, len(train) // 6), _rendered(folder, "val", size.val)
    budgets = (size.tflops, size.trial_tflops)
    return Task("all", model, SPEC, turns, val, mine, EPS, *budgets, size.steps)


def _rendered(folder: Path, split: str, count: int) -> Held:
    path, data = folder / f"{split}-{count}.npz", None
    if not path.exists():
        log.info("rendering %d clips of the %s split", count, split)
        data = open_data("camera-motion", split, SPEC, DataSettings(clips=count))
        held = hold(data)
        path.parent.mkdir(parents=True, exist_ok=True)
        with output.whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, clips=held.clips, label=held.label, labels=np.array(held.labels))
    with np.load(path) as kept:
        return Held(kept["clips"], kept["label"], tuple(kept["labels"].tolist()))


def hold(data: DataSet) -> Held:
    """Read a data set into memory."""
    items = [data[i] for i in range(len(data))]
    label = np.array([label for _, label in items], np.int64)
    return Held(np.stack([clip for clip, _ in items]), label, data.labels)


def ut_interaction(folder: Path, fold: int, size: Size, where: Path) -> Task:
    """Return a fold, 0 to 2, of UT-Interaction, a folder of whose classes is at `where`."""
    if fold not in range(FOLDS):
        raise SettingError(f"fold {fold} of UT-Interaction: there are 0 to {FOLDS - 1}.")
    place = _links(folder / f"fold{fold}", fold, where)
    train, val, test = (open_data(str(place), split, SPEC) for split in ("train", "val", "test"))
    model = ModelSettings(ARCH, WIDTH, EXPERTS, len(train.labels))
    budgets, how = (size.ut_tflops, size.ut_tflops), {"batch": 16}
    return Task(
        f"fold{fold}", model, SPEC, train, hold(val), hold(test), EPS, *budgets, size.steps, how
    )


def _links(place: Path, fold: int, where: Path) -> Path:
    videos = sorted(where.glob("*/*.mp4"))
    found = {path: match[0] for path in videos if (match := SEQUENCE.search(path.name))}
    if not found:
        raise SettingError(f"{where} holds no <class>/*seqNN*.mp4: give UT-Interaction's folder.")
    sequences = sorted(set(found.values()))
    part = {name: PARTS[(i - fold) % len(PARTS)] for i, name in enumerate(sequences)}
    for path, sequence in found.items():
        link = place / part[sequence] / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(path.resolve())
    return place


def opener(data: str, folder: Path, size: Size, where: Path | None) -> Callable[[int], Task]:
    """Return what opens a task of a seed (or fold).

    Raises:
        SettingError: no such data.
    """
    if data == "camera-motion":
        return lambda seed: camera_motion(folder / "clips", seed, size)
    if data == "ut-interaction" and where is not None:
        return lambda fold: ut_interaction(folder / "folds", fold, size, where)
    raise SettingError(
        f"data {data!r}: give camera-motion, or ut-interaction with --ut FOLDER, of its classes."
    )
