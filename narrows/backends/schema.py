"""What a manifest may hold: the schema that each is held to before anything of it is used.

Unknown keys are let pass: an artifact of a newer narrows is read as far as it is understood.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import msgspec

from narrows.backends.structure import Structure
from narrows.files.quoting import is_prefix
from narrows.files.reading import Count, Exponent, fit

DTYPES = (
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64",
    "float16", "bfloat16", "float32", "float64", "complex64", "complex128",
)  # fmt: skip

Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
# A file beside the manifest: neither hidden nor anywhere else.
NAME = r"^[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*$"
FileName = Annotated[str, msgspec.Meta(pattern=NAME, max_length=200)]
Axis = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Code = Annotated[int, msgspec.Meta(ge=-(2**15), le=2**16 - 1)]


class FileRecord(msgspec.Struct):
    """A file: its size in bytes and its SHA-256."""

    size: Count
    sha256: Digest


class Spec(msgspec.Struct):
    """A tensor that goes in or comes out; see `narrows.backends.artifact.TensorSpec`."""

    name: str
    shape: list[Axis | str]
    dtype: Literal[DTYPES]  # type: ignore[valid-type]


class Leaf(msgspec.Struct):
    """A flat input or output: one of these; see `narrows.backends.leaves.Leaves`."""

    tensor: Count | msgspec.UnsetType = msgspec.UNSET
    input: Count | msgspec.UnsetType = msgspec.UNSET
    value: bool | int | float | str | msgspec.UnsetType | None = msgspec.UNSET
    number: bool = False


class Nesting(msgspec.Struct):
    """How a call's arguments and its result nest."""

    inputs: Any
    outputs: Any
    input_leaves: list[Leaf]
    output_leaves: list[Leaf]


class StateRecord(msgspec.Struct):
    """An input that is handed back an output; see `narrows.ir.states.State`."""

    name: str
    output: Count
    axes: list[Count]
    whole: list[Axis]
    sizes: list[Axis]
    kept: list[Count] | None


class NoteRecord(msgspec.Struct):
    """A `narrows.ir.program.Note`."""

    where: str
    reason: str
    message: str
    channels: Count
    source: str


class Checked(msgspec.Struct):
    """What one comparison found."""

    batch: Count
    inputs: Count
    error: float


class Fidelity(msgspec.Struct):
    """How far the artifact was from the program."""

    tolerance: float
    checked: list[Checked]


class CPort(msgspec.Struct):
    """How a tensor of a C model lies in memory, and what its codes stand for."""

    order: list[Count]
    codes: tuple[Exponent, Code, Code, Code] | None
    rounding: Literal["half_even", "half_up"]
    powers: list[Exponent] = []
    axis: Count = 0


class CPart(msgspec.Struct):
    """What a session of a C model needs to know."""

    inputs: list[CPort]
    outputs: list[CPort]


class Device(msgspec.Struct):
    """What a TVM library runs on."""

    name: str
    runs_on: Literal["cpu", "cuda"]
    runs_here: bool


class Manifest(msgspec.Struct):
    """What every artifact tells of itself."""

    narrows: str
    target: str
    name: str
    inputs: list[Spec]
    outputs: list[Spec]
    structure: Nesting
    passes: list[str]
    versions: dict[str, str]
    files: dict[FileName, FileRecord]
    fidelity: dict[str, Any]
    notes: list[NoteRecord]
    options: dict[str, bool | int | float | str | list[Any] | None] = {}
    plan: dict[str, Any] | None = None
    golden: dict[str, list[Digest]] = {}
    dump: dict[FileName, FileRecord] = {}
    c: CPart | None = None
    device: Device | None = None
    islands: list[Spec] = []
    states: list[StateRecord] = []


# Target -> the keys that its session needs.
NEEDED: dict[str, tuple[str, ...]] = {"c": ("c",), "tvm": ("device",)}


