"""One cell of the reproduction: a method, a seed; trained at a budget, attacked on test clips.

Everything here is what vmoe-train and vmoe-attack do, called from Python, so that the clips can be
rendered once for all cells.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vmoe import checkpoint, registry
from vmoe.attacks.evaluate import evaluate, plan
from vmoe.attacks.figures import broken
from vmoe.attacks.judge import Ints, of_twin
from vmoe.attacks.outcomes import Evaluation
from vmoe.checkpoint import Checkpoint
from vmoe.clips import Clips, ClipSpec, Frame
from vmoe.data import DataSet
from vmoe.loading import Loader
from vmoe.models import ModelSettings, VideoMoE, build
from vmoe.settings import to_mapping
from vmoe.train import loop, router_start
from vmoe.train import state as states
from vmoe.train.passes import RecipeSettings
from vmoe.train.planned import RECIPES

TABLE = ("fgsm", "pgd", "apgd-ce", "apgd-margin", "tlga-r", "j-tlga")
ON_ROUTER = ("tlga-r", "j-tlga")  # what a dense model has nothing of
MORE_WAYS = ("frozen", "all", "soft")
AGAIN = ("pgd", "apgd-ce", "apgd-margin", "j-tlga")  # by MORE_WAYS, on what the table left


@dataclass(frozen=True)
class Held:
    """Clips in memory, or in a file that is mapped there."""

    clips: Clips
    label: Ints
    labels: tuple[str, ...]

    def __len__(self) -> int:
        """How many clips."""
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[Frame, int]:
        """Return clip uint8 [T, H, W, 3] and its label."""
        return np.asarray(self.clips[index]), int(self.label[index])

    def at_epoch(self, epoch: int) -> Held:
        """Return the same clips: they are of no epoch."""
        return self


@dataclass(frozen=True)
class Turns:
    """Some of the clips in memory in each epoch, the next ones in the next."""

    of: Held
    count: int
    epoch: int = 0

    @property
    def labels(self) -> tuple[str, ...]:
        """The K names."""
        return self.of.labels

    def __len__(self) -> int:
        """How many clips of an epoch."""
        return self.count

    def __getitem__(self, index: int) -> tuple[Frame, int]:
        """Return clip uint8 [T, H, W, 3] and its label; behind the last comes the first."""
        return self.of[(self.epoch * self.count + index) % len(self.of)]

    def at_epoch(self, epoch: int) -> Turns:
        """Return the clips of an epoch."""
        return Turns(self.of, self.count, epoch)


@dataclass(frozen=True)
class Task:
    """What all methods are trained on, and how.

    Attributes:
        name: of the folder of what its seeds share: the standard starts, and trials.
        model: the mixture; a method may make another of it.
        eps: budget of training and test, on pixels in [0, 1].
        tflops: budget of a training, the start's not counted.
        trial_tflops: that of a trial of its settings.
        steps: of the test's attacks.
        loop: settings of every training.
        device: cpu or cuda:N.
        attack_batch: clips that are attacked at a time.
    """

    name: str
    model: ModelSettings
    spec: ClipSpec
    train: DataSet
    val: Held
    test: Held
    eps: float
    tflops: float
    trial_tflops: float
    steps: int
    loop: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    attack_batch: int = 50


@dataclass(frozen=True)
class Trial:
    """Settings of a method: of its recipe and of the loop, where they are not the defaults."""

    recipe: dict[str, Any] = field(default_factory=dict)
    loop: dict[str, Any] = field(default_factory=dict)


def model_of(task: Task, method: str) -> ModelSettings:
    """Return the architecture that a method trains."""
    module = registry.load(RECIPES, method, "recipe")
    made: ModelSettings = getattr(module, "model", lambda model: model)(task.model)
    return made


def train(
    task: Task, method: str, trial: Trial, folder: Path, *, begin: Path | None, seed: int = 0,
    model: ModelSettings | None = None,
) -> Checkpoint:  # fmt: skip
    """Train a method, or go on where a folder stands; what is finished there is read.

    Args:
        task: data, model, budget.
        method: its name.
        trial: its settings, which may hold another budget.
        folder: of the training.
        begin: the standard checkpoint to begin with; one of other labels keeps its last layer.
        seed: of order, attacks and router.
        model: another architecture than the method's.

    Returns:
        The last epoch's checkpoint: nothing is chosen by validation.
    """
    path = folder / "last.safetensors"
    if path.exists():
        return checkpoint.load(path, task.device)
    module = registry.load(RECIPES, method, "recipe")
    eps = {"eps": task.eps} if "eps" in module.Settings.__dataclass_fields__ else {}
    recipe: RecipeSettings = module.Settings(**{**eps, **trial.recipe})
    how = loop.LoopSettings(**{
        "budget": task.tflops, "seed": seed, "val_steps": 0, "on_collapse": "warn",
        **task.loop, **trial.loop,
    })  # fmt: skip
    twin = build(model or model_of(task, method), task.spec, seed).to(task.device)
    router_start.spread(twin, task.train)
    if begin is not None:
        _take(twin, begin)
    mapping = {"method": method, "recipe": to_mapping(recipe), "loop": to_mapping(how)}
    state = loop.start(twin, how)
    if (folder / states.FILE).exists():
        states.load(state, mapping, folder)
    folder.mkdir(parents=True, exist_ok=True)
    passes = loop.Recipe(lambda done: module.walks(recipe, done), recipe.bf16)
    since = time.process_time()
    with Loader(task.train, how.batch, task.device) as loader:
        for now in loop.run(state, passes, loader, task.val, how):
            now.rows[-1]["cpu_s"] = time.process_time() - since
            states.save(now, mapping, folder)
            since = time.process_time()
    held = Checkpoint(state.kept, task.train.labels, mapping, {"rows": state.rows})
    checkpoint.save(held, path)
    return checkpoint.load(path, task.device)


def _take(twin: VideoMoE, path: Path) -> None:
    """Give every expert the weights of a checkpoint's one, where their shapes fit."""
    theirs = checkpoint.load(path).twin.experts[0].state_dict()
    for expert in twin.experts:
        mine = expert.state_dict()
        fits = {name: t for name, t in theirs.items() if mine[name].shape == t.shape}
        expert.load_state_dict({**mine, **fits})


