"""Manual pages, as man(7) has them: one for each command."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import vmoe
from vmoe.manual import Option, Page, topics

EXIT_CODES = {
    0: "It did what was asked.",
    1: "An error: what is read is not what it should be, or a disk, a server or a sink failed.",
    2: "A mistake in the command line, or an output that exists.",
    3: "A gate refused what was made, or a comparison found a regression.",
    4: "A source cannot be opened, or was lost.",
    5: "Something is not installed; the message names the command that installs it.",
    130: "Interrupted. (vmoe-run ends with 0: that is how one ends it.)",
}
FILES = {
    "runs/": "What the commands write unless told where: runs/train, runs/export, runs/attack, "
    "runs/demo. What a command works on, where nothing is named, is the newest of it, else the "
    "model that ships.",
    "~/.cache/vmoe/": "What can be made again: optimised graphs, what is known of video files. "
    "XDG_CACHE_HOME moves it.",
}


def text(name: str, about: Page, others: Iterable[str], parts: Mapping[str, Page]) -> str:
    """Return one page.

    Args:
        name: the command.
        about: what it takes.
        others: the commands to see also.
        parts: its own commands, by name.
    """
    first, *rest = _paragraphs(about.help)
    lines = [f'.TH {_dashed(name).upper()} 1 "" "vmoe {vmoe.__version__}" "vmoe manual"']
    lines += [".SH NAME", rf"{_dashed(name)} \- {_plain(_sentence(first))}"]
    lines += [".SH SYNOPSIS", rf"\fB{_dashed(name)}\fR {_plain(about.usage)}"]
    lines += [".SH DESCRIPTION", _plain(first)]
    lines += [line for paragraph in rest for line in (".PP", *_lines(paragraph))]
    lines += [".SH OPTIONS", *_options(about.options)]
    if parts:
        lines += [".SH COMMANDS"]
        for part, of_part in parts.items():
            lines += [f'.SS "{_dashed(name)} {part} {_plain(of_part.usage)}"']
            lines += [line for p in _paragraphs(of_part.help) for line in (*_lines(p), ".PP")]
            lines += _entries(of_part.options)
    lines += [".SH EXIT STATUS"]
    lines += [line for code, says in EXIT_CODES.items() for line in _entry(str(code), says)]
    lines += [".SH EXAMPLES", ".nf", *map(_plain, about.examples), ".fi"]
    lines += [".SH FILES", *(line for path, says in FILES.items() for line in _entry(path, says))]
    seen = ", ".join(rf"\fB{_dashed(other)}\fR(1)" for other in others if other != name)
    return "\n".join([*lines, ".SH SEE ALSO", seen, ""])


def _options(options: Iterable[Option]) -> list[str]:
    grouped = topics(options)
    if len(grouped) == 1:
        return _entries(options)
    lines = []
    for topic, members in grouped.items():
        lines += [f'.SS "{_plain(topic)}"', *_entries(members)]
    return lines


def _entries(options: Iterable[Option]) -> list[str]:
    return [line for option in options for line in _entry(option.usage, option.help)]


def _entry(term: str, says: str) -> list[str]:
    return [".TP", rf"\fB{_plain(term)}\fR", _plain(says)]


def _paragraphs(text: str) -> list[str]:
    r"""Return paragraphs as one line each, but those whose lines are to stay (click's `\b`)."""
    return [p if p.startswith("\b") else " ".join(p.split()) for p in text.split("\n\n")]


def _lines(paragraph: str) -> list[str]:
    if not paragraph.startswith("\b"):
        return [_plain(paragraph)]
    return [".nf", *map(_plain, paragraph.splitlines()[1:]), ".fi"]


def _sentence(text: str) -> str:
    """Return the first sentence, without what a colon or a stop begins."""
    return re.split(r"[.:](?:\s|$)", text, maxsplit=1)[0]


def _dashed(text: str) -> str:
    return text.replace("-", r"\-")


def _plain(text: str) -> str:
    """Return text that roff prints as it stands."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-")
    return re.sub(r"^([.'])", r"\\&\1", escaped)
