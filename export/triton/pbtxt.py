"""Protocol buffers' text format, as far as config.pbtxt needs it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


class Word(str):
    """A name that stands without quotes: a member of an enumeration."""


def to_text(message: Mapping[str, Any]) -> str:
    """Return a message: numbers, texts, words, messages, and lists of those."""
    return "".join(f"{line}\n" for line in _lines(message, ""))


def _lines(message: Mapping[str, Any], indent: str) -> Iterator[str]:
    for key, value in message.items():
        if isinstance(value, Mapping):
            yield from _message(key, value, indent)
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for member in value:
                yield from _message(key, member, indent)
        else:
            yield f"{indent}{key}: {_scalar(value)}"


def _message(key: str, value: Mapping[str, Any], indent: str) -> Iterator[str]:
    inside = list(_lines(value, f"{indent}  "))
    if not inside:
        yield f"{indent}{key} {{ }}"
        return
    yield f"{indent}{key} {{"
    yield from inside
    yield f"{indent}}}"


def _scalar(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Word):
        return value
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=True)
    return str(value)
