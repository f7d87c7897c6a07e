"""What is attacked: a twin, the engines that were deployed from it, or both.

A bundle carries the twin that it was exported from; gradients come from there. Another twin may
stand in (`--twin`), and is then named as foreign: its clips say how far an attacker gets without
the weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from vmoe import bundle as bundles
from vmoe import checkpoint, latest, registry
from vmoe.attacks import straight
from vmoe.attacks.channel import Channel
from vmoe.attacks.judge import Judge, of_twin
from vmoe.attacks.modes import Deployed, Through
from vmoe.bundle import Bundle
from vmoe.checkpoint import Checkpoint
from vmoe.clips import ClipSpec
from vmoe.errors import BundleError, SettingError
from vmoe.models import ModelSettings, VideoMoE
from vmoe.runtime.backends import ENGINES
from vmoe.runtime.engine import Engine, load

AUTO, ALL = "auto", "all"  # of --backend


@dataclass(frozen=True)
class Target:
    """What is attacked: a twin, engines, or both.

    Attributes:
        path: as the user named it.
        twin: where the gradients come from; None where engines are asked, or replay saved clips.
        twin_path: its file.
        twin_sha256: its hash; of no twin that of the engines' own.
        foreign: the engines were exported from another twin.
        engines: what was deployed, by name; none of a checkpoint.
        device: where the twin is.
        channel: what clips go through before any of them; None for nothing.
    """

    path: Path
    twin: Checkpoint | None
    twin_path: Path | None
    twin_sha256: str
    foreign: bool
    engines: dict[str, Engine]
    device: torch.device
    channel: Channel | None = None
    _open: ExitStack = field(default_factory=ExitStack)

    @property
    def spec(self) -> ClipSpec:
        """The clips that it takes."""
        return self._any.spec if isinstance(self._any, Bundle) else self._any.twin.spec

    @property
    def labels(self) -> tuple[str, ...]:
        """The K names."""
        return self._any.labels

    @property
    def group(self) -> str:
        """The regular expression that split a folder when the twin was trained; empty for none."""
        return "" if self.twin is None else self.twin.group

    @property
    def fold(self) -> int:
        """The official split that the twin was trained on, where its data set has several."""
        return 1 if self.twin is None else self.twin.fold

    @property
    def _any(self) -> Bundle | Checkpoint:
        for engine in self.engines.values():
            return engine.bundle
        assert self.twin is not None  # `open_target` gives at least one
        return self.twin

    @property
    def experts(self) -> int:
        """How many experts it has."""
        return self._any.experts if isinstance(self._any, Bundle) else len(self._any.twin.experts)

    @property
    def judges(self) -> dict[str, Judge]:
        """The models that judge clips, by name."""
        judges: dict[str, Judge] = {}
        if self.twin is not None:
            judges["twin"] = of_twin(self.twin.twin, self.device)
        judges |= {name: engine.infer for name, engine in self.engines.items()}
        if self.channel is None:
            return judges
        return {name: self.channel.judge(judge, self.spec) for name, judge in judges.items()}

    @property
    def model(self) -> VideoMoE | None:
        """The twin as a transfer sees it; None where there is none."""
        return None if self.twin is None else self._through(self.twin.twin)

    def _through(self, twin: VideoMoE) -> VideoMoE:
        return twin if self.channel is None else Through(twin, self.channel)

    def deployed(self, *, adaptive: bool) -> dict[str, Attackable]:
        """Return the engines as models that can be attacked, by name.

        Args:
            adaptive: with the twin's gradients.

        Raises:
            SettingError: the twin cannot take the routes of an engine.
            MissingDependencyError: onnx, which reads int8 parts, is not installed.
        """
        made, judges = {}, self.judges
        for name, engine in self.engines.items():
            bundle = engine.bundle
            settings = ModelSettings(experts=bundle.experts, classes=len(bundle.labels))
            twin, said = self._slopes(bundle) if adaptive else (None, "asked alone")
            through = None if twin is None else self._through(twin)
            of = Deployed(judges[name], settings, bundle.spec, through)
            made[name] = Attackable(of, said)
        return made

    def _slopes(self, bundle: Bundle) -> tuple[VideoMoE, str]:
        assert self.twin is not None  # the caller has seen to that
        twin = self.twin.twin
        if len(twin.experts) != bundle.experts:
            raise SettingError(
                f"--mode adaptive sends the engine's routes through the twin; {self.twin_path} has "
                f"{len(twin.experts)} expert(s), {bundle.path} {bundle.experts}: leave it out."
            )
        if self.foreign:
            return twin, "gradients from the foreign twin"
        return straight.source(bundle, twin)

    def __enter__(self) -> Target:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()


class Attackable(NamedTuple):
    """An engine as a model that can be attacked, and what is to be said of its gradients."""

    model: Deployed
    said: str


@dataclass(frozen=True)
class How:
    """How a target is opened.

    Attributes:
        twin: a checkpoint, or a folder that holds one, in place of the bundle's own twin.
        device: of twin and engines: auto, cpu or cuda:N.
        compare: bundles beside the first, of the same twin.
        backends: of every bundle; `auto` is the engine's own choice, `all` every one that runs it.
        needs_twin: a bundle without its twin is refused.
        channel: what clips go through before any model.
    """

    twin: Path | None = None
    device: str = AUTO
    compare: tuple[Path, ...] = ()
    backends: tuple[str, ...] = (AUTO,)
    needs_twin: bool = True
    channel: Channel | None = None


def open_target(path: Path, how: How | None = None) -> Target:
    """Open a checkpoint, or bundles with their twin.

    Args:
        path: a checkpoint's file, or a bundle's folder.
        how: default: the bundle's own twin, whatever backend is fastest.

    Raises:
        BundleError: a damaged bundle, or one without a twin where one is needed.
        SettingError: a twin or a bundle that takes other clips, gives other labels, or bundles of
            several twins.
        VmoeError: a checkpoint that cannot be read.
    """
    how = how or How()
    where = checkpoint.device(how.device)
    if not path.is_dir():
        for flag, given in (("--twin", how.twin), ("--compare", how.compare)):
            if given:
                raise SettingError(
                    f"{path} is a checkpoint, a twin itself; {flag} goes with a bundle."
                )
        read = checkpoint.load(path, where)
        if how.channel is not None:
            how.channel.require(read.twin.spec)
        return Target(path, read, path, bundles.sha256(path), False, {}, where, how.channel)
    first, *others = (bundles.read(each) for each in (path, *how.compare))
    for other in others:
        _refuse_another(first, other)
    if how.channel is not None:
        how.channel.require(first.spec)
    own = path / first.twin["file"] if "file" in first.twin else None
    file = own if how.twin is None else latest.inside(how.twin)
    if file is None and how.needs_twin:
        raise BundleError(
            f"{path} carries no twin to attack: name one with --twin CKPT, or attack it by queries "
            "alone: --mode query."
        )
    made = None if file is None else checkpoint.load(file, where)
    digest = first.twin.get("sha256", "") if file is None else bundles.sha256(file)
    if made is not None and file is not None:
        same_clips(
            (f"twin {file}", made.twin.spec, made.labels),
            (f"bundle {first.path}", first.spec, first.labels),
            "choose a twin of the same clips and labels",
        )
    foreign = digest != first.twin.get("sha256")
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(load(bundle, backend, how.device))
            for name, bundle, backend in _named([first, *others], how.backends, how.device)
        }
        return Target(
            path, made, file, digest, foreign, engines, where, how.channel, stack.pop_all()
        )  # fmt: skip


def identity(engine: Engine) -> str:
    """Return what tells an engine from others: the hash of its manifest, and its backend."""
    return f"{bundles.sha256(engine.bundle.path / 'vmoe.json')} {engine.backend_name}"


def _refuse_another(first: Bundle, other: Bundle) -> None:
    """Refuse to compare what was exported from several twins."""
    same_clips(
        (f"bundle {other.path}", other.spec, other.labels),
        (f"bundle {first.path}", first.spec, first.labels),
        "compare bundles of the same clips and labels",
    )
    one, two = (bundle.twin.get("sha256", "none")[:12] for bundle in (first, other))
    if one != two:
        raise SettingError(
            f"--compare {other.path} was exported from another twin (sha256 {two}) than "
            f"{first.path} ({one}): compare exports of one twin."
        )


def _named(
    held: Sequence[Bundle], backends: Sequence[str], device: str
) -> list[tuple[str, Bundle, str]]:
    """Return a name for each bundle on each backend; of a single engine, `engine`."""
    doubled, count = Counter(str(b.path.resolve()) for b in held).most_common(1)[0]
    if count > 1:
        raise SettingError(f"--compare names {doubled} twice; name every bundle once.")
    each = [(b, name) for b in held for name in _backends(b, backends, device)]
    if len(each) == 1:
        return [("engine", *each[0])]
    short = {b.path: b.path.name for b in held}
    if max(Counter(short.values()).values()) > 1:  # the same name in two folders
        short = {b.path: str(b.path) for b in held}
    several = max(Counter(b.path for b, _ in each).values()) > 1
    named = [
        (f"{short[b.path]} on {name}" if several else short[b.path], b, name) for b, name in each
    ]
    if any(name == "twin" for name, *_ in named):
        raise SettingError("a bundle called twin cannot be told from the twin: rename its folder.")
    return named


def _backends(bundle: Bundle, asked: Sequence[str], device: str) -> list[str]:
    """Return the backends of a bundle; `all` stands for every one that runs its parts here."""
    if ALL not in asked:
        return list(dict.fromkeys(asked))
    formats = {part.format for part in bundle.parts.values()}
    kind = checkpoint.device(device).type
    here = []
    for name in registry.names(ENGINES):
        module = registry.load(ENGINES, name, "backend")
        reads = formats <= set(module.FORMATS)
        if reads and kind in module.DEVICES and not module.why_unavailable():
            here.append(name)
    return here or [AUTO]


Takes = tuple[str, ClipSpec, tuple[str, ...]]  # what something is called; its clips and labels


def same_clips(ours: Takes, theirs: Takes, advice: str) -> None:
    """Refuse a twin or saved clips whose clip spec or labels are not the target's.

    Raises:
        SettingError: names the first difference, then the advice.
    """
    (what, spec, labels), (whose, its_spec, its_labels) = ours, theirs
    # mean and std are applied inside of the model: they may differ
    for name in ("frames", "spacing_s", "height", "width", "resize", "interpolation"):
        one, other = getattr(spec, name), getattr(its_spec, name)
        if one != other:
            raise SettingError(f"{what} has clips of {name} {one}, {whose} of {other}: {advice}.")
    if labels != its_labels:
        raise SettingError(
            f"{what} has labels {_few(labels)}, {whose} has {_few(its_labels)}: {advice}."
        )


def _few(labels: tuple[str, ...]) -> str:
    return ", ".join(labels[:4]) + (", ..." if len(labels) > 4 else f" ({len(labels)})")
