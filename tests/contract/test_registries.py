"""Every file of every registry folder offers what the folder promises."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from vmoe import registry
from vmoe.settings import Settings

# folder: its functions, and the parameters that they are called with, by position
FUNCTIONS = {
    "vmoe.models.experts": {"build": ["width", "classes"]},
    "vmoe.data": {"open_clips": ["where", "split", "spec", "settings"]},
    "vmoe.attacks.methods": {"attack": ["twin", "clip", "label", "settings", "indices"]},
    "vmoe.train.recipes": {"walks": ["settings", "done"]},
    "vmoe.export.passes": {"apply": ["graph"]},
    "vmoe.export.lowerings": {"lower": ["router", "experts"]},
    "vmoe.runtime.engines": {"why_unavailable": [], "open": ["settings"]},
    "vmoe.runtime.sources": {"claims": ["name"], "open": ["name", "settings"]},
    "vmoe.runtime.sinks": {"open": None},
}
FILES = [(folder, name) for folder in FUNCTIONS for name in registry.names(folder)]
OF = {folder: [name for f, name in FILES if f == folder] for folder in FUNCTIONS}


def load(folder: str, name: str) -> ModuleType:
    return registry.load(folder, name, "file")


@pytest.mark.parametrize("folder", FUNCTIONS)
def test_a_folder_holds_something(folder: str) -> None:
    assert OF[folder]


@pytest.mark.parametrize(("folder", "name"), FILES)
def test_a_file_offers_what_its_folder_promises(folder: str, name: str) -> None:
    module = load(folder, name)
    assert module.__doc__
    for function, parameters in FUNCTIONS[folder].items():
        offered = getattr(module, function)
        assert callable(offered)
        assert offered.__doc__, f"{function} has no docstring"
        if parameters is not None:
            assert_takes(offered, parameters)


def assert_takes(function: Callable[..., Any], parameters: list[str]) -> None:
    signature = inspect.signature(function)
    assert list(signature.parameters)[: len(parameters)] == parameters
    signature.bind(*parameters)  # nothing else must be given
    assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize(
    ("folder", "name"),
    [(f, n) for f in ("vmoe.attacks.methods", "vmoe.train.recipes") for n in OF[f]],
)
def test_settings_have_defaults_and_help(folder: str, name: str) -> None:
    cls = load(folder, name).Settings
    assert issubclass(cls, Settings)
    made = cls()
    for field in dataclasses.fields(cls):
        assert field.metadata["help"]
    with pytest.raises(AttributeError):
        made.anything = 1


@pytest.mark.parametrize("name", OF["vmoe.attacks.methods"])
def test_an_attack_says_what_it_attacks(name: str) -> None:
    assert load("vmoe.attacks.methods", name).PART in ("model", "router", "expert")


@pytest.mark.parametrize("name", OF["vmoe.runtime.engines"])
def test_a_backend_names_its_formats_and_why_it_cannot_run(name: str) -> None:
    module = load("vmoe.runtime.engines", name)
    assert isinstance(module.FORMATS, tuple)
    assert module.FORMATS
    why = module.why_unavailable()
    assert why is None or (isinstance(why, str) and "\n" not in why)
