"""`ChooseKernels`: operators are spelled as the target computes them fastest.

A runtime picks its kernel by how an operator is called, and the same function can be called in
several ways. The costs say which of them is fastest (`Costs.spelling`):

* ``dilated``: a 1x1 convolution with a dilation, which means nothing for a window of one. Eager
  PyTorch then takes oneDNN in place of a product of matrices, on one thread.
* ``channels-last``: a pooling between two changes of the memory format. Eager PyTorch computes it
  over registers of channels.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from narrows.ir.costs import CHANNELS_LAST, DILATED, Costs
from narrows.ir.meta import Meta, copy_meta, shape_of
from narrows.ir.ops import dialect
from narrows.ir.ops.args import arguments, changed, first_tensor
from narrows.ir.program import Program
from narrows.ir.work import CONVOLUTIONS
from narrows.ir.workload import work_of
from narrows.passes.base import Fidelity, Note, Pass, PassResult
from narrows.passes.legalize_reads import table_of


@dataclass(frozen=True)
class ChooseKernels(Pass):
    """Spells 1x1 convolutions and poolings as the target has the fastest kernel for them.

    The costs are those of float32; what has another dtype stays as it is.

    Attributes:
        costs: The target's cost table, or the path of a saved one; without it nothing is done.
        batch: The number of examples to choose for.
    """

    name: ClassVar[str] = "choose-kernels"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    costs: Costs | str | os.PathLike | None = None
    batch: int = 1

    def run(self, program: Program) -> PassResult:
        """Return the program with the spellings chosen; a note per spelling counts them."""
        table = table_of(self.costs, self.name)
        if table is None or not table.has_spellings:
            why = "it was given no costs of a target that has other kernels"
            return PassResult(program, False, (Note(program.name, "idle", why),))
        chosen = {n.name: s for n in program.graph.nodes if (s := self._chosen(table, n))}
        if not chosen:
            return PassResult(program, False)
        result = program.copy()
        for node in [n for n in result.graph.nodes if n.name in chosen]:
            SPELLINGS[chosen[node.name]](node)
        counts = Counter(chosen.values())
        notes = [
            Note(program.name, s, f"{n} {SPELLED[s]}: the target has a faster kernel for that")
            for s, n in sorted(counts.items())
        ]
        return PassResult(result, True, tuple(notes))

    def _chosen(self, table: Costs, node: fx.Node) -> str:
        """Return the faster spelling of a node, empty where it stays."""
        work = work_of(node)
        if work is None or work.kind not in (*CONVOLUTIONS, "pool"):
            return ""
        if Meta(node).dtype != torch.float32 or len(shape_of(node)) != 4:
            return ""
        spelling = table.spelling(work.resized(batch=self.batch))
        return spelling if spelling and not _is_spelled(node, spelling) else ""


def _is_spelled(node: fx.Node, spelling: str) -> bool:
    """Whether a node has the spelling already, or another one of its own."""
    if spelling == DILATED:
        return set(arguments(node)["dilation"]) != {1}
    return first_tensor(node).target is dialect.CONTIGUOUS


def _dilate(node: fx.Node) -> None:
    node.args, node.kwargs = changed(node, {"dilation": [2, 2]})


def _lay_out(node: fx.Node) -> None:
    """Put a pooling between two changes of the memory format."""
    before = first_tensor(node)
    graph = node.graph
    with graph.inserting_before(node):
        turned = graph.create_node(
            "call_function", dialect.CONTIGUOUS, (before,),
            {"memory_format": torch.channels_last}, name=f"{node.name}_last",
        )  # fmt: skip
    with graph.inserting_after(node):
        name = f"{node.name}_first"
        back = graph.create_node("call_function", dialect.CONTIGUOUS, (node,), name=name)
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
    node.replace_input_with(before, turned)
    for made, like in ((turned, before), (back, node)):
        copy_meta(node, made)
        Meta(made).shape, Meta(made).dtype = shape_of(like), Meta(like).dtype
        Meta(made).dynamic = Meta(like).dynamic


SPELLED = {
    DILATED: "1x1 convolutions are dilated",
    CHANNELS_LAST: "poolings have their channels last",
}
SPELLINGS: dict[str, Callable[[fx.Node], Any]] = {DILATED: _dilate, CHANNELS_LAST: _lay_out}
