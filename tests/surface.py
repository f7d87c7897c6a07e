"""Print the surface of the TensorRT that is imported, as JSON; run in a process of its own.

    {"version": "10.3.0",
     "classes": {"Builder": {"bases": [], "enum": {},
                             "members": {"create_network": {"kind": "method",
                                                            "signatures": ["create_network(...)"]},
                                         "max_threads": {"kind": "property", "writable": true}}}},
     "functions": {"init_libnvinfer_plugins": ["init_libnvinfer_plugins(...)"]}}

A signature is pybind11's own line: `name(self: tensorrt.Builder, flags: int = 0) -> ...`. The
members of an enum are its names and integers.
"""

from __future__ import annotations

import json
import re

import tensorrt


def signatures(name: str, doc: str | None) -> list[str]:
    """Return the lines of a docstring that are signatures: one for each overload."""
    found = re.findall(rf"^(?:\d+\. )?({name}\(.*\)(?: -> .*)?)$", doc or "", re.MULTILINE)
    return [line for line in found if "*args, **kwargs" not in line]


def member(cls: type, name: str) -> dict[str, object]:
    """Describe what a class holds under a name."""
    held = getattr(cls, name)
    if isinstance(held, property):
        says = re.search(r"-> (.*)$", (held.fget and held.fget.__doc__) or "", re.MULTILINE)
        kind = says[1] if says else ""
        return {"kind": "property", "writable": held.fset is not None, "type": kind}
    if callable(held):
        return {"kind": "method", "signatures": signatures(name, held.__doc__)}
    return {"kind": "value", "type": type(held).__name__}


def describe(cls: type) -> dict[str, object]:
    """Describe a class: what it descends from, what it holds, and an enum's values."""
    names = [name for name in dir(cls) if not name.startswith("__") or name == "__init__"]
    values = {name: int(value) for name, value in getattr(cls, "__members__", {}).items()}
    bases = [base.__name__ for base in cls.__mro__[1:] if base.__module__.startswith("tensorrt")]
    return {
        "bases": bases,
        "enum": values,
        "members": {name: member(cls, name) for name in names if name not in values},
    }


def inner(cls: type, path: str) -> dict[str, dict[str, object]]:
    """Describe a class and the classes inside of it, by their paths."""
    found = {path: describe(cls)}
    for name, held in vars(cls).items():
        if isinstance(held, type) and held is not cls and held.__qualname__.endswith(f".{name}"):
            found.update(inner(held, f"{path}.{name}"))
    return found


if __name__ == "__main__":
    classes: dict[str, dict[str, object]] = {}
    functions = {}
    for name in dir(tensorrt):
        held = getattr(tensorrt, name)
        if isinstance(held, type):
            classes.update(inner(held, name))
        elif callable(held):
            functions[name] = signatures(name, held.__doc__)
    print(json.dumps({"version": tensorrt.__version__, "classes": classes, "functions": functions}))
