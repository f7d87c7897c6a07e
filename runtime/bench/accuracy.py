"""Accuracy beside speed: what bundles answer to clean clips, and to adversarial ones as saved.

Clean clips are those of --accuracy DATA, of its split `test`: those that `vmoe-attack` takes, too.
Adversarial ones are what `vmoe-attack --save-adv DIR` wrote, replayed as they are: for a bundle
that they were not made against, a transfer attack, and a weaker one where they were made on another
twin. A clip counts as robust if the bundle gets it right under every attack of a budget. A bundle
of random weights has no accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmoe import adversarial, cli, report
from vmoe import bundle as bundles
from vmoe.adversarial import AdversarialClips, Attacked
from vmoe.bundle import Bundle
from vmoe.clips import Clips, ClipSpec
from vmoe.data import DataSet, DataSettings, open_data
from vmoe.errors import SettingError, VmoeError
from vmoe.report import wilson
from vmoe.runtime.engine import Engine
from vmoe.settings import format_eps

SPLIT = "test"
CLIPS_SEED = 0  # which clips are taken: the same as vmoe-attack's
CHUNK = 32  # clips of one call
SEEN = ("frames", "spacing_s", "height", "width", "resize", "interpolation")  # of a clip spec
SHOWN = 12  # letters of a hash

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Share:
    """Clips that were answered right.

    Attributes:
        hits, n: how many, of how many.
        share: hits over n.
        low, high: Wilson's 95 % interval of it.
    """

    hits: int
    n: int
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Clean:
    """Accuracy on clean clips.

    Attributes:
        data: the clips: as --accuracy has it, and the split.
        right: the share.
        routes: clips that each expert answered.
    """

    data: str
    right: Share
    routes: tuple[int, ...]


@dataclass(frozen=True)
class Robust:
    """Accuracy on saved adversarial clips of one budget, worst of the attacks.

    Attributes:
        eps: the budget, on pixels in [0, 1].
        norm: linf or l2.
        attacks: their names.
        made: how and on what: `transfer from its twin`, `adaptive against engine`, several joined.
        own: every clip was made on this bundle's twin, or against this bundle itself.
        right: right under every attack.
        routes: clips that each expert answered, all attacks together.
    """

    eps: float
    norm: str
    attacks: tuple[str, ...]
    made: str
    own: bool
    right: Share
    routes: tuple[int, ...]


@dataclass(frozen=True)
class Accuracy:
    """What stands beside a bundle's speed.

    Attributes:
        clean: None where it was not asked for, or the weights are random.
        robust: one for each budget, rising.
        saved_clean: accuracy on the clean clips that the saved ones were made of; the difference
            is what the attack costs.
        why: it could not be measured.
    """

    clean: Clean | None = None
    robust: tuple[Robust, ...] = ()
    saved_clean: Share | None = None
    why: str | None = None


@dataclass(frozen=True)
class Asked:
    """What is asked for, opened and checked before anything is measured.

    Attributes:
        data: as --accuracy has it; None for nothing.
        n: clips of it, at most.
        saved: the clips of --robust; None for nothing.
    """

    data: str | None = None
    n: int = 200
    saved: AdversarialClips | None = None


def ask(data: str | None, n: int, robust: Path | None, read: Sequence[tuple[str, Bundle]]) -> Asked:
    """Open what is asked for, and refuse what does not fit a bundle.

    Args:
        data: of --accuracy: camera-motion, a folder with a folder per class, NAME:/path.
        n: clips of it, at most.
        robust: a folder of --save-adv.
        read: names and manifests of all bundles that have weights worth asking.

    Raises:
        UnknownNameError: no such data set.
        SettingError: no clips there; or labels or clips that a bundle does not know.
        VmoeError: the saved clips cannot be read, or have changed.
    """
    for name, bundle in read if data is not None else ():
        _fitting(name, bundle, _opened(data or "", bundle.spec), data or "")
    saved = None if robust is None else _saved(robust)
    if saved is not None:
        for name, bundle in read:
            _refuse_others(f"--robust {robust}", saved, name, bundle)
    return Asked(data, n, saved)


def measure(engine: Engine, asked: Asked) -> Accuracy:
    """Return what an engine answers to the clips that are asked for.

    Raises:
        VmoeError: a clip cannot be read, or the engine fails.
    """
    clean = None
    if asked.data is not None:
        clean = _clean(engine, asked.data, asked.n)
    if asked.saved is None:
        return Accuracy(clean)
    saved, label = asked.saved, np.array(asked.saved.label, np.int64)
    budgets = sorted({(a.norm, a.eps) for a in saved.attacked})
    robust = tuple(_robust(engine, saved, label, norm, eps) for norm, eps in budgets)
    right, _ = _answers(engine, saved.clean, label)
    return Accuracy(clean, robust, share(right))


def share(right: Bools) -> Share:
    """Return the share of clips that are right, with its interval."""
    hits, n = int(right.sum()), len(right)
    low, high = wilson(hits, n)
    return Share(hits, n, hits / n, low, high)


def budget(robust: Robust) -> str:
    """Return a budget as a column's title has it: `8/255`, `L2 2.0`."""
    if robust.norm == "linf":
        return format_eps(robust.eps).partition(" ")[0]
    return f"L2 {format_eps(robust.eps, robust.norm)}"


