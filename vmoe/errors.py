"""Every error that we raise on purpose, one tree; the number is a command's exit code.

VmoeError (1)
├─ OutputError (1)           what we write could not be written whole
├─ BundleError (1)           a bundle that is not what its manifest says
│  ├─ CorruptBundleError       a part is missing, changed, or outside of the folder
│  └─ EngineMismatchError      whole, but not for this version, machine or clip
├─ ServerError (1)           a server that runs the model does not answer
├─ SettingError (2)          a value that cannot be used
├─ UnknownNameError (2)      a name that is not there, with the nearest that is
├─ GateError (3)             a gate refused a bundle
├─ SourceError (4)           a source cannot be opened, or was lost
└─ MissingDependencyError (5)  not installed, and the command that installs it
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VmoeError(Exception):
    """A mistake that a user can mend: shown as one line, never as a traceback."""

    exit_code = 1


class OutputError(VmoeError):
    """A file or folder could not be written whole; nothing of it is left."""


class BundleError(VmoeError):
    """A bundle cannot be used."""


class CorruptBundleError(BundleError):
    """A bundle's files are not what its manifest says."""


class EngineMismatchError(BundleError):
    """A bundle is whole, but not for this version, this machine or this clip."""


class ServerError(VmoeError):
    """A server that runs the model does not answer, or was lost."""


class SettingError(VmoeError):
    """A setting, flag or argument has a value that cannot be used."""

    exit_code = 2


class UnknownNameError(SettingError):
    """A name that is not among those that exist."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        """Say what is unknown, what is nearest, and what there is.

        Args:
            kind: what the name stands for, such as "attack".
            name: the name as given.
            known: the names that exist.
        """
        names = sorted(known)
        super().__init__(
            f"unknown {kind} {name!r}{nearest(name, names)} Known: {', '.join(names)}."
        )


class GateError(VmoeError):
    """A gate refused a bundle."""

    exit_code = 3


class SourceError(VmoeError):
    """A source cannot be opened, breaks in the middle, or was lost."""

    exit_code = 4


class MissingDependencyError(VmoeError):
    """Something is not installed here."""

    exit_code = 5


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ": did you mean 'x'?" for a near miss, else "."."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {close[0]!r}?" if close else "."
