"""Give every value of an ONNX file a name of its own, subgraphs included, without onnx.

before: If(then: a = Conv(x); y = Relu(a), else: a = Conv(x) ...)
after:  If(then: a = Conv(x); y = Relu(a), else: a~1 = Conv(x) ...)

ONNX Runtime names what its optimiser makes in each graph by itself, and refuses to load what it
saved where a graph and one inside of it have a name in common. A box that only serves has no onnx,
so that the protobuf is read here, as far as names stand in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count

# Numbers of the fields, from onnx.proto.
MODEL_GRAPH = 7
NODE, INITIALIZER, INPUT, OUTPUT, VALUE_INFO = 1, 5, 11, 12, 13  # of a graph
NODE_INPUT, NODE_OUTPUT, ATTRIBUTE = 1, 2, 5  # of a node
ATTRIBUTE_GRAPH, ATTRIBUTE_GRAPHS = 6, 11
TENSOR_NAME, VALUE_NAME = 8, 1
BYTES = 2  # the wire type of text, bytes and messages

Names = Mapping[bytes, bytes]


def make_unique(model: bytes) -> bytes:
    """Return a model whose subgraphs share no name with another graph.

    Raises:
        ValueError: it is no protobuf.
    """
    used: set[bytes] = set()
    return _each(model, {MODEL_GRAPH: lambda graph: _graph(graph, {}, used, inner=False)})


def _graph(graph: bytes, around: Names, used: set[bytes], *, inner: bool) -> bytes:
    names = dict(around)
    for name in _defined(graph):
        fresh = name
        if inner and name in used:
            fresh = next(new for i in count(1) if (new := b"%s~%d" % (name, i)) not in used)
        used.add(fresh)
        names[name] = fresh

    def value(message: bytes) -> bytes:
        return _each(message, {VALUE_NAME: lambda name: names.get(name, name)})

    def attribute(message: bytes) -> bytes:
        held = dict.fromkeys(
            (ATTRIBUTE_GRAPH, ATTRIBUTE_GRAPHS),
            lambda inside: _graph(inside, names, used, inner=True),
        )
        return _each(message, held)

    def node(message: bytes) -> bytes:
        known = dict.fromkeys((NODE_INPUT, NODE_OUTPUT), lambda name: names.get(name, name))
        return _each(message, {**known, ATTRIBUTE: attribute})

    def tensor(message: bytes) -> bytes:
        return _each(message, {TENSOR_NAME: lambda name: names.get(name, name)})

    values = dict.fromkeys((INPUT, OUTPUT, VALUE_INFO), value)
    return _each(graph, {NODE: node, INITIALIZER: tensor, **values})


def _defined(graph: bytes) -> Iterator[bytes]:
    """Yield the names that a graph gives: inputs, constants, what its nodes put out."""
    for number, _, held in _fields(graph):
        of = {NODE: NODE_OUTPUT, INITIALIZER: TENSOR_NAME, INPUT: VALUE_NAME}.get(number)
        if of is not None:
            yield from (name for inner, _, name in _fields(held) if inner == of and name)


def _each(message: bytes, change: Mapping[int, object]) -> bytes:
    """Return a message with some of its fields changed, all else byte for byte as it was."""
    made = []
    for number, raw, held in _fields(message):
        how = change.get(number)
        if how is None:
            made.append(raw)
            continue
        assert callable(how)
        new = how(held)
        made.append(_varint(number << 3 | BYTES) + _varint(len(new)) + new)
    return b"".join(made)


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield the number, the whole and the content of each field; of numbers no content."""
    at = 0
    while at < len(message):
        start = at
        key, at = _read_varint(message, at)
        wire = key & 7
        if wire == BYTES:
            size, at = _read_varint(message, at)
            begin, at = at, at + size
        elif wire == 0:
            begin = at
            _, at = _read_varint(message, at)
        elif wire in (1, 5):
            begin = at
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {start}")
        if at > len(message):
            raise ValueError(f"a field at byte {start} ends behind the message")
        yield key >> 3, message[start:at], message[begin:at] if wire == BYTES else b""


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message):
            raise ValueError("a number ends behind the message")
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*made, value])
