"""Every row of the op table is held to what its operator does.

Each sample of a row becomes a tiny program: layers make the operands, the operator runs, layers
read its results. Four laws are checked:

* *probe*: changing a channel of an operand changes exactly the result channels that the row says
  read it;
* *slice*: where readers ignore channels, the rewritten program equals the original, and what the
row
  does not need is gone;
* *constants*: operand channels that are one number make the constants that the row claims, and
  folding them changes nothing;
* *cost*: the multiply-accumulates are those that torch counts.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from narrows.errors import OpError
from narrows.ir.channels import Facts, analyse
from narrows.ir.graph import interpret
from narrows.ir.labels import Bools, Value
from narrows.ir.ops import samples, table
from narrows.ir.ops.contract import Contract
from narrows.ir.ops.mixing import Reduce, Spatial
from narrows.ir.ops.pointwise import Pointwise
from narrows.ir.ops.row import Row
from narrows.ir.ops.samples import Given, Made, Sample, Size, Weight
from narrows.ir.ops.works import elementwise
from narrows.ir.program import Meta, Program, relative_error
from narrows.ir.rewrite import rewrite
from narrows.ir.verify import verify
from narrows.passes.base import TOLERANCE, Fidelity

aten = torch.ops.aten
EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]
DOCUMENT = Path(__file__).parents[2] / "docs" / "ops.md"

INPUTS = 3  # the width of what the layers that make operands read
DRAWS = 8  # one change may vanish in a maximum or a rounding, but not every time

# The reasons a note may give for channels that stay although no result reads them.
STAY = {"statistics", "groups", "padding", "merge", "shape", "ragged", "barrier"}


def cases() -> Iterator[Any]:
    for row in table.rows():
        for i, sample in enumerate(row.samples):
            note = sample.note.replace(" ", "_")
            yield pytest.param(row, sample, id=f"{row.name}-{i}" + (f"-{note}" if note else ""))


every_sample = pytest.mark.parametrize(("row", "sample"), list(cases()))


# ------------------------------------------------------------------ the program around a sample


class Bench:
    """A sample as a program.

    Attributes:
        node: The operator's node; ``parts``: the nodes of its results.
        made: Per `Made` operand the node that holds it; the layer of the first is called ``m0``.
        values: What every node of the program was at the examples.
    """

    def __init__(self, row: Row, sample: Sample, seed: int = 0) -> None:
        self.row = row
        self.made: dict[Made, fx.Node] = {}
        self.values: dict[fx.Node, Any] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._graph = fx.Graph()
        self._weights: dict[str, Tensor] = {}
        self._examples: list[Tensor] = []
        self._inputs: list[fx.Node] = []
        self._leaves: dict[Any, fx.Node] = {}
        args, kwargs = pytree.tree_map(self._operand, (sample.args, sample.kwargs))
        self.node = self._call(row.target, *args, name="op", **kwargs)
        self.parts = [self.node]
        self.program()
        if not isinstance(self.values[self.node], Tensor):
            count = len(self.values[self.node])
            self.parts = [self._call(operator.getitem, self.node, i) for i in range(count)]

    def program(self, outputs: list[fx.Node] | None = None) -> Program:
        """Return the program that ends in ``outputs``, or in the results."""
        old = next((n for n in reversed(self._graph.nodes) if n.op == "output"), None)
        if old is not None:
            self._graph.erase_node(old)
        outputs = outputs or self.parts
        self._graph.output(tuple(outputs))
        interpret(self._graph, self._examples, self._weights, observe=self._observe)
        spec = pytree.tree_structure((tuple(self._examples), {}))
        out = pytree.tree_structure((0,) * len(outputs))
        return Program(self._graph, self._weights, spec, out, tuple(self._examples))

    def read(self, values: list[Value], masks: list[Bools] | None = None) -> Program:
        """Return the program in which a layer reads each result, but not the labels masked out."""
        outputs = []
        for i, (part, value) in enumerate(zip(self.parts, values, strict=True)):
            x = part
            if Meta(part).dtype != torch.float64:
                x = self._call(aten.to.dtype, x, torch.float64)
            if not value.axes:
                outputs.append(x)
                continue
            order = rest_first(len(value.shape), value.axes)
            labels = value.tensor.expand(value.shape).permute(order)
            labels = labels.flatten(len(order) - len(value.axes))
            weight = self.uniform((2, labels.shape[-1]), 0.5, 1.5)
            if masks is not None:
                keep = torch.from_numpy(masks[i])[labels.flatten(0, -2)[0]]
                weight[:, ~keep] = 0
            x = self._call(aten.permute.default, x, order)
            if len(value.axes) > 1:
                x = self._call(aten.reshape.default, x, list(labels.shape))
            w = self._weight(f"reader{i}.weight", weight)
            b = self._weight(f"reader{i}.bias", self.uniform((2,), 0.0, 1.0))
            outputs.append(self._call(aten.linear.default, x, w, b))
        return self.program(outputs)

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        drawn = torch.rand(shape, generator=self._generator, dtype=torch.float64)
        return low + (high - low) * drawn

    # ---------------------------------------------------------------- operands

    def _operand(self, leaf: Any) -> Any:
        if not isinstance(leaf, Made | Weight | Given | Size):
            return leaf
        if leaf not in self._leaves:
            if isinstance(leaf, Made):
                self._leaves[leaf] = self.made[leaf] = self._make(leaf, f"m{len(self.made)}")
            elif isinstance(leaf, Weight):
                self._leaves[leaf] = self._given_weight(leaf)
            elif isinstance(leaf, Given):
                data = self.uniform(leaf.shape, leaf.low, leaf.high)
                self._leaves[leaf] = self._input(data.to(leaf.dtype))
            else:
                x = self._input(self.uniform((leaf.rows, INPUTS), 0.0, 1.0))
                self._leaves[leaf] = self._call(aten.sym_size.int, x, 0)
        return self._leaves[leaf]

    def _given_weight(self, leaf: Weight) -> fx.Node:
        data = self.uniform(leaf.shape, leaf.low, leaf.high)
        if leaf.values:
            data = torch.tensor(leaf.values).reshape(leaf.shape)
        if leaf.zeros:
            data[list(leaf.zeros)] = 0
        return self._weight(f"w{len(self._weights)}", data.to(leaf.dtype))

    def _make(self, leaf: Made, name: str) -> fx.Node:
        """Return the node of a tensor, made by a linear layer, whose values fill ``low ..
        high``."""
        order = rest_first(len(leaf.shape), leaf.axes)
        sizes = [leaf.shape[a] for a in order]
        rest, width = sizes[: -len(leaf.axes)], math.prod(sizes[-len(leaf.axes) :])
        x = self._input(self.uniform((*rest, INPUTS), 0.0, 1.0))
        weight = self.uniform((width, INPUTS), 0.0, 1.0)
        weight *= (leaf.high - leaf.low) / weight.sum(1, keepdim=True)
        bias = torch.full((width,), leaf.low, dtype=torch.float64)
        w, b = self._weight(f"{name}.weight", weight), self._weight(f"{name}.bias", bias)
        y = self._call(aten.linear.default, x, w, b)
        if len(leaf.axes) > 1:
            y = self._call(aten.view.default, y, sizes)
        if order != sorted(order):
            back = [order.index(a) for a in range(len(order))]
            y = self._call(aten.contiguous.default, self._call(aten.permute.default, y, back))
        if leaf.dtype == torch.bool:
            y = self._call(aten.gt.Scalar, y, (leaf.low + leaf.high) / 2)
        elif leaf.dtype != torch.float64:
            y = self._call(aten.to.dtype, y, leaf.dtype)
        return y

    # ---------------------------------------------------------------- nodes

    def _input(self, data: Tensor) -> fx.Node:
        node = self._graph.placeholder(f"x{len(self._inputs)}")
        (self._inputs[-1] if self._inputs else self._graph._root).append(node)
        self._inputs.append(node)
        self._examples.append(data)
        return node

    def _weight(self, name: str, data: Tensor) -> fx.Node:
        self._weights[name] = data
        return self._graph.get_attr(name)

    def _call(self, target: Any, *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        return self._graph.create_node("call_function", target, args, kwargs, name=name)

    def _observe(self, node: fx.Node, value: Any) -> None:
        self.values[node] = value
        meta = Meta(node)
        if isinstance(value, Tensor):
            meta.shape, meta.dtype = tuple(value.shape), value.dtype
        elif isinstance(value, int):
            meta.size = value


def rest_first(rank: int, axes: tuple[int, ...]) -> list[int]:
    """Return the permutation that puts ``axes`` last."""
    return [a for a in range(rank) if a not in axes] + list(axes)


# ------------------------------------------------------------------ what a row says


def declared(row: Row, facts: Facts, part: fx.Node, operand: fx.Node) -> Bools:
    """Return which labels of a result read which of an operand: ``[result, operand]``."""
    flow = facts.flows[part]
    matrix = np.zeros((facts.value(part).count, facts.value(operand).count), dtype=bool)
    for read in flow.reads:
        if read.operand is not operand:
            continue
        if flow.barrier:
            matrix[:] = True
        elif read.source is not None:
            there = np.flatnonzero(read.source >= 0)
            matrix[there, read.source[there]] = True
        elif read.pairs is not None:
            matrix[read.pairs] = True
    c = table.contraction(facts, part)
    if c is not None and c.x is operand and not flow.barrier:
        _, outs, ins, _ = c.blocks.shape
        for g, o, i in np.argwhere(c.blocks.any(-1).numpy()):
            matrix[g * outs + o, flow.facts[1][:, g * ins + i]] = True
    shared = row.shared(facts, part) if row.kind == "mixing" else None
    if shared is not None:
        for number in np.unique(shared.sets):
            together = shared.labels[shared.sets == number]
            matrix[np.ix_(together, together)] = True
    return matrix


def changed_labels(value: Value, before: Tensor, after: Tensor) -> Bools:
    differs = ~torch.isclose(before, after, rtol=0, atol=0, equal_nan=True)
    found = np.zeros(value.count, dtype=bool)
    found[value.tensor.expand(value.shape)[differs].numpy()] = True
    return found


def kept(program: Program, name: str) -> set[int]:
    """Return the channels that the layer ``name`` still makes."""
    found: set[int] = set()
    for weight, data in program.weights.items():
        origin = program.origins.get(weight)
        index = origin.index[0] if origin is not None else None
        if (origin.name if origin is not None else weight) == f"{name}.weight":
            found |= set(range(len(data)) if index is None else index)
    return found


# ------------------------------------------------------------------ the laws


def probe(row: Row, sample: Sample) -> None:
    bench = Bench(row, sample)
    facts, values = analyse(bench.program()), bench.values

    def call(changes: dict[fx.Node, Tensor]) -> list[Tensor]:
        args, kwargs = fx.node.map_arg(
            (bench.node.args, bench.node.kwargs), lambda n: changes.get(n, values[n])
        )
        result = row.target(*args, **kwargs)
        return [result] if isinstance(result, Tensor) else list(result)

    base = call({})
    for made, operand in bench.made.items():
        labels = facts.value(operand).tensor.expand(made.shape)
        says = [declared(row, facts, part, operand) for part in bench.parts]
        sees = [np.zeros_like(m) for m in says]
        for channel in range(facts.value(operand).count):
            for draw in range(DRAWS):
                fresh = bench.uniform(made.shape, made.low, made.high)
                if made.dtype == torch.bool:
                    fresh = fresh > (made.low + made.high) / 2
                other = torch.where(labels == channel, fresh.to(made.dtype), values[operand])
                after = call({operand: other.contiguous()})
                for part, see, a, b in zip(bench.parts, sees, base, after, strict=True):
                    see[:, channel] |= changed_labels(facts.value(part), a, b)
                if draw and all(np.array_equal(s, t) for s, t in zip(sees, says, strict=True)):
                    break
        for part, say, see in zip(bench.parts, says, sees, strict=True):
            assert not (see & ~say).any(), f"not said to be read: {np.argwhere(see & ~say)}"
            if made.silent or facts.flows[part].barrier or getattr(row, "ordered", False):
                continue
            say[facts.value(part).known()] = False  # a constant reads nothing
            assert not (say & ~see).any(), f"not read: {np.argwhere(say & ~see)}"


def masks_of(values: list[Value]) -> Iterator[list[Bools]]:
    """Yield label masks per result: one label alone, about half, half of each of several axes."""
    draw = np.random.default_rng(1)
    alone = [np.zeros(v.count, dtype=bool) for v in values]
    chosen = alone[int(draw.integers(len(alone)))]
    chosen[int(draw.integers(len(chosen)))] = True
    yield alone
    yield [a | (draw.random(len(a)) < 0.5) for a in alone]
    axes = values[0].axes
    for axis in axes if len(axes) > 1 else ():
        masks = [a.copy() for a in alone]
        for mask, value in zip(masks, values, strict=True):
            if axis in value.axes:
                width = value.tensor.shape[axis]
                half = torch.from_numpy(draw.permutation(width)[: width // 2])
                mask[:] = False
                mask[value.tensor.index_select(axis, half).flatten()] = True
        yield masks


def skip_columns(bench: Bench, facts: Facts) -> None:
    """Zero every third column of the weight that the operator sums with, if there is one."""
    c = table.contraction(facts, bench.node)
    if c is not None and c.weight.op == "get_attr":
        c.data.index_fill_(c.in_axis, torch.arange(1, c.data.shape[c.in_axis], 3), 0.0)


def slice_law(row: Row, sample: Sample) -> None:
    bench = Bench(row, sample)
    facts = analyse(bench.program())
    could = did = False
    for turn, masks in enumerate(masks_of([facts.value(p) for p in bench.parts])):
        bench = Bench(row, sample)
        facts = analyse(bench.program())
        skip_columns(bench, facts)
        program = bench.read([facts.value(p) for p in bench.parts], masks)
        facts = analyse(program)
        result = rewritten(program, facts)
        excused = {n.reason for n in result.notes} & STAY
        if turn > 1:  # whole slabs always leave a rectangle
            excused -= {"shape", "ragged"}
        for i, operand in enumerate(bench.made.values()):
            needed = np.zeros(facts.value(operand).count, dtype=bool)
            for mask, part in zip(masks, bench.parts, strict=True):
                value = facts.value(part)
                live = (mask if value.axes else True) & ~value.known()  # one label is an output
                needed |= declared(row, facts, part, operand)[live].any(0)
            wanted, found = set(np.flatnonzero(needed).tolist()), kept(result, f"m{i}")
            assert found >= wanted, f"{wanted - found} are read but gone"
            assert excused or found == wanted, f"{found - wanted} stay without a note"
            could |= not needed.all()
            did |= len(found) < len(needed)
    assert did or not could, "nothing was removed, whatever was ignored"


def constants(row: Row, sample: Sample) -> None:
    bench = Bench(row, sample)
    facts = analyse(bench.program())
    program = bench.read([facts.value(p) for p in bench.parts])
    draw = np.random.default_rng(2)
    for share in (0.5, 1.0):
        weights = {n: t.clone() for n, t in program.weights.items()}
        for i, made in enumerate(bench.made):
            count = len(weights[f"m{i}.bias"])
            fixed = torch.from_numpy(draw.random(count) < share)
            numbers = torch.from_numpy(draw.uniform(made.low, made.high, count))
            if made.low <= 0 <= made.high:
                numbers[torch.from_numpy(draw.random(count) < 0.5)] = 0
            weights[f"m{i}.weight"][fixed] = 0
            weights[f"m{i}.bias"][fixed] = numbers[fixed]
        constant = program.replace(weights=weights)
        facts = analyse(constant)
        values: dict[fx.Node, Any] = {}
        constant.run_flat(constant.examples, observe=values.__setitem__)
        for part in bench.parts:
            value = facts.value(part)
            claims = torch.from_numpy(value.const)[value.tensor].expand(value.shape)
            known = ~claims.isnan()
            torch.testing.assert_close(
                values[part].double()[known], claims[known], rtol=EXACT, atol=EXACT
            )
        rewritten(constant, facts)


def rewritten(program: Program, facts: Facts) -> Program:
    result, _ = rewrite(facts)
    verify(result)

    def check(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor):
            said = (Meta(node).shape, Meta(node).dtype)
            assert said == (tuple(value.shape), value.dtype), f"{node} is said to be {said}"

    actual = result.run_flat(program.examples, observe=check)
    error = relative_error(actual, program.run_flat(program.examples))
    assert error <= EXACT, f"relative error {error:.1e}"
    return result


def costs(row: Row, sample: Sample) -> None:
    bench = Bench(row, sample)
    args, kwargs = fx.node.map_arg((bench.node.args, bench.node.kwargs), bench.values.__getitem__)
    # Attention's fused kernels are not counted; the one that spells it out is.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        row.target(*args, **kwargs)
    assert row.macs(bench.node) == counter.get_total_flops() / 2


@every_sample
def test_probe(row: Row, sample: Sample) -> None:
    probe(row, sample)


@every_sample
def test_slice_law(row: Row, sample: Sample) -> None:
    slice_law(row, sample)


@every_sample
def test_constants_law(row: Row, sample: Sample) -> None:
    constants(row, sample)


@pytest.mark.parametrize("row", [pytest.param(r, id=r.name) for r in table.rows() if r.costs])
def test_cost(row: Row) -> None:
    for sample in row.samples:
        costs(row, sample)


# ------------------------------------------------------------------ the table


def test_every_row_is_told_and_tried() -> None:
    rows = table.rows()
    assert [r.name for r in rows if not r.summary] == []
    assert [r.name for r in rows if not r.samples] == [], "see narrows/ir/ops/samples.py"
    summing = [r.name for r in rows if r.kind in ("contraction", "product", "attention")]
    assert [r.name for r in rows if r.costs] == summing


def test_samples_belong_to_rows() -> None:
    assert set(samples.names()) <= {row.name for row in table.rows()}


def test_a_second_row_is_refused() -> None:
    with pytest.raises(OpError, match=r"relu\.default has a row already: pointwise"):
        table.register(Reduce(target=aten.relu.default))


def test_the_document_is_fresh() -> None:
    expected = DOCUMENT.read_text(encoding="utf-8")
    assert table.to_markdown() == expected, "narrows ops --markdown > docs/ops.md"


# ------------------------------------------------------------------ the laws themselves


def image(width: int = 6) -> Made:
    return Made((2, width, 4, 4))


WRONG: dict[str, tuple[Callable[[Row, Sample], None], Row, Sample]] = {
    "a softmax is not element-wise": (
        probe,
        Pointwise(target=aten.softmax.int),
        Sample((image(), 1)),
    ),
    "a clamp between constants reads nothing": (
        probe,
        Pointwise(target=aten.clamp.default),
        Sample((image(), 3.0, 4.0)),
    ),
    "a flip moves channels": (
        slice_law,
        Pointwise(target=aten.flip.default),
        Sample((image(), [1])),
    ),
    "a sum with zero is not zero": (
        constants,
        Pointwise(target=aten.add.Tensor, absorbs=True),
        Sample((image(), image())),
    ),
    "a padded mean changes constants": (
        constants,
        Spatial(target=aten.avg_pool2d.default, trailing=2),
        Sample((image(), [3, 3], [2, 2], [1, 1])),
    ),
    "a sum is not a mean": (
        constants,
        Reduce(target=aten.sum.dim_IntList, dims="dim"),
        Sample((image(), [2, 3])),
    ),
    "addmm's weight is [in, out]": (
        slice_law,
        Contract(target=aten.addmm.default, x="mat1", weight="mat2", bias="self"),
        Sample((Weight((6,)), Made((5, 6)), Weight((6, 6)))),
    ),
    "a product costs its depth": (
        costs,
        Contract(target=aten.addmm.default, costs=lambda node: elementwise(node, "copy")),
        Sample((Weight((6,)), Made((5, 6)), Weight((6, 6)))),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rows_break_a_law(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    law, row, sample = WRONG[name]
    monkeypatch.setitem(table._ROWS, row.target, row)
    with pytest.raises((AssertionError, RuntimeError)):
        law(row, sample)
