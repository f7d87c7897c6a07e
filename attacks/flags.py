"""What the command line of vmoe-attack says: the run's settings, and the rows that are attacked."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmoe import cli, registry
from vmoe.attacks import ball, presets
from vmoe.attacks.deployed import ALL, AUTO
from vmoe.attacks.evaluate import Row, plan
from vmoe.attacks.methods import METHODS, load
from vmoe.attacks.modes import ADAPTIVE, MODES, QUERY, TRANSFER
from vmoe.clips import ClipSpec
from vmoe.errors import SettingError
from vmoe.models import ROUTE_GRADS
from vmoe.settings import Settings, format_eps, opt

EPS = {"linf": (8 / 255,), "l2": (2.0,)}
LADDER = {"linf": tuple(e / 255 for e in (1, 2, 4, 8, 16)), "l2": (0.5, 1.0, 2.0, 4.0, 8.0)}
ASKING = ("square", "nes")  # what asks an engine where no attack without gradients is named
QUERIES = 500  # of each, where none are given: an engine is asked one by one
OURS = {"eps", "norm", "seed", "grid"}  # of a method's settings, what the run decides for all


@dataclass(frozen=True)
class RunSettings(Settings):
    """What the command itself takes."""

    data: str = opt("camera-motion", "camera-motion, a folder with a folder per class, NAME:/path")
    split: str = opt("test", "which part of the data", choices=("train", "val", "test"))
    group: str | None = opt(
        None, "regular expression that splits a folder; default: as the twin was trained"
    )
    fold: int | None = opt(
        None, "official split of ucf101 and hmdb51, 1 to 3; default: as the twin was trained",
        at_least=1, at_most=3,
    )  # fmt: skip
    n: int = opt(200, "how many clips", at_least=1)
    attack: tuple[str, ...] = opt(
        ("pgd", "tlga-r", "j-tlga"), f"attacks, with commas: {', '.join(registry.names(METHODS))}"
    )
    norm: str = opt("linf", "norm of the budgets", choices=ball.NORMS)
    eps: tuple[float, ...] = opt(
        (), "budgets, with commas: 8/255 or 8 or 0.03; with --norm l2 lengths, 2.0. Default: "
        "8/255, or 2.0; with --curve 1,2,4,8,16, or 0.5,1.0,2.0,4.0,8.0", above=0,
    )  # fmt: skip
    route_grad: tuple[str, ...] = opt(
        ROUTE_GRADS, "how attacks on the whole model pass the hard choice; the worst counts",
        choices=ROUTE_GRADS,
    )  # fmt: skip
    batch: int = opt(16, "clips attacked at once", at_least=1)
    mode: tuple[str, ...] = opt(
        (ALL,), "how a bundle is attacked, with commas: transfer (clips of the twin, replayed), "
        "adaptive (engine in the loop, the twin's gradients), query (no gradients: of the attacks "
        "named those that ask for none, else square and nes, of 500 --queries)",
        choices=(*MODES, ALL),
    )  # fmt: skip
    backend: tuple[str, ...] = opt(
        (AUTO,), "what runs the bundles, with commas; all is every one that runs them here"
    )

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes asked for, in their order."""
        return MODES if ALL in self.mode else tuple(m for m in MODES if m in self.mode)


def fields_of(cls: type[Settings]) -> set[str]:
    """Return the names of a settings class."""
    return {field.name for field in dataclasses.fields(cls)}


