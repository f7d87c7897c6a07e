"""A folder is a registry: `attacks/methods/j_tlga.py` is `--attack j-tlga`."""

from __future__ import annotations

import importlib
import keyword
import pkgutil
from collections.abc import Iterable
from types import ModuleType

from vmoe.errors import UnknownNameError


def names(package: str) -> list[str]:
    """Return the names that a package's files give, sorted; a leading `_` hides a file.

    Args:
        package: dotted name, such as "vmoe.attacks.methods".
    """
    return names_in(importlib.import_module(package).__path__)


def names_in(folders: Iterable[str]) -> list[str]:
    """Return the names that the files of folders give, as `names` does, importing nothing."""
    found = (module.name for module in pkgutil.iter_modules(folders))
    return sorted(_spoken(name) for name in found if not name.startswith("_"))


def _spoken(module: str) -> str:
    """Return a module's name as users type it: `j_tlga` is j-tlga, `if_` (a keyword) is if."""
    return module.rstrip("_").replace("_", "-")


def load(package: str, name: str, kind: str) -> ModuleType:
    """Import the file that a name stands for.

    Args:
        package: dotted name of the folder.
        name: with hyphens or underscores.
        kind: what the name stands for, for the error.

    Raises:
        UnknownNameError: no such file; names the nearest.
    """
    known = names(package)
    if name.replace("_", "-") not in known:
        raise UnknownNameError(kind, name, known)
    module = name.replace("-", "_")
    return importlib.import_module(f"{package}.{module + '_' * keyword.iskeyword(module)}")
