"""The options of vmoe-train that come from its methods: each once, and refused where it is vain."""

from __future__ import annotations

from typing import Any

from vmoe import cli, registry
from vmoe.data import DataSettings
from vmoe.errors import SettingError
from vmoe.loading import LoadSettings
from vmoe.models import ModelSettings
from vmoe.settings import Settings
from vmoe.train.loop import LoopSettings
from vmoe.train.planned import RECIPES, Plan, RunSettings

NO_FLAGS = ["classes", "denoise", "seed", "epoch"]  # decided elsewhere
OF_THE_RUN: tuple[type[Settings], ...] = (
    RunSettings, ModelSettings, LoopSettings, DataSettings, LoadSettings,
)  # fmt: skip
OF_A_ROUTER = ("balance", "balance_loss", "on_collapse")


def of_every_method(function: Any) -> Any:
    """Give a command the options of all methods, each once."""
    seen = _of_the_run()
    for cls in _recipes().values():
        function = cli.options(cls, skip=seen)(function)
        seen |= set(_names(cls))
    return function


def topics() -> dict[str, list[str]]:
    """Return all options by the classes that hold them; a method's by the methods that have it."""
    fields = {
        "The run": [*_names(RunSettings), "init_from", "out", "resume", "reported", "dry_run"],
        "The model": _names(ModelSettings),
        "Optimisation and validation": _names(LoopSettings),
        "Data": _names(DataSettings) + _names(LoadSettings),
    }
    for methods, names in _by_methods().items():
        fields[_title(methods)] = names
    return {topic: [f for f in names if f not in NO_FLAGS] for topic, names in fields.items()}


def refuse_strangers(method: str, flags: dict[str, Any]) -> None:
    """Refuse a flag of other methods: it would have no effect.

    Raises:
        SettingError: names the flag, and whose it is.
    """
    for methods, names in _by_methods().items():
        for name in names:
            if flags.get(name) is not None and method not in methods:
                raise SettingError(
                    f"{_flag(name)} has no meaning for --method {method}: it is of "
                    f"{', '.join(methods)}. Leave it out."
                )


def refuse_of_a_router(plan: Plan, flags: dict[str, Any]) -> None:
    """Refuse a flag of the router where the method trains a model that has none.

    Raises:
        SettingError: names the flag.
    """
    for name in OF_A_ROUTER:
        if plan.trained.experts == 1 and flags.get(name) is not None:
            raise SettingError(
                f"{_flag(name)} is of a router, and --method {plan.run.method} trains one network "
                "without one; leave it out."
            )


def _by_methods() -> dict[tuple[str, ...], list[str]]:
    """Return the fields of all methods by the methods that have them."""
    recipes, found = _recipes(), dict[tuple[str, ...], list[str]]()
    for name in dict.fromkeys(name for cls in recipes.values() for name in _names(cls)):
        if name not in _of_the_run():
            have = tuple(method for method, cls in recipes.items() if name in _names(cls))
            found.setdefault(have, []).append(name)
    return found


def _title(methods: tuple[str, ...]) -> str:
    lack = [method for method in _recipes() if method not in methods]
    if len(lack) < 2:
        return f"Of every method{''.join(f' but {name}' for name in lack)}"
    return f"Of {', '.join(methods)}"


def _recipes() -> dict[str, type[Settings]]:
    return {n: registry.load(RECIPES, n, "recipe").Settings for n in registry.names(RECIPES)}


def _of_the_run() -> set[str]:
    return {name for cls in OF_THE_RUN for name in _names(cls)}


def _names(cls: type[Settings]) -> list[str]:
    return list(cls.__dataclass_fields__)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
