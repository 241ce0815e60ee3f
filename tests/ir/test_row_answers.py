"""What rows and integer forms answer about a node: its work, its barriers, what scales through."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx

from narrows.ir.channels import analyse
from narrows.ir.compare import relative_error
from narrows.ir.ops import table
from narrows.ir.ops.args import settled_arguments
from narrows.ir.ops.mixing import Reduce
from narrows.ir.ops.row import Row
from narrows.ir.program import Program
from narrows.ir.work import Work
from tests.backends.test_c_ops import program
from tests.builder import Builder, aten, ramp
from tests.ir.bench import Bench
from tests.ir.test_op_rows import rewritten

# ------------------------------------------------------------------ the work


def work_of(target: Any, shape: tuple[int, ...], *args: Any) -> Work:
    b = Builder(shape)
    node = b.call(target, b.inputs[0], *args)
    b.program(node)
    found = table.find(node)
    assert found is not None
    work = found.work(node)
    assert work is not None
    return work


def test_the_work_of_what_reads_more_than_it_makes() -> None:
    image = (2, 6, 9, 8)
    work = work_of(aten.max_pool2d.default, image, [3, 2], [2, 2])
    assert work == Work(
        "pool", "max_pool2d", 2, 6, 6, kernel=(3, 2), stride=(2, 2), space=(4, 4), source=(9, 8)
    )
    work = work_of(aten.sum.dim_IntList, image, [2, 3])
    assert work == Work("reduce", "sum", 2, 6, 6, source=(9, 8))
    work = work_of(aten.slice.Tensor, image, 1, 1, 5)
    assert work == Work("slice", "slice", 2, 6, 4, space=(9, 8), source=(9, 8))
    work = work_of(aten.relu.default, image)
    assert work == Work("pointwise", "relu", 2, 6, 6, space=(9, 8))
    index = torch.tensor([0, 2])
    b = Builder((2, 5, 6))
    node = b.call(aten.index_select.default, b.inputs[0], 2, b.weight("index", index))
    b.program(node)
    row: Any = table.find(node)
    assert row.work(node) == Work("pick", "index_select", 2, 6, 2, space=(5,), source=(5,))


# ------------------------------------------------------------------ parameters that are computed


@pytest.mark.parametrize("computed", [0, 1])
@pytest.mark.parametrize(
    ("target", "before"), [(aten.group_norm.default, [2]), (aten.layer_norm.default, [[6]])]
)
def test_a_norm_by_computed_numbers_is_a_barrier(
    target: Any, before: list[Any], computed: int
) -> None:
    b = Builder((2, 6), (6,))
    parameters = [b.weight("weight", ramp(6)), b.weight("bias", ramp(6))]
    parameters[computed] = b.relu(b.inputs[1])
    node = b.call(target, b.inputs[0], *before, *parameters)
    flow = analyse(b.program(node)).flows[node]
    assert flow.barrier == "its parameters are computed, not weights"


# ------------------------------------------------------------------ what a factor passes through


CAREFUL = {"rrelu.default"}  # a factor passes through it, which it does not say


def one_operand(row: Row) -> Iterator[tuple[Program, bool]]:
    """Yield a row's samples that work on the codes of one operand, and whether a factor of it is
    said to be one of the result."""
    for sample in row.samples if row.integer is not None else ():
        made = program(row, sample)
        node = next(n for n in made.nodes if n.target is row.target)
        form = table.integer_form(node)
        if form is None or form.obstacle(node) or form.weights(node) is not None:
            continue
        floats = all(x.is_floating_point() for x in made.examples)
        if floats and len(made.examples) == len(form.operands(node)) == 1:
            yield made, form.homogeneous(node)


def test_a_factor_passes_through_what_says_so_and_nothing_else() -> None:
    answers = set()
    for row in table.rows():
        for made, said in one_operand(row):
            (x,) = made.examples
            if row.name in CAREFUL or not made.run_flat([x])[0].is_floating_point():
                continue
            both = [made.run_flat([x * 4.0]), [y * 4.0 for y in made.run_flat([x])]]
            assert (relative_error(*both) < 1e-5) == said, row.name
            answers.add(said)
    assert answers == {True, False}


# ------------------------------------------------------------------ attention


def attended(b: Builder, *operands: fx.Node | None) -> str:
    node = b.call(aten.scaled_dot_product_attention.default, *operands)
    return analyse(b.program(node)).flows[node].barrier


def test_attention_by_weights_or_along_channels_is_a_barrier() -> None:
    b = Builder((2, 4, 6))
    key = b.weight("key", ramp(2, 4, 6))
    assert attended(b, b.inputs[0], key, b.inputs[0]) == "query, key or value is a weight"
    b = Builder((2, 4, 6))
    made = b.call(aten.linear.default, b.inputs[0], b.weight("w", ramp(6, 6)))
    turned = b.call(aten.permute.default, made, [0, 2, 1])
    assert attended(b, turned, turned, turned) == "channels lie on the sequence axis"
    b = Builder((2, 4, 4))
    made = b.call(aten.linear.default, b.inputs[0], b.weight("w", ramp(4, 4)))
    assert attended(b, made, made, made, made) == "its mask depends on channels"
    b = Builder((2, 4, 6))
    made = b.call(aten.linear.default, b.inputs[0], b.weight("w", ramp(6, 6)))
    assert attended(b, made, made, made) == ""


# ------------------------------------------------------------------ integer forms


# Operators without one, by the reason. Whether the form of another is right, its law says.
FLOATS = {
    "a pass before quantization takes it apart": """
        batch_norm.default scaled_dot_product_attention.default""",
    "it makes numbers of no operand": """
        arange.start_step eye.m full.default linspace.default""",
    "it is of truth values, which are no codes": """
        all.dim any.dim bitwise_and.Tensor bitwise_not.default
        bitwise_or.Tensor bitwise_xor.Tensor logical_and.default logical_or.default
        logical_xor.default""",
    "nobody has written it": """
        addcdiv.default addcmul.default atan2.default cumprod.default
        cumsum.default fmod.Tensor glu.default lerp.Scalar lerp.Tensor log_softmax.int
        logaddexp.default logsumexp.default pow.Tensor_Tensor prod.dim_int remainder.Tensor
        rot90.default std.correction unfold.default var.correction""",
    "its result is numbers of places, which are no codes": """
        argmax.default argmin.default argsort.default argsort.stable""",
    "where it reads follows from codes only once it runs": """
        col2im.default cummax.default cummin.default gather.default grid_sampler.default
        im2col.default index.Tensor kthvalue.default max.dim median.dim min.dim scatter.src
        scatter.value scatter_add.default sort.default sort.stable take_along_dim.default
        topk.default""",
}


def test_what_has_no_integer_form_has_a_reason() -> None:
    """A form that goes away leaves an operator floating-point, which nothing else would notice."""
    without = [row.name for row in table.rows() if row.integer is None]
    assert sorted(without) == sorted(" ".join(FLOATS.values()).split())


# ------------------------------------------------------------------ zero among others


@pytest.mark.parametrize(
    "row", [pytest.param(r, id=r.name) for r in table.rows() if isinstance(r, Reduce)]
)
def test_a_zero_counts_where_all_others_are_of_one_sign(row: Reduce) -> None:
    """Where it is the largest or the smallest of all, or the only one that is not like them."""
    for sample, sign in itertools.product(row.samples, (-1.0, 1.0)):
        bench = Bench(row, sample)
        facts = analyse(bench.program())
        program = bench.read([facts.value(p) for p in bench.parts])
        weights = {n: t.clone() for n, t in program.weights.items()}
        weights["m0.weight"] *= 0.1
        weights["m0.bias"] = torch.full_like(weights["m0.bias"], 3.0 * sign)
        weights["m0.weight"][0], weights["m0.bias"][0] = 0.0, 0.0
        changed = program.replace(weights=weights)
        rewritten(changed, analyse(changed))  # compares the numbers


# ------------------------------------------------------------------ arguments and barriers


def test_a_number_among_tensors_is_settled_at_the_examples_value() -> None:
    b = Builder((2, 4, 6))
    size = b.call(aten.sym_size.int, b.inputs[0], 0)
    part = b.call(aten.slice.Tensor, b.inputs[0], 1, 0, size)
    b.program(part)
    assert settled_arguments(part)["end"] == 2


def test_what_has_no_row_is_told_beside_weights_too() -> None:
    b = Builder((2, 4))
    made = b.call(aten.hypot.default, b.inputs[0], b.weight("w", ramp(4)))
    free = b.call(aten.hypot.default, b.weight("w", ramp(4)), b.weight("v", ramp(4)))
    found = table.missing(b.program(b.call(aten.add.Tensor, made, free)))
    assert {name: len(places) for name, places in found.items()} == {"hypot.default": 1}


def test_what_has_no_elements_is_a_barrier() -> None:
    b = Builder((2, 4, 6))
    made = b.call(aten.linear.default, b.inputs[0], b.weight("w", ramp(6, 6)))
    none = b.call(aten.slice.Tensor, made, 1, 2, 2)
    facts = analyse(b.program(b.call(aten.neg.default, none)))
    assert "without elements" in facts.flows[none].barrier


def test_a_fold_whose_places_are_channels_is_a_barrier_that_shares_nothing() -> None:
    b = Builder((2, 4, 6))
    made = b.call(aten.linear.default, b.inputs[0], b.weight("w", ramp(6, 6)))
    image = b.call(aten.col2im.default, made, [3, 4], [2, 2], [1, 1], [0, 0], [1, 1])
    facts, row = analyse(b.program(image)), table.find(image)
    assert facts.flows[image].barrier
    assert row is not None
    assert row.shared(facts, image) is None


@pytest.mark.parametrize("keep", [False, True])
def test_a_sum_over_channels_leaves_out_what_is_zero(keep: bool) -> None:
    weight, bias = ramp(6, 5) + 2, ramp(6) + 2
    weight[1:4], bias[1:4] = 0.0, 0.0
    b = Builder((2, 4, 5))
    made = b.call(aten.linear.default, b.inputs[0], b.weight("w", weight), b.weight("b", bias))
    program = b.program(b.call(aten.sum.dim_IntList, made, [-1], keep))
    assert rewritten(program, analyse(program)).weights["w"].shape == (3, 5)
