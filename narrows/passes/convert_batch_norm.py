"""`ConvertBatchNorm`: a batch norm that folds into nothing becomes a depthwise 1x1 convolution.

With ``scale = gamma / sqrt(var + eps)`` per channel, ``norm(x) = scale x + (beta - scale mean)``.
Integer programs have kernels for that and none for a norm; DenseNet's pre-activation norms need it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from narrows.ir.meta import Meta, copy_meta, shape_of
from narrows.ir.ops import dialect, table
from narrows.ir.ops.args import arguments
from narrows.ir.program import Draft, Program
from narrows.passes.base import Fidelity, Pass, PassResult


@dataclass(frozen=True)
class ConvertBatchNorm(Pass):
    """Turns every batch norm in eval mode over 3 to 5 axes into a depthwise 1x1 convolution."""

    name: ClassVar[str] = "convert-batch-norm"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def run(self, program: Program) -> PassResult:
        """Return the program with its batch norms converted."""
        result = program.copy()
        norms = [n for n in result.graph.nodes if _fits(n)]
        for norm in norms:
            _convert(result, norm)
        return PassResult(result if norms else program, bool(norms))


def _fits(node: fx.Node) -> bool:
    if not table.is_affine(node):
        return False
    given = arguments(node)
    statistics = [given[k] for k in ("weight", "bias", "running_mean", "running_var")]
    known = all(s is None or s.op == "get_attr" for s in statistics)
    fixed = not given["training"] and given["running_mean"] is not None
    return known and fixed and len(shape_of(node)) in dialect.CONVOLUTION


def _convert(program: Draft, norm: fx.Node) -> None:
    """Replace a norm."""
    given = arguments(norm)
    like = program.tensor(given["running_var"])

    def of(role: str, default: float) -> Tensor:
        source = given[role]
        tensor = torch.full_like(like, default) if source is None else program.tensor(source)
        return tensor.detach().double()

    scale = of("weight", 1.0) / torch.sqrt(of("running_var", 1.0) + given["eps"])
    shift = of("bias", 0.0) - scale * of("running_mean", 0.0)
    rank = len(shape_of(norm))
    path = str(given["running_var"].target).rpartition(".")[0]
    weight = _put(program, norm, f"{path}.scale", scale.view(-1, *[1] * (rank - 1)), like.dtype)
    bias = _put(program, norm, f"{path}.shift", shift, like.dtype)
    one = [1] * (rank - 2)
    args: Any = (given["input"], weight, bias, one, [0] * (rank - 2), one, len(scale))
    with program.graph.inserting_before(norm):
        made = program.graph.create_node("call_function", dialect.CONVOLUTION[rank], args, {})
    copy_meta(norm, made)
    Meta(made).shape, Meta(made).dtype = shape_of(norm), Meta(norm).dtype
    norm.replace_all_uses_with(made)
    sources = norm.all_input_nodes
    name = norm.name
    program.graph.erase_node(norm)
    made._rename(name)  # whoever looks for the norm finds what became of it
    for source in sources:
        if source.op == "get_attr" and not source.users:
            program.graph.erase_node(source)
            del program.weights[str(source.target)]
    program.buffers = program.buffers & program.weights.keys()
    program.stored = program.stored & program.weights.keys()
    program.aliases = {a: n for a, n in program.aliases.items() if n in program.weights}


def _put(program: Draft, before: fx.Node, base: str, tensor: Tensor, dtype: torch.dtype) -> Any:
    name, count = base, 1
    while name in program.weights or name in program.aliases:
        name, count = f"{base}_{count}", count + 1
    program.weights[name] = tensor.to(dtype)
    with program.graph.inserting_before(before):
        node = program.graph.get_attr(name)
    copy_meta(before, node)
    Meta(node).dynamic = ()
    Meta(node).shape, Meta(node).dtype = tuple(tensor.shape), dtype
    return node
