"""One line on the terminal for each window."""

from __future__ import annotations

from types import TracebackType

import click

from vmoe.runtime.results import Result

from . import Step


def open(*, streams: int = 1) -> Terminal:
    """Return a sink that prints on stdout; of several streams each line names its own."""
    return Terminal(named=streams > 1)


class Terminal:
    """See `Sink`."""

    name = "the terminal"
    wants_frames = False

    def __init__(self, *, named: bool) -> None:
        """Take whether lines name their stream."""
        self._named = named

    def take(self, step: Step) -> None:
        """Print the result, if there is one."""
        if step.result is not None:
            source = f"{step.result.source}  " if self._named else ""
            click.echo(source + line(step.result))

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing is held."""


def line(result: Result) -> str:
    """Return a result as one line: when, what, who answered, how old it was."""
    others = "  ".join(f"{label} {score:.0%}" for label, score in result.top[1:])
    parts = [
        f"{result.t_s:8.2f} s",
        f"{result.label:<12} {result.score:4.0%}",
        f"expert {result.expert} ({result.weights[result.expert]:.0%})",
        f"{result.age_ms:6.1f} ms",
    ]
    if others:
        parts.append(f"then {others}")
    if result.gap:
        parts.append("after a break")
    if result.dropped:
        parts.append(f"{result.dropped} frame{'s' * (result.dropped != 1)} dropped")
    return "  ".join(parts)
