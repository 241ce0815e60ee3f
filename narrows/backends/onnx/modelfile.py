"""Model files without a copy of the weights in memory.

A protobuf message is built in memory as a whole, and parsed as a whole: a model file by way of
`onnx_ir.save` costs its weights twice over when it is written, and twice when a runtime loads it.
Here everything but the large weights goes through protobuf. `write_model` puts these into the file
one by one, and `outline` returns a model that names their places in the file, from which a runtime
maps them into memory.

The wire format is that of https://protobuf.dev/programming-guides/encoding/: a field is a key
(number and type), then a varint or, for texts, bytes and messages, a length and so many bytes.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Fields of messages whose values are bytes, as in onnx.proto.
GRAPH, INITIALIZER, NAME, RAW_DATA, LOCATION, EXTERNAL_DATA, DOC_STRING = 7, 5, 8, 9, 14, 13, 12
VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5  # types of fields
EXTERNAL = 1  # TensorProto.DataLocation

LARGE = 1024  # bytes from which a weight is written on its own
ALIGNMENT = 16  # of a weight in the file, so that mapped memory is as good as any other


# ------------------------------------------------------------------ writing


def write_model(proto: Any, weights: dict[str, Any], path: Path) -> None:
    """Write a model to a file.

    Args:
        proto: The ``onnx.ModelProto``; where it has the weights as inputs, they become constants.
        weights: The `onnx_ir` tensors of the weights by name.
        path: The file.
    """
    import onnx

    about, whole = onnx.ModelProto(), onnx.GraphProto()
    about.CopyFrom(proto)
    about.ClearField("graph")
    whole.CopyFrom(proto.graph)
    del whole.input[:]
    whole.input.extend(value for value in proto.graph.input if value.name not in weights)
    start, graph = about.SerializeToString(), whole.SerializeToString()
    for digits in range(1, 6):  # of the graph's length, which everything behind it moves by
        heads, size = _heads(weights, len(start + _key(GRAPH)) + digits, len(graph))
        if len(_varint(size)) == digits:
            break
    with path.open("wb") as file:
        file.write(start + _key(GRAPH) + _varint(size) + graph)
        for head, tensor in zip(heads, weights.values(), strict=True):
            file.write(head)
            tensor.tofile(file)


def _heads(weights: dict[str, Any], place: int, size: int) -> tuple[list[bytes], int]:
    """Return what stands before the bytes of every weight, and the size of the graph.

    Args:
        weights: The tensors by name.
        place: Where the graph begins in the file.
        size: Of the graph without weights.
    """
    heads = []
    for name, tensor in weights.items():
        for filler in range(ALIGNMENT + 2):  # two more: a length may grow by a byte
            head = _head(name, tensor, filler)
            if (place + size + len(head)) % ALIGNMENT == 0:
                break
        heads.append(head)
        size += len(head) + tensor.nbytes
    return heads, size


def _head(name: str, tensor: Any, filler: int) -> bytes:
    """Return a weight's initializer up to its bytes, with a doc string of ``filler`` blanks."""
    import onnx

    about = onnx.TensorProto(
        dims=tensor.shape.numpy(), data_type=tensor.dtype.value, name=name, doc_string=" " * filler
    )
    inside = about.SerializeToString() + _key(RAW_DATA) + _varint(tensor.nbytes)
    return _key(INITIALIZER) + _varint(len(inside) + tensor.nbytes) + inside


def _key(number: int, kind: int = BYTES) -> bytes:
    return _varint(number << 3 | kind)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)


# ------------------------------------------------------------------ reading


def outline(path: Path) -> bytes:
    """Return the serialized model of a file; its large weights are said to lie in that file.

    `ValueError` or `IndexError` if it is no model.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _mapped(data, 0, len(data), path.name)


def _fields(data: Any, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield per field its number, where it begins, and where its value begins and ends."""
    at = start
    while at < end:
        key, value = _read_varint(data, at)
        kind = key & 7
        if kind == VARINT:
            _, stop = _read_varint(data, value)
        elif kind == BYTES:
            length, value = _read_varint(data, value)
            stop = value + length
        elif kind in (FIXED_64, FIXED_32):
            stop = value + (8 if kind == FIXED_64 else 4)
        else:
            raise ValueError(f"there is no field type {kind}")
        if stop > end:
            raise ValueError("a field ends behind its message")
        yield key >> 3, at, value, stop
        at = stop


def _read_varint(data: Any, at: int) -> tuple[int, int]:
    """Return the number at a place, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _mapped(data: Any, start: int, end: int, name: str) -> bytes:
    parts = []
    for number, at, value, stop in _fields(data, start, end):
        if number != GRAPH:
            parts.append(data[at:stop])
            continue
        graph = b"".join(_initializers(data, value, stop, name))
        parts.append(_key(GRAPH) + _varint(len(graph)) + graph)
    return b"".join(parts)


def _initializers(data: Any, start: int, end: int, name: str) -> Iterator[bytes]:
    """Yield the fields of a graph; the bytes of weights become places in the file ``name``."""
    for number, at, value, stop in _fields(data, start, end):
        if number != INITIALIZER or stop - value < LARGE:
            yield data[at:stop]
            continue
        tensor = b"".join(_placed(data, value, stop, name))
        yield _key(INITIALIZER) + _varint(len(tensor)) + tensor


def _placed(data: Any, start: int, end: int, name: str) -> Iterator[bytes]:
    for number, at, value, stop in _fields(data, start, end):
        if number != RAW_DATA or value % ALIGNMENT:
            yield data[at:stop]
            continue
        for key, text in (("location", name), ("offset", value), ("length", stop - value)):
            entry = _text(1, key) + _text(2, str(text))
            yield _key(EXTERNAL_DATA) + _varint(len(entry)) + entry
        yield _key(LOCATION, VARINT) + _varint(EXTERNAL)


def _text(number: int, text: str) -> bytes:
    data = text.encode()
    return _key(number) + _varint(len(data)) + data