def every_method_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give the command the options of all attacks, each once.

    Its help and default are those of most attacks that have it; those of the others are listed.
    """
    classes = {n: load(n).Settings for n in registry.names(METHODS)}
    fields: dict[str, dict[str, dataclasses.Field[Any]]] = defaultdict(dict)
    for attack, cls in classes.items():
        for field in dataclasses.fields(cls):
            fields[field.name][attack] = field
    homes: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for name in fields.keys() - fields_of(RunSettings) - OURS:
        home = _usual(fields[name])
        homes[home][name] = _others(fields[name], fields[name][home])
    for home in sorted(homes):
        cls = classes[home]
        skip = fields_of(cls) - homes[home].keys()
        function = cli.options(cls, skip=skip, also=homes[home])(function)
    return function


def _usual(fields: dict[str, dataclasses.Field[Any]]) -> str:
    """Return the first attack whose field says what most say."""
    says = {attack: (field.metadata["help"], field.default) for attack, field in fields.items()}
    most, _ = Counter(says.values()).most_common(1)[0]
    return next(attack for attack, each in says.items() if each == most)


def _others(
    fields: dict[str, dataclasses.Field[Any]], usual: dataclasses.Field[Any]
) -> dict[str, Any]:
    """Return, by attack, what is not usual: another default, or help with the default."""
    found: dict[str, Any] = {}
    for attack, field in fields.items():
        if field.metadata["help"] != usual.metadata["help"]:
            default = {"True": "on", "False": "off"}.get(str(field.default), field.default)
            found[attack] = f"{field.metadata['help']}, {default}"
        elif field.default != usual.default:
            found[attack] = field.default
    return found


@dataclass(frozen=True)
class Rows:
    """What a command line attacks with.

    Attributes:
        named: the attacks that were named.
        asking: those without gradients, of mode query; empty where there is none.
    """

    named: list[Row]
    asking: list[Row]


def read(
    flags: dict[str, Any], seed: int, config: Path | None, preset: str | None, *,
    curve: bool, bundle: bool,
) -> tuple[RunSettings, Rows]:  # fmt: skip
    """Return settings and rows of a command line; refuse flags that would have no effect.

    Args:
        flags: by field; None where nothing was given.
        seed: of the random draws.
        config: the `--config` file, whose values stand in the flags, for errors.
        preset: values that stand under the flags.
        curve: whether a curve over a ladder of budgets is wanted.
        bundle: whether a bundle is attacked, which has modes.

    Raises:
        SettingError: a value that cannot be used, or has no effect.
    """
    given = {name for name, value in flags.items() if value is not None}
    if not bundle:
        refuse(given & {"mode", "backend"}, "a checkpoint has no engine")
    settings = cli.resolve(RunSettings, flags, config)
    attacks = tuple(dict.fromkeys(name.replace("_", "-") for name in settings.attack))
    asking: tuple[str, ...] = ()
    if bundle and QUERY in settings.modes:
        asking = tuple(name for name in attacks if asks(name)) or ASKING
        lost = [name for name in attacks if not asks(name)]
        if settings.modes == (QUERY,) and "attack" in given and lost:
            raise SettingError(
                f"--mode query asks for answers alone: it has no use for {', '.join(lost)}. Leave "
                "that out, or add adaptive."
            )
    followed = not bundle or settings.modes != (QUERY,)
    every = dict.fromkeys((*(attacks if followed else ()), *asking))
    methods = [load(name).Settings for name in every]
    names = ", ".join(every)
    known = fields_of(RunSettings).union(*map(fields_of, methods))
    refuse(given - known, f"none of {names} takes it")
    if "route_grad" in given and not any("route_grad" in fields_of(cls) for cls in methods):
        refuse({"route_grad"}, f"none of {names} takes it")
    held = presets.under(flags, preset)
    if preset is not None and known.isdisjoint(presets.PRESETS[preset]):
        refuse({"preset"}, f"none of {names} takes a value of {preset}")
    values = {k: v for k, v in held.items() if v is not None and k not in fields_of(RunSettings)}
    eps = settings.eps or (LADDER if curve else EPS)[settings.norm]
    settings = dataclasses.replace(
        settings, attack=attacks, eps=tuple(dict.fromkeys(eps)),
        route_grad=tuple(dict.fromkeys(settings.route_grad)),
    )  # fmt: skip
    values |= {"norm": settings.norm, "seed": seed}
    return settings, Rows(
        plan(attacks, settings.eps, settings.route_grad, **values),
        plan(asking, settings.eps, **{"queries": QUERIES, **values}),
    )


def asks(attack: str) -> bool:
    """Return whether an attack asks for no gradient, but for answers alone."""
    cls = load(attack).Settings
    return load(attack).PART == "model" and not fields_of(cls) & {"route_grad", "steps"}


def in_modes(
    rows: Rows, modes: Sequence[str], engines: Sequence[str], *, as_given: bool
) -> list[Row]:
    """Return the rows of every mode: an attack's transfer, then what begins from it.

    Where engines judge a transfer, it does not stop at a first success, which lies on the twin's
    boundary; what an engine says in the loop is what was asked.

    Args:
        rows: of the command line.
        modes: what is wanted of them.
        engines: names.
        as_given: leave early stop as it is.

    Raises:
        SettingError: of mode adaptive alone, an attack that follows no gradient.
    """
    made: list[Row] = []
    if tuple(modes) == (ADAPTIVE,) and any(asks(row.attack) for row in rows.named):
        names = ", ".join(dict.fromkeys(row.attack for row in rows.named if asks(row.attack)))
        raise SettingError(f"--mode adaptive follows gradients, and {names} has none: add query.")
    for row in rows.named if {TRANSFER, ADAPTIVE} & set(modes) else ():
        first = row if as_given else stopping([row], early=False)[0]
        made += [first] if TRANSFER in modes else []
        if ADAPTIVE in modes and not asks(row.attack):
            made += [
                dataclasses.replace(row, mode=ADAPTIVE, against=name, begun=first)
                for name in engines
            ]
    if QUERY in modes:
        made += [
            dataclasses.replace(row, mode=QUERY, against=name)
            for row in rows.asking
            for name in engines
        ]
    return made


def refuse(strange: set[str], why: str) -> None:
    """Refuse a flag that would have no effect."""
    if strange:
        flag = "--" + min(strange).replace("_", "-")
        raise SettingError(f"{flag} has no effect: {why}; leave it out.")


def refuse_budgets(rows: Sequence[Row], spec: ClipSpec) -> None:
    """Refuse, once the clips are known, an L2 budget that holds every clip there is."""
    most = values_of(spec) ** 0.5
    for row in rows:
        if row.norm == "l2" and row.eps > most:
            raise SettingError(
                f"--eps is {format_eps(row.eps, 'l2')}; with --norm l2 it must be at most "
                f"{most:.1f}, from a black clip to a white one."
            )


def values_of(spec: ClipSpec) -> int:
    """Return how many values a clip has."""
    t, h, w, c = spec.shape
    return t * h * w * c


def usual(settings: RunSettings, rows: Rows) -> tuple[RunSettings, Rows]:
    """Return the attacks of a dense model where none were named: those on a router have none."""
    left = [row for row in rows.named if row.part != "router"]
    names = tuple({row.attack: 0 for row in left})
    return dataclasses.replace(settings, attack=names), Rows(left, rows.asking)


def stopping(rows: Sequence[Row], *, early: bool) -> list[Row]:
    """Return rows with early stop on or off."""
    return [
        dataclasses.replace(row, settings=tuple(_stop(each, early) for each in row.settings))
        for row in rows
    ]


def _stop(settings: Settings, early: bool) -> Settings:
    if "early_stop" not in fields_of(type(settings)):
        return settings
    changed: Any = settings
    made: Settings = dataclasses.replace(changed, early_stop=early)
    return made