def check_manifest(data: Mapping[str, Any]) -> None:
    """Raise `ValueError`, which says where, unless a manifest is what its readers rely on."""
    made = fit(data, Manifest)
    if data["fidelity"]:
        fit(data["fidelity"], Fidelity)
    for key in NEEDED.get(made.target, ()):
        if data.get(key) is None:
            raise ValueError(f"an artifact of the target {made.target} has {key!r}")
    if any(len(digests) != len(made.outputs) for digests in made.golden.values()):
        raise ValueError("golden: there is one digest per output")
    _check_names("inputs", made.inputs)
    _check_structure(made)
    for state in made.states:
        _check_state(state)
    if made.target == "c" and made.c is not None:
        _check_c(made, made.c)


def _check_names(side: str, specs: list[Spec]) -> None:
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise ValueError(f"{side}: two have the same name")


def _check_structure(made: Manifest) -> None:
    """Hold the flat inputs and outputs to what nests around them, and to what they point at."""
    nesting = made.structure
    call = Structure.from_json(nesting.inputs)
    if call.kind != "tuple" or [c.kind for c in call.children] != ["tuple", "dict"]:
        raise ValueError("structure.inputs: it is a tuple of arguments and a dict of named ones")
    result = Structure.from_json(nesting.outputs)
    for side, tree, leaves in (
        ("input", call, nesting.input_leaves), ("output", result, nesting.output_leaves),
    ):  # fmt: skip
        if sum(1 for _ in tree.leaves()) != len(leaves):
            raise ValueError(f"structure.{side}s: it has another number of leaves")
    if [leaf.tensor for leaf in _tensors(nesting.input_leaves)] != list(range(len(made.inputs))):
        raise ValueError("structure.input_leaves: each input stands there once, in order")
    for leaf in nesting.output_leaves:
        _check_leaf(leaf, made)


def _check_state(state: StateRecord) -> None:
    axes, places = state.axes, math.prod(state.whole)
    if not axes or axes != sorted({*axes}) or not len(axes) == len(state.whole) == len(state.sizes):
        raise ValueError(f"states: {state.name} has one size per axis, and its axes ascend")
    count, kept = math.prod(state.sizes), state.kept
    if kept is None:
        fits = state.sizes == state.whole
    else:
        fits = len({*kept}) == len(kept) == count and max(kept, default=-1) < places
    if not fits:
        raise ValueError(f"states: {state.name} keeps as many places as it has, of the whole ones")


def _tensors(leaves: Iterable[Leaf]) -> list[Leaf]:
    for leaf in leaves:
        if leaf.tensor is msgspec.UNSET and leaf.value is msgspec.UNSET:
            raise ValueError("structure.input_leaves: a leaf is a tensor or a value")
    return [leaf for leaf in leaves if leaf.tensor is not msgspec.UNSET]


def _check_leaf(leaf: Leaf, made: Manifest) -> None:
    given = [v for v in (leaf.tensor, leaf.input, leaf.value) if v is not msgspec.UNSET]
    if not given:
        raise ValueError("structure.output_leaves: a leaf is a tensor, an input or a value")
    for value, specs in ((leaf.tensor, made.outputs), (leaf.input, made.inputs)):
        if isinstance(value, int) and value >= len(specs):
            raise ValueError(f"structure.output_leaves: there is no tensor {value}")


def _check_c(made: Manifest, part: CPart) -> None:
    prefix = made.options.get("prefix")
    if not isinstance(prefix, str) or not is_prefix(prefix):
        raise ValueError("options.prefix: it is a name in C")
    _check_ports("inputs", part.inputs, made.inputs)
    _check_ports("outputs", part.outputs, made.outputs)


def _check_ports(side: str, ports: list[CPort], specs: list[Spec]) -> None:
    if len(ports) != len(specs):
        raise ValueError(f"c.{side}: there is one per tensor")
    for port, spec in zip(ports, specs, strict=True):
        if sorted(port.order) != list(range(len(spec.shape))):
            raise ValueError(f"c.{side}: an order names every axis once")
        if any(isinstance(size, str) for size in spec.shape):
            raise ValueError(f"{side}: a C model has no free axes")
        if spec.dtype.startswith("float") and port.codes is None:
            raise ValueError(f"c.{side}: numbers have codes")
        if port.powers and [len(port.powers)] != spec.shape[port.axis : port.axis + 1]:
            raise ValueError(f"c.{side}: there is a power per index of an axis")
