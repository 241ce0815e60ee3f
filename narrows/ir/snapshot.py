"""`Snapshot`: what a person wants to see of a program, as plain data.

A snapshot holds no tensors, so it can be kept for every pass, written as JSON, and shown or
compared later without torch. `narrows.ir.text` prints one, `narrows.ir.diff` compares two and
`narrows.ir.dump` keeps a folder of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from narrows.files.reading import fit

if TYPE_CHECKING:
    import torch
    from torch import fx

    from narrows.ir.program import Program

# How dtypes are spelled in dumps and on the command line: ``f32[1,3,224,224]``.
DTYPES: dict[str, str] = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint8": "u8",
    "bool": "bool",
    "complex64": "c64",
    "complex128": "c128",
}

# Arguments that no dump shows: they choose a kernel, or matter in training alone.
UNTOLD = frozenset({"cudnn_enable", "cudnn_enabled", "momentum"})


@dataclass(frozen=True)
class NodeRecord:
    """One node.

    Attributes:
        name: The node's name.
        op: The operator as ATen spells it, ``conv2d.default``; ``input`` and ``output`` for the
            ends.
        inputs: The nodes it reads, in order, without weights.
        weights: The weights it reads, in order.
        args: The arguments as text; weights stand as ``{0}``, ``{1}`` ..., indices into
            ``weights``.
        shape: The shape at the example's sizes, where the node is one tensor.
        dtype: The short dtype, ``f32``.
        dynamic: The free axes.
        was: The shape before the last pass, where that changed it.
        module: The module path.
        source: ``file:line`` of the user's code.
        code: The text of that line.
        remark: What the last pass says of the node.
        grid: What the codes of a quantized tensor stand for: ``2^-5 z128``.
    """

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    args: str = ""
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    dynamic: tuple[int, ...] = ()
    was: tuple[int, ...] | None = None
    module: str = ""
    source: str = ""
    code: str = ""
    remark: str = ""
    grid: str = ""


@dataclass(frozen=True)
class WeightRecord:
    """One weight: its shape and a fingerprint, never its data.

    Attributes:
        name: The fully qualified name.
        shape: The shape.
        dtype: The short dtype.
        was: The original shape, where a pass sliced it.
        trained: Whether it is a parameter.
        hash: Eight hexadecimal digits of its bytes; empty if not asked for.
        low: The smallest value.
        high: The largest value.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    was: tuple[int, ...] | None = None
    trained: bool = True
    hash: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class NoteRecord:
    """One `narrows.ir.program.Note`, as plain data."""

    where: str
    reason: str
    message: str
    channels: int = 0
    source: str = ""