def to_json(found: Accuracy | None) -> dict[str, Any] | None:
    """Return it as schema.json has it."""
    if found is None:
        return None
    values: dict[str, Any] = report.plain(asdict(found))
    for said, robust in zip(values["robust"], found.robust, strict=True):
        said["budget"] = budget(robust)
    return values


def _saved(path: Path) -> AdversarialClips:
    if not (path / adversarial.MANIFEST).is_file():
        raise VmoeError(
            f"--robust {path} has no {adversarial.MANIFEST}: make it by vmoe-attack BUNDLE "
            "--save-adv DIR."
        )
    saved = adversarial.load(path)
    if not saved.attacked:
        raise VmoeError(f"{path} holds clean clips alone: make them with some --attack.")
    return saved


def _opened(data: str, spec: ClipSpec) -> DataSet:
    return open_data(data, SPLIT, spec, DataSettings(augment=("none",)))


def _fitting(name: str, bundle: Bundle, data: DataSet, called: str) -> None:
    strange = [label for label in data.labels if label not in bundle.labels]
    if strange:
        raise SettingError(
            f"--accuracy {called} has the label {strange[0]!r}, which {name} does not know; it "
            f"knows {_few(bundle.labels)}."
        )


def _refuse_others(what: str, saved: AdversarialClips, name: str, bundle: Bundle) -> None:
    """Refuse saved clips whose spec or labels are not a bundle's; mean and std are the model's."""
    for key in SEEN:
        one, other = getattr(saved.spec, key), getattr(bundle.spec, key)
        if one != other:
            raise SettingError(
                f"{what} has clips of {key} {one}, {name} takes {other}: make them for this model "
                "(vmoe-attack BUNDLE --save-adv DIR)."
            )
    if saved.labels != bundle.labels:
        raise SettingError(
            f"{what} has labels {_few(saved.labels)}, {name} has {_few(bundle.labels)}: make them "
            "for this model (vmoe-attack BUNDLE --save-adv DIR)."
        )


def _few(labels: Sequence[str]) -> str:
    return ", ".join(labels[:4]) + (", ..." if len(labels) > 4 else f" ({len(labels)})")


def _clean(engine: Engine, data: str, n: int) -> Clean:
    opened = _opened(data, engine.bundle.spec)
    order = np.random.default_rng(CLIPS_SEED).permutation(len(opened))
    index = np.sort(order[:n])
    right, routes = [], np.zeros(engine.bundle.experts, np.int64)
    for at in cli.progress(range(0, len(index), CHUNK), "accuracy", -(-len(index) // CHUNK)):
        taken = [opened[int(i)] for i in index[at : at + CHUNK]]
        label = np.array([engine.bundle.labels.index(opened.labels[k]) for _, k in taken])
        hits, routed = _answers(engine, np.stack([clip for clip, _ in taken]), label)
        right.append(hits)
        routes += routed
    return Clean(f"{data} {SPLIT}", share(np.concatenate(right)), tuple(routes.tolist()))


def _robust(engine: Engine, saved: AdversarialClips, label: Ints, norm: str, eps: float) -> Robust:
    """Replay the clips of one budget."""
    attacked = [a for a in saved.attacked if (a.norm, a.eps) == (norm, eps)]
    right, routes = np.ones(len(label), np.bool_), np.zeros(engine.bundle.experts, np.int64)
    made = {}
    for each in attacked:
        hits, routed = _answers(engine, each.clips, label)
        right &= hits
        routes += routed
        how, own = _origin(each, saved, engine)
        made[how] = own
    return Robust(
        eps=eps,
        norm=norm,
        attacks=tuple(dict.fromkeys(a.attack for a in attacked)),
        made="; ".join(made),
        own=all(made.values()),
        right=share(right),
        routes=tuple(routes.tolist()),
    )


def _origin(attacked: Attacked, saved: AdversarialClips, engine: Engine) -> tuple[str, bool]:
    """Return how clips were made and on what, and whether that is this bundle or its twin."""
    if attacked.against:
        held = saved.origin.get("engines")
        digest = held.get(attacked.against) if isinstance(held, dict) else None
        own = digest == identity(engine)
        return f"{attacked.mode} against {'itself' if own else 'another engine'}", own
    made_on, twin = saved.origin.get("twin_sha256"), engine.bundle.twin.get("sha256")
    own = twin is not None and made_on == twin
    other = f"another twin (sha256 {str(made_on)[:SHOWN]})" if made_on else "an unknown twin"
    return f"{attacked.mode} from {'its twin' if own else other}", own


def identity(engine: Engine) -> str:
    """Return what tells an engine from others, as vmoe-attack writes it beside its clips."""
    return f"{bundles.sha256(engine.bundle.path / bundles.MANIFEST)} {engine.backend_name}"


def _answers(engine: Engine, clips: Clips, label: Ints) -> tuple[Bools, Ints]:
    """Return which clips an engine gets right, and how many each expert answered."""
    right, routes = [], np.zeros(engine.bundle.experts, np.int64)
    for at in range(0, len(clips), CHUNK):
        said = engine.infer(clips[at : at + CHUNK])
        right.append(said.logits.argmax(axis=1) == label[at : at + CHUNK])
        routes += np.bincount(said.route, minlength=len(routes))
    return np.concatenate(right), routes
