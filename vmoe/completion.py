"""What a shell may complete: options, and the values that are known without loading anything.

The protocol and the shells' scripts are click's own (`_VMOE_RUN_COMPLETE=bash_source vmoe-run`);
what is answered comes from the commands' pages, so that no TAB waits for torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class, shell_complete

from vmoe import latest, registry
from vmoe.manual import Option, Page, pages

SHELLS = ("bash", "zsh", "fish")
HERE = Path(__file__).parent


def asked(name: str) -> bool:
    """Return whether a shell asks how to complete a command."""
    return _variable(name) in os.environ


def answer(name: str, about: Page, parts: Mapping[str, Page] | None = None) -> None:
    """Answer the shell that asks, and exit.

    Args:
        name: the command.
        about: what it takes.
        parts: its own commands, by name.
    """
    command = _command(name, about, parts or {})
    variable = _variable(name)
    sys.exit(shell_complete(command, {}, name, variable, os.environ[variable]))


def script(shell: str, names: list[str]) -> str:
    """Return what a shell is to read once, to complete these commands."""
    made = get_completion_class(shell)
    assert made is not None  # click has all of SHELLS
    return "\n".join(made(click.Command(n), {}, n, _variable(n)).source() for n in names)


def _variable(name: str) -> str:
    return f"_{name.replace('-', '_').upper()}_COMPLETE"


def _command(name: str, about: Page, parts: Mapping[str, Page]) -> click.Command:
    """Return a command that takes what the page says, and does nothing."""
    params: list[click.Parameter] = [_option(option) for option in about.options]
    if about.argument:
        many = -1 if about.several else 1
        kind = _Values(VALUES.get(about.argument), path=about.argument not in NO_PATHS)
        params.append(click.Argument([about.argument], type=kind, nargs=many, required=False))
    if not parts:
        return click.Command(name, params=params, add_help_option=False)
    commands = {part: _command(part, of_part, {}) for part, of_part in parts.items()}
    return click.Group(name, commands=commands, params=params, add_help_option=False)


def _option(option: Option) -> click.Option:
    name = option.names[0].lstrip("-").replace("-", "_")
    known: Callable[[], list[str]] | None = (
        (lambda: list(option.choices)) if option.choices else VALUES.get(name)
    )
    kind = _Values(known, path=option.path or name in TEXTS_OR_PATHS, many=option.many)
    extra: dict[str, Any] = {"is_flag": True} if option.takes == "flag" else {"type": kind}
    if option.takes == "optional":
        extra |= {"is_flag": False, "flag_value": ""}
    # several times, whatever it is: what was typed twice is the command's own to refuse
    return click.Option([*option.names, name], help=option.help, multiple=True, **extra)


class _Values(click.ParamType):  # type: ignore[type-arg]
    """Values that are known, or a path; several with commas."""

    name = "value"

    def __init__(
        self, known: Callable[[], list[str]] | None, *, path: bool = False, many: bool = False
    ) -> None:
        """Take what gives the known values, and what else may be typed."""
        self._known, self._path, self._many = known, path, many

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return what begins as what was typed does; a path is the shell's own to complete."""
        done, comma, last = incomplete.rpartition(",") if self._many else ("", "", incomplete)
        known = self._known() if self._known is not None else []
        values = [done + comma + value for value in known if value.startswith(last)]
        paths = [CompletionItem(incomplete, type="file")] if self._path else []
        return [*paths, *map(CompletionItem, values)]  # bash takes paths where nothing else fits


def _files(folder: str) -> Callable[[], list[str]]:
    return lambda: registry.names_in([str(HERE / folder)])


def _data() -> list[str]:
    return [name if name == "camera-motion" else f"{name}:"
            for name in registry.names_in([str(HERE / "data")]) if name != "folder"]  # fmt: skip


VALUES: dict[str, Callable[[], list[str]]] = {
    "bundle": latest.offered, "target": latest.offered, "checkpoint": latest.offered,
    "compare": latest.offered, "twin": latest.offered, "init_from": latest.offered,
    "baseline": lambda: ["torch", "torch-compile", *latest.offered()],
    "data": _data, "accuracy": _data, "calib": _data, "verify_data": _data,
    "attack": _files("attacks/methods"), "method": _files("train/recipes"),
    "arch": _files("models/experts"), "lowering": _files("export/lowerings"),
    "backend": lambda: ["auto", *_files("runtime/engines")()],
    "device": lambda: ["auto", "cpu", "cuda:0"],
    "source": lambda: ["test", "-"],
    "shell": lambda: list(SHELLS), "command": lambda: ["vmoe", *pages()],
}  # fmt: skip
TEXTS_OR_PATHS = {"source", "data", "accuracy", "baseline", "calib", "verify_data"}
NO_PATHS = {"shell", "command"}  # arguments
