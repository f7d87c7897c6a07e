"""What a command line becomes: settings and rows, one flag with one meaning."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import pytest
from click.testing import CliRunner

from tests.twins import SPEC
from vmoe import registry
from vmoe.attacks import flags
from vmoe.attacks.cli import main
from vmoe.attacks.evaluate import plan
from vmoe.attacks.methods import METHODS
from vmoe.errors import SettingError


def read(preset: str | None = None, *, curve: bool = False, **given: Any) -> Any:
    settings, rows = flags.read(given, 3, None, preset, curve=curve, bundle=False)
    return settings, rows.named


def fields() -> dict[str, dict[str, dataclasses.Field[Any]]]:
    """Return every field of every attack's settings that is a flag of theirs."""
    held: dict[str, dict[str, dataclasses.Field[Any]]] = defaultdict(dict)
    for name in registry.names(METHODS):
        for field in dataclasses.fields(registry.load(METHODS, name, "attack").Settings):
            if field.name not in flags.OURS | flags.fields_of(flags.RunSettings):
                held[field.name][name] = field
    return held


def test_one_flag_takes_the_same_of_every_attack() -> None:
    for name, held in fields().items():
        assert len({(field.type, field.metadata["choices"]) for field in held.values()}) == 1, name


def test_help_has_every_flag_and_whatever_is_not_usual() -> None:
    shown = " ".join(CliRunner().invoke(main, ["--help"], terminal_width=200).output.split())
    for name, held in fields().items():
        flag = "--" + name.replace("_", "-")
        assert f" {flag} " in shown or f" {flag}/--no-" in shown
        usual = max(
            held.values(), key=lambda f: sum(f.default == other.default for other in held.values())
        )
        for attack, field in held.items():
            assert field.metadata["help"] in shown
            assert field.default == usual.default or f"; {attack}: " in shown, name


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, [8 / 255]),
        ({"curve": True}, [n / 255 for n in (1, 2, 4, 8, 16)]),
        ({"norm": "l2"}, [2.0]),
        ({"norm": "l2", "curve": True}, [0.5, 1.0, 2.0, 4.0, 8.0]),
        ({"eps": (0.1, 0.2, 0.1), "curve": True}, [0.1, 0.2]),
    ],
)
def test_budgets_that_are_not_given(given: dict[str, Any], wanted: list[float]) -> None:
    settings, rows = read(attack=("pgd",), **given)
    assert list(settings.eps) == [row.eps for row in rows] == wanted
    assert {row.norm for row in rows} == {given.get("norm", "linf")}


def test_names_and_values_reach_the_rows() -> None:
    settings, rows = read(attack=("pgd_r", "apgd-ce", "pgd-r"), steps=4, route_grad=("all",))
    assert settings.attack == ("pgd-r", "apgd-ce")
    assert [row.attack for row in rows] == ["pgd-r", "apgd-ce"]
    assert all(each.steps == 4 and each.seed == 3 for row in rows for each in row.settings)
    assert [each.route_grad for each in rows[1].settings] == ["all"]


def test_a_preset_stands_under_what_is_given() -> None:
    _, (row,) = read("paper", attack=("tla-r",), beta=0.5)
    assert (row.settings[0].lip, row.settings[0].beta) == ("quotient", 0.5)
    _, (row,) = read(attack=("tla-r",))
    assert row.settings[0].lip == "detached"


def test_a_flag_without_effect_is_refused() -> None:
    with pytest.raises(SettingError, match="--gamma1 has no effect: none of pgd, fgsm takes it"):
        read(attack=("pgd", "fgsm"), gamma1=1.0)
    with pytest.raises(SettingError, match="--preset has no effect: none of pgd takes a value of"):
        read("paper", attack=("pgd",))
    read("paper", attack=("pgd", "tla-r"))


def test_a_budget_that_holds_every_clip() -> None:
    most = flags.values_of(SPEC) ** 0.5
    flags.refuse_budgets(plan(["pgd"], [most], norm="l2"), SPEC)
    with pytest.raises(SettingError, match=r"--eps is 200\.0; with --norm l2 it must be at most"):
        flags.refuse_budgets(plan(["pgd"], [200.0], norm="l2"), SPEC)


def test_early_stop_is_set_for_all() -> None:
    rows = flags.stopping(plan(["pgd", "pgd-r"], [0.1]), early=False)
    assert not any(each.early_stop for row in rows for each in row.settings)  # type: ignore[attr-defined]
