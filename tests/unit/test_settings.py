"""Settings: checks, near misses, TOML, and eps in all its forms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from vmoe.errors import SettingError, UnknownNameError
from vmoe.settings import Settings, format_eps, from_mapping, opt, parse_eps, read_toml, to_mapping


@dataclass(frozen=True)
class Some(Settings):
    steps: int = opt(10, "steps", at_least=1)
    rate: float = opt(0.5, "rate", above=0, at_most=1)
    kind: str = opt("area", "kind", choices=("area", "linear"))
    sizes: tuple[float, ...] = opt((1.0,), "sizes", at_least=0)
    names: tuple[str, ...] = opt((), "names", choices=("a", "b"))
    limit: int | None = opt(None, "limit", at_least=1)
    place: Path | None = opt(None, "place")
    loud: bool = opt(False, "loud")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "--steps is 0; it must be at least 1."),
        ({"rate": 0.0}, "--rate is 0.0; it must be above 0."),
        ({"rate": 1.5}, "--rate is 1.5; it must be at most 1."),
        ({"rate": float("inf")}, "--rate is inf; give a finite number."),
        ({"sizes": (1.0, -1.0)}, "--sizes is -1.0; it must be at least 0."),
        ({"kind": "arae"}, "unknown --kind 'arae': did you mean 'area'? Known: area, linear."),
        ({"names": ("a", "c")}, "unknown --names 'c'. Known: a, b."),
        ({"limit": 0}, "--limit is 0; it must be at least 1."),
    ],
)
def test_each_check_says_what_is_wrong(values: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError) as e:
        Some(**values)  # type: ignore[arg-type]
    assert str(e.value) == message
    assert e.value.exit_code == 2


def test_mapping_goes_there_and_back() -> None:
    made = Some(steps=3, sizes=(1.0, 2.0), names=("b",), limit=4, place=Path("x/y"), loud=True)
    plain = to_mapping(made)
    assert plain["sizes"] == [1.0, 2.0]
    assert plain["place"] == "x/y"
    assert from_mapping(Some, plain, "here") == made


def test_hyphens_and_whole_numbers_are_taken() -> None:
    @dataclass(frozen=True)
    class Two(Settings):
        min_rate: float = opt(0.0, "rate")

    assert from_mapping(Two, {"min-rate": 1}, "here") == Two(min_rate=1.0)
    assert type(from_mapping(Two, {"min-rate": 1}, "here").min_rate) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stesp": 3}, "unknown key in run.toml 'stesp': did you mean 'steps'?"),
        ({"steps": 3.5}, "steps in run.toml is 3.5; it must be int."),
        ({"steps": True}, "steps in run.toml is True; it must be int."),
        ({"steps": "3"}, "steps in run.toml is '3'; it must be int."),
        ({"rate": "x"}, "rate in run.toml is 'x'; it must be float."),
        ({"limit": 1.5}, "limit in run.toml is 1.5; it must be int or NoneType."),
        ({"sizes": [1, "x"]}, "sizes in run.toml is 'x'; it must be float."),
        ({"sizes": 3}, "sizes in run.toml is 3; it must be tuple."),
        ({"loud": 1}, "loud in run.toml is 1; it must be bool."),
    ],
)
def test_keys_and_types_are_checked(values: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError) as e:
        from_mapping(Some, values, "run.toml")
    assert str(e.value).startswith(message)


def test_unknown_key_is_an_unknown_name() -> None:
    with pytest.raises(UnknownNameError, match="Known: kind, limit, loud"):
        from_mapping(Some, {"zzz": 1}, "run.toml")


def test_toml(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('steps = 3\nsizes = [1, 2.5]\nkind = "linear"\n')
    made = from_mapping(Some, read_toml(path), str(path))
    assert made == Some(steps=3, sizes=(1.0, 2.5), kind="linear")


def test_bad_toml(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"cannot read .*No such file"):
        read_toml(tmp_path / "none.toml")
    path = tmp_path / "run.toml"
    path.write_text("steps = = 3")
    with pytest.raises(SettingError, match="is not TOML"):
        read_toml(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingError, match="is not TOML"):
        read_toml(path)


@pytest.mark.parametrize(
    ("text", "eps"),
    [
        ("8/255", 8 / 255), ("8", 8 / 255), ("1", 1 / 255), ("255", 1.0), (" 8 / 255 ", 8 / 255),
        ("0.0314", 0.0314), (".5", 0.5), ("0", 0.0), ("0/255", 0.0), ("2.5/255", 2.5 / 255),
        ("1e-3", 0.001), ("1/1", 1.0),
    ],
)  # fmt: skip
def test_eps_forms(text: str, eps: float) -> None:
    assert parse_eps(text) == eps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eight", "is not a number"), ("", "is not a number"), ("-8", "is negative"),
        ("8/", "is not a number"), ("8/255/2", "is not a number"), ("nan", "is not a number"),
        ("inf", "is not a number"), ("0x8", "is not a number"), ("8 255", "is not a number"),
        ("8/0", "divides by zero"), ("1.5", "could mean two things"), ("256", "is above 1"),
        ("300/255", "is above 1"), ("2.0", "could mean two things"),
    ],
)  # fmt: skip
def test_bad_eps(text: str, message: str) -> None:
    with pytest.raises(SettingError, match=message) as e:
        parse_eps(text)
    assert "write it 8/255" in str(e.value)


@pytest.mark.parametrize(
    ("text", "eps"), [("2.0", 2.0), ("0.5", 0.5), (".25", 0.25), ("128/255", 128 / 255), ("9/3", 3)]
)
def test_l2_forms(text: str, eps: float) -> None:
    assert parse_eps(text, "l2") == eps
    assert parse_eps(format_eps(eps, "l2"), "l2") == pytest.approx(eps, rel=1e-3)


@pytest.mark.parametrize("text", ["8", "1", "255", "-1.0", "x"])
def test_bad_l2(text: str) -> None:
    """A whole number might be meant of 255."""
    with pytest.raises(SettingError, match=r"with --norm l2 write a length with its point, 2\.0"):
        parse_eps(text, "l2")


def test_both_forms_of_eps_are_shown() -> None:
    assert format_eps(8 / 255) == "8/255 (0.0314)"
    assert format_eps(0.05) == "12.75/255 (0.0500)"
    assert format_eps(2.0, "l2") == "2.0"