@dataclass(frozen=True)
class Snapshot:
    """One program.

    Attributes:
        name: The model's name.
        history: The passes that made it.
        nodes: The nodes in execution order, without those that only name a weight.
        weights: The weights by name.
        notes: What the capture and the passes had to say.
    """

    name: str
    history: tuple[str, ...] = ()
    nodes: tuple[NodeRecord, ...] = ()
    weights: dict[str, WeightRecord] = field(default_factory=dict)
    notes: tuple[NoteRecord, ...] = ()

    @property
    def parameter_count(self) -> int:
        """How many numbers are trained."""
        return sum(math.prod(w.shape) for w in self.weights.values() if w.trained)

    def node(self, name: str) -> NodeRecord | None:
        """Return the node called ``name``, or ``None``."""
        return next((n for n in self.nodes if n.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """Return the snapshot as JSON values; what is empty is left out."""
        return {
            "name": self.name,
            "history": list(self.history),
            "nodes": [_compact(n) for n in self.nodes],
            "weights": [_compact(w) for w in self.weights.values()],
            "notes": [_compact(n) for n in self.notes],
        }

    @staticmethod
    def from_json(data: Any) -> Snapshot:
        """Return the snapshot that `to_json` wrote; `ValueError` for other data."""
        made = fit(data, SnapshotFile)
        weights = {w.name: w for w in made.weights}
        return Snapshot(made.name, made.history, made.nodes, weights, made.notes)


class SnapshotFile(msgspec.Struct):
    """What the file of a snapshot holds."""

    name: str
    history: tuple[str, ...]
    nodes: tuple[NodeRecord, ...]
    weights: list[WeightRecord]
    notes: tuple[NoteRecord, ...]


def _compact(record: Any) -> dict[str, Any]:
    """Return a record's fields that are not at their default; an empty shape is a scalar's."""
    defaults = {f.name: f.default for f in dataclasses.fields(record)}
    values = {k: getattr(record, k) for k in defaults}
    return {k: v for k, v in values.items() if v != defaults[k] or v is dataclasses.MISSING}


# ------------------------------------------------------------------ taking one


def snapshot(program: Program, *, contents: bool = False) -> Snapshot:
    """Return a snapshot of a program.

    Args:
        program: The program.
        contents: Whether to read the weights for their hash and range.
    """
    return Snapshot(
        name=program.name,
        history=program.history,
        nodes=tuple(_node(program, n) for n in program.graph.nodes if n.op != "get_attr"),
        weights={n: _weight(program, n, contents) for n in program.weights},
        notes=tuple(NoteRecord(**dataclasses.asdict(n)) for n in program.notes),
    )


def dtype_name(dtype: torch.dtype | None) -> str:
    """Return the short name of a dtype."""
    long = str(dtype).removeprefix("torch.")
    return "" if dtype is None else DTYPES.get(long, long)


def _weight(program: Program, name: str, contents: bool) -> WeightRecord:
    tensor = program.weights[name]
    origin = program.origins.get(name)
    was = tuple(origin.shape) if origin is not None else None
    record = WeightRecord(
        name,
        tuple(tensor.shape),
        dtype_name(tensor.dtype),
        was if was != tuple(tensor.shape) else None,
        name not in program.buffers,
    )
    if not contents:
        return record
    hash_, low, high = fingerprint(tensor)
    return dataclasses.replace(record, hash=hash_, low=low, high=high)


def fingerprint(tensor: torch.Tensor) -> tuple[str, float | None, float | None]:
    """Return a hash of a tensor's bytes, its smallest and its largest value."""
    import torch

    data = tensor.detach().cpu().contiguous()
    digest = f"{zlib.crc32(data.reshape(-1).view(torch.uint8).numpy().data):08x}"
    if data.numel() == 0 or data.is_complex():
        return digest, None, None
    numbers = data.to(torch.uint8) if data.dtype is torch.bool else data
    low, high = (float(v) for v in torch.aminmax(numbers))
    return digest, low, high


def _node(program: Program, node: fx.Node) -> NodeRecord:
    from narrows.ir.meta import Meta, op_name
    from narrows.ir.program import Mark

    meta, mark = Meta(node), program.marks.get(node.name, Mark())
    reads = node.all_input_nodes
    weights = [str(n.target) for n in reads if n.op == "get_attr"]
    shape = None if meta.shape is None else tuple(int(s) for s in meta.shape)
    was = None if mark.was is None else tuple(int(s) for s in mark.was)
    return NodeRecord(
        name=node.name,
        op={"placeholder": "input", "output": "output"}.get(node.op) or op_name(node),
        inputs=tuple(n.name for n in reads if n.op != "get_attr"),
        weights=tuple(dict.fromkeys(weights)),
        args=_state(program, node) or _arguments(node),
        shape=shape,
        dtype=dtype_name(meta.dtype),
        dynamic=tuple(meta.dynamic),
        was=was if was != shape else None,
        module=meta.module,
        source=meta.source,
        code=meta.code,
        remark=mark.remark,
        grid="" if meta.grid is None else str(meta.grid),
    )


def _state(program: Program, node: fx.Node) -> str:
    """Return which output goes in again at an input, if one does."""
    found = [s.output for s in program.states if node.op == "placeholder" and s.name == node.name]
    return "".join(f"state of output {output}" for output in found)


def _arguments(node: fx.Node) -> str:
    """Return the arguments: what is read first, in order, then the literals that are no default."""
    if node.op == "placeholder":
        return ""
    if node.op == "output":
        return " ".join(_value(node, v) for v in node.args[0])  # type: ignore[union-attr]
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return " ".join(_value(node, v) for v in node.args)
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False))
    given.update(node.kwargs)
    reads, literals = [], []
    for argument in schema.arguments:
        if argument.name not in given:
            continue
        value = given[argument.name]
        text = _value(node, value)
        if "Tensor" in str(argument.type):
            reads += [text] if value is not None else []
        elif argument.name in UNTOLD:
            continue
        elif not argument.has_default_value() or not _is_default(argument.default_value, value):
            literals.append(f"{argument.name}={text}")
    return " ".join(reads + literals)


def _runs(values: list[str]) -> list[str]:
    """Return a list in which a long run of equal values stands once, with its length: ``7*64``."""
    if len(values) <= 8:
        return values
    runs = [(value, len(list(equal))) for value, equal in itertools.groupby(values)]
    return [v if count == 1 else f"{v}*{count}" for v, count in runs]


def _is_default(default: Any, value: Any) -> bool:
    if isinstance(value, list | tuple) and isinstance(default, list | tuple):
        return list(default) == list(value)
    return type(default) is type(value) and default == value


def _value(node: fx.Node, value: Any) -> str:
    """Return one argument as text; a weight as a field that the printer fills with its shape."""
    from torch import fx

    if isinstance(value, fx.Node):
        if value.op != "get_attr":
            return value.name
        names = dict.fromkeys(str(n.target) for n in node.all_input_nodes if n.op == "get_attr")
        return "{" + str(list(names).index(str(value.target))) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_runs([_value(node, v) for v in value])) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value).removeprefix("torch.")
