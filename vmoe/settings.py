"""One frozen dataclass gives the flags, their help, the TOML keys, the checks and the record.

Defaults < `--config run.toml` < flags. `vmoe.cli` makes the flags.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vmoe.errors import SettingError, UnknownNameError

S = TypeVar("S", bound="Settings")


def opt(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] | None = None,
    parse: typing.Callable[[str], Any] | None = None,
    repeat: bool = False,
    bare: str | None = None,
) -> Any:
    """Return a dataclass field with its help and its check.

    Args:
        default: the value where nothing is given.
        help: one line, with the unit.
        at_least: the smallest value that is allowed.
        above: a bound that the value must exceed.
        at_most: the largest value that is allowed.
        choices: the only values that are allowed (of a tuple: of its members).
        parse: makes the value from a flag's text, and raises SettingError.
        repeat: of a tuple: the flag is given once for each member, which may hold commas.
        bare: the value of a flag that stands without one.
    """
    meta = {
        "help": help,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "choices": choices,
        "parse": parse,
        "repeat": repeat,
        "bare": bare,
    }
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True)
class Settings:
    """What a settings class inherits: its values are checked when it is made."""

    def __post_init__(self) -> None:
        """Check every value against what `opt` said of it."""
        for field in dataclasses.fields(self):
            for value in _members(getattr(self, field.name)):
                _check(field.name, value, field.metadata)


def _members(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _check(name: str, value: Any, meta: Mapping[str, Any]) -> None:
    flag = "--" + name.replace("_", "-")
    if value is None or not meta:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingError(f"{flag} is {value}; give a finite number.")
    if meta["at_least"] is not None and value < meta["at_least"]:
        raise SettingError(f"{flag} is {value}; it must be at least {meta['at_least']}.")
    if meta["above"] is not None and value <= meta["above"]:
        raise SettingError(f"{flag} is {value}; it must be above {meta['above']}.")
    if meta["at_most"] is not None and value > meta["at_most"]:
        raise SettingError(f"{flag} is {value}; it must be at most {meta['at_most']}.")
    if meta["choices"] and value not in meta["choices"]:
        raise UnknownNameError(flag, str(value), meta["choices"])


def from_mapping(cls: type[S], values: Mapping[str, Any], where: str) -> S:
    """Make settings from keys and values, as from TOML or a checkpoint's header.

    Args:
        cls: the settings class.
        values: keys as the fields are named (hyphens allowed); lists become tuples.
        where: what the keys come from, for the error.

    Raises:
        UnknownNameError: a key that is no field; names the nearest.
        SettingError: a value of the wrong type or out of its range.
    """
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    given = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UnknownNameError(f"key in {where}", key, known)
        given[name] = _typed(name, value, hints[name], where)
    return cls(**given)


def _typed(name: str, value: Any, hint: Any, where: str) -> Any:
    if typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        member = typing.get_args(hint)[0]  # every tuple of settings is tuple[X, ...]
        return tuple(_typed(name, v, member, where) for v in value)
    kinds = _kinds(hint)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if Path in kinds and isinstance(value, str):
        return Path(value)
    right = (value is None and type(None) in kinds) or type(value) in kinds
    right = right or (Path in kinds and isinstance(value, Path))  # its type is PosixPath
    if not right:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise SettingError(f"{name} in {where} is {value!r}; it must be {wanted}.")
    return value


def _kinds(hint: Any) -> tuple[type, ...]:
    """Return the plain types of a hint: `int | None` is (int, NoneType)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(typing.get_args(hint))
    return (typing.get_origin(hint) or hint,)


def to_mapping(settings: Settings) -> dict[str, Any]:
    """Return settings as JSON can hold them: tuples as lists, paths as text."""
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    return {key: _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(member) for member in value]
    return str(value) if isinstance(value, Path) else value


def read_toml(path: Path) -> dict[str, Any]:
    """Read a `--config` file.

    Raises:
        SettingError: it cannot be read, or is not TOML.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text())
    except OSError as e:
        raise SettingError(f"cannot read {path}: {e.strerror}.") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise SettingError(f"{path} is not TOML: {e}.") from e


def parse_eps(text: str, norm: str = "linf") -> float:
    """Read a budget on pixels in [0, 1].

    Of an L-infinity ball: `8/255`, `8` (of 255) or a decimal below 1. Of an L2 ball, whose budget
    is the length of the whole change: a number with its point, `2.0`, or `128/255`; a whole number
    could be meant of 255, too, and is refused.

    Raises:
        SettingError: not a number, negative, of two meanings, or (L-infinity) above 1.
    """
    wanted = {
        "linf": "write it 8/255, 8 (a whole number is of 255) or as a decimal below 1.",
        "l2": "with --norm l2 write a length with its point, 2.0, or 128/255.",
    }[norm]
    number = re.fullmatch(
        r"\s*((?:\d+(?:\.\d+)?|\.\d+)(?:e-?\d+)?)\s*(?:/\s*(\d+(?:\.\d+)?))?\s*", text
    )
    if text.strip().startswith("-"):
        raise SettingError(f"eps {text!r} is negative: {wanted}")
    if not number:
        raise SettingError(f"eps {text!r} is not a number: {wanted}")
    value, whole = float(number[1]), number[1].isdigit()
    if number[2] is not None:
        if float(number[2]) == 0:
            raise SettingError(f"eps {text!r} divides by zero: {wanted}")
        value /= float(number[2])
    elif value >= 1 and whole != (norm == "linf"):
        raise SettingError(f"eps {text!r} could mean two things: {wanted}")
    elif value >= 1 and whole:
        value /= 255
    if norm == "linf" and value > 1:
        raise SettingError(f"eps {text!r} is above 1, the whole range of a pixel: {wanted}")
    return value


def format_eps(eps: float, norm: str = "linf") -> str:
    """Return both forms of an L-infinity budget, `8/255 (0.0314)`; of an L2 one, `2.0`."""
    if norm == "linf":
        return f"{eps * 255:.4g}/255 ({eps:.4f})"
    short = f"{eps:.4g}"
    return f"{short}.0" if short.isdigit() else short
