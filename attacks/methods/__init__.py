"""Attacks, one file each, each the `--attack` of its name.

A file holds `Settings`, `attack(twin, clip, label, settings, indices=None) -> AttackResult`, and
`PART`, what it attacks, which fixes its criterion of success: `model` (the label is wrong),
`router` (the route has changed) or `expert` (the expert of `settings.expert` is wrong).

What else is promised of it is read off its settings. `steps` and `step`: more steps never make it
weaker. `restarts`: nor do more restarts. `random_start`: its result hangs on the seed. `queries`
and no `route_grad`: it asks for no gradient, and no more often than it says in each restart; with
`steps` beside, it is an ensemble. A norm that its settings refuse is not asked of it. `OPTIMAL =
False` says that it does not find the best perturbation of a linear loss: it may change some values
only, or it goes by chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vmoe import registry

METHODS = "vmoe.attacks.methods"


def load(name: str) -> Any:
    """Return the file of an attack, its name with hyphens or underscores.

    Raises:
        UnknownNameError: no such attack; names the nearest.
    """
    return registry.load(METHODS, name, "attack")


def every_setting() -> set[str]:
    """Return the names of the settings that any attack has."""
    found = registry.names(METHODS)
    return {field.name for name in found for field in fields(load(name).Settings)}


def settings_of(name: str, values: Mapping[str, Any]) -> Any:
    """Return the settings of an attack, with those of the values that it has.

    Raises:
        UnknownNameError: no such attack.
        SettingError: a value out of its range, or that the attack refuses.
    """
    cls = load(name).Settings
    known = {field.name for field in fields(cls)}
    return cls(**{key: value for key, value in values.items() if key in known})
