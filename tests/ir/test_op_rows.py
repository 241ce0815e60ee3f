"""Every row of the op table is held to what its operator does.

Each sample of a row becomes a tiny program: layers make the operands, the operator runs, layers
read its results. Four laws are checked:

* *probe*: changing a channel of an operand changes exactly the result channels that the row says
  read it;
* *slice*: where readers ignore channels, the rewritten program equals the original, and what the
  row does not need is gone;
* *constants*: operand channels that are one number make the constants that the row claims, and
  folding them changes nothing;
* *cost*: the multiply-accumulates are those that torch counts.

What a row says besides is held by the laws of `tests.ir.facts`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from narrows.errors import OpError, ProgramError
from narrows.ir.channels import Facts, analyse
from narrows.ir.compare import relative_error
from narrows.ir.couplings import couplings
from narrows.ir.labels import Bools, Value
from narrows.ir.meta import Meta
from narrows.ir.ops import samples, table
from narrows.ir.ops.mixing import Reduce
from narrows.ir.ops.pointwise import Pointwise
from narrows.ir.ops.row import Row
from narrows.ir.ops.sample import Sample
from narrows.ir.program import Program, Pruning
from narrows.ir.rewrite import rewrite
from narrows.ir.verify import verify
from narrows.passes.base import TOLERANCE, Fidelity
from tests.backends.test_c_ops import program as alone
from tests.ir.bench import Bench
from tests.ir.facts import (
    affine_law,
    axes_law,
    gain_law,
    identity_law,
    integer_law,
    partial_law,
    parts_law,
    width_law,
    work_law,
)

aten = torch.ops.aten
EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]
DOCUMENT = Path(__file__).parents[2] / "docs" / "ops.md"
GUIDE = DOCUMENT.with_name("adding-an-op.md")

# A sum in another order, of numbers that are each rounded to 5e-4 and 4e-3.
NARROW = {torch.float16: 5e-3, torch.bfloat16: 4e-2}

DRAWS = 8  # one change may vanish in a maximum or a rounding, but not every time

# The reasons a note may give for channels that stay although no result reads them.
STAY = {"statistics", "groups", "padding", "merge", "shape", "ragged", "barrier"}


def cases() -> Iterator[Any]:
    for row in table.rows():
        for i, sample in enumerate(row.samples):
            note = sample.note.replace(" ", "_")
            yield pytest.param(row, sample, id=f"{row.name}-{i}" + (f"-{note}" if note else ""))


every_sample = pytest.mark.parametrize(("row", "sample"), list(cases()))


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
    result, _ = rewrite(Pruning(facts.program, facts.ignored))
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
    work = row.work(bench.node)
    assert (work.macs if work else 0) == counter.get_total_flops() / 2


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", [pytest.param(r, id=r.name) for r in table.rows() if r.samples])
def test_narrow_types(row: Row, dtype: torch.dtype) -> None:
    """Whatever torch runs in half precision is analysed, sorted into couplings and rewritten."""
    bench = Bench(row, row.samples[0])
    facts = analyse(bench.program())
    values = [facts.value(p) for p in bench.parts]
    program = bench.read(values, next(masks_of(values))).to(dtype)
    try:
        wanted = program.run_flat(program.examples)
    except ProgramError as error:
        if "not implemented for" not in str(error):
            raise
        pytest.skip(f"torch has no {dtype} kernel for {row.name} here")
    result, _ = rewrite(Pruning(program))
    verify(result)
    couplings(program)
    assert relative_error(result.run_flat(program.examples), wanted) <= NARROW[dtype]


# ------------------------------------------------------------------ what a row says besides


def rows(wanted: Callable[[Row], bool]) -> list[Any]:
    return [pytest.param(row, id=row.name) for row in table.rows() if wanted(row)]


@pytest.mark.parametrize("row", rows(lambda row: isinstance(row, Pointwise)))
def test_partial(row: Pointwise) -> None:
    partial_law(row)


@pytest.mark.parametrize("row", rows(lambda row: True))
def test_any_width(row: Row) -> None:
    width_law(row)


@pytest.mark.parametrize("row", rows(lambda row: not row.costs))
def test_kind_of_work(row: Row) -> None:
    work_law(row)


@pytest.mark.parametrize("row", rows(lambda row: row.identity is not None))
def test_identity(row: Row) -> None:
    identity_law(row)


@pytest.mark.parametrize("row", rows(lambda row: bool(row.parts)))
def test_parts(row: Row) -> None:
    parts_law(row)


@pytest.mark.parametrize("row", rows(lambda row: bool(getattr(row, "parameters", ()) or row.gain)))
def test_gain(row: Row) -> None:
    gain_law(row)


@pytest.mark.parametrize("row", rows(lambda row: row.affine))
def test_affine(row: Row) -> None:
    affine_law(row)


@pytest.mark.parametrize("row", rows(lambda row: getattr(row, "keeps_axes", False)))
def test_axes(row: Row) -> None:
    axes_law(row)


@pytest.mark.parametrize("row", rows(lambda row: row.integer is not None))
def test_integer_form(row: Row) -> None:
    try:
        integer_law(row, alone)
    except NotImplementedError as error:
        pytest.skip(f"torch has no kernel for codes: {error}")


# ------------------------------------------------------------------ the table


def test_every_row_is_told_and_tried() -> None:
    rows = table.rows()
    assert [r.name for r in rows if not r.summary] == []
    assert [r.name for r in rows if not r.samples] == [], "see narrows/ir/ops/samples.py"
    summing = [r.name for r in rows if r.kind in ("contraction", "product", "attention")]
    assert [r.name for r in rows if r.costs] == summing


def test_every_trait_is_explained() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    fields = {f.name for f in dataclasses.fields(Row)} - {"target", "summary", "samples"}
    kinds = {n for n, v in vars(Row).items() if isinstance(v, bool)} - fields
    assert [name for name in (*fields, *kinds) if f"`{name}`" not in text] == []


def test_samples_belong_to_rows() -> None:
    assert set(samples.names()) <= {row.name for row in table.rows()}


def test_a_second_row_is_refused() -> None:
    with pytest.raises(OpError, match=r"relu\.default has a row already: pointwise"):
        table.register(Reduce(target=aten.relu.default))


def test_the_document_is_fresh() -> None:
    expected = DOCUMENT.read_text(encoding="utf-8")
    assert table.to_markdown() == expected, "narrows ops --markdown > docs/ops.md"
