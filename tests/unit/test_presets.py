"""Presets: what was given stands, and every value of one is some attack's."""

from __future__ import annotations

import dataclasses

import pytest

from vmoe import registry
from vmoe.attacks import presets
from vmoe.attacks.methods import METHODS, j_tlga
from vmoe.errors import UnknownNameError


def test_what_was_given_stands_over_a_preset() -> None:
    given = {"lam": 0.5, "beta": None, "steps": 7}
    held = presets.under(given, "paper")
    assert held["lam"] == 0.5
    assert held["beta"] == 0.9
    assert held["steps"] == 7
    assert held["lip"] == "quotient"
    assert presets.under(given, None) == given


def test_paper_is_the_literal_form() -> None:
    made = j_tlga.Settings(**presets.PRESETS["paper"])
    assert made.lip == "quotient"
    assert made.temporal == "iterations"
    assert min(made.lam, made.gamma1, made.gamma2) > 0


def test_every_value_is_a_setting_of_some_attack() -> None:
    known = {
        field.name
        for name in registry.names(METHODS)
        for field in dataclasses.fields(registry.load(METHODS, name, "attack").Settings)
    }
    for values in presets.PRESETS.values():
        assert set(values) <= known


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'paper'"):
        presets.under({}, "papr")