def attack(twin: VideoMoE, data: Held, task: Task) -> dict[str, Any]:
    """Return what a twin is worth under attack.

    The table's attacks by straight-through; on the clips that all of them leave, AGAIN by the
    other three route_grads, or, of a dense model, from three more starts.

    Returns:
        `hits` of each attack, a list of 0 and 1 over the clips, with `clean` and `worst_of`;
        `flips`, the share of routes that each changes; `lips_r`, L_Lip of the router under TLGA-R;
        `margin` of the clean scores.
    """
    found = _under(twin, data, task, TABLE)
    clean = found.clean["twin"]
    hits = {"clean": clean.said == data.label}
    for outcome in found.outcomes:
        hits[outcome.row.attack.replace("-", "_")] = ~broken(found, outcome, "twin")
    stands = np.all(list(hits.values()), axis=0)
    left = np.flatnonzero(stands)
    if len(left):
        again = _under(twin, data, task, AGAIN, MORE_WAYS, left)
        stands[left] = ~np.any([broken(again, o, "twin") for o in again.outcomes], axis=0)
    hits["worst_of"] = stands
    seen = {outcome.row.attack: outcome.seen["twin"] for outcome in found.outcomes}
    lips = seen["tlga-r"].l_lip_router if "tlga-r" in seen else None
    return {
        "hits": {name: each.astype(int).tolist() for name, each in hits.items()},
        "flips": {name: float(np.mean(o.seen.route != clean.route)) for name, o in seen.items()},
        "lips_r": None if lips is None else float(np.mean(lips)),
        "margin": float(clean.gap.mean()),
    }


def quick(twin: VideoMoE, data: Held, task: Task) -> float:
    """Return robust accuracy under PGD and APGD-margin, by which a trial is chosen."""
    found = _under(twin, data, task, ("pgd", "apgd-margin"))
    any_broken = np.any([broken(found, o, "twin") for o in found.outcomes], axis=0)
    return float(1 - any_broken.mean())


def _under(
    twin: VideoMoE, data: Held, task: Task, names: Sequence[str],
    ways: Sequence[str] = ("straight-through",), at: Ints | None = None,
) -> Evaluation:  # fmt: skip
    """Return what attacks do by some route_grads; a dense model is attacked from as many starts."""
    at = np.arange(len(data)) if at is None else at
    dense = twin.router is None
    fit = [name for name in names if not (dense and name in ON_ROUTER)]
    more = {"restarts": len(ways), "seed": 1} if dense and ways[1:] else {}
    rows = plan(fit, [task.eps], ways, steps=task.steps, **more)
    clips, judges = np.asarray(data.clips)[at], {"twin": of_twin(twin, task.device)}
    return evaluate(
        twin, clips, data.label[at], rows, judges, index=at, batch=task.attack_batch,
        device=task.device,
    )  # fmt: skip
