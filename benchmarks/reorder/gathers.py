"""A selection of channels, spelled as one gather or as slices that are put together."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import fx

from narrows.ir.meta import Meta, copy_meta
from narrows.ir.program import Program, aten


def gathered(program: Program) -> Program:
    """Return the program with ``x[:, [channels]]`` as `index_select`.

    ONNX has one operator for that; exporters turn the index into two transposes around another.
    """
    program = program.copy()
    for node in list(program.graph.nodes):
        if node.target is not aten.index.Tensor:
            continue
        x, index = node.args
        places = [i for i in index if i is not None]
        if len(places) == 1 and _is_list(program, places[0]):
            node.target = aten.index_select.default
            node.args = (x, index.index(places[0]), places[0])
    return program


def sliced(program: Program) -> Program:
    """Return the program with every gather of channels as a slice per run, concatenated."""
    program = program.copy()
    for node in list(program.graph.nodes):
        if node.target is not aten.index_select.default or not _is_list(program, node.args[2]):
            continue
        x, axis, index = node.args
        with program.graph.inserting_before(node):
            parts = [
                _call(program, node, aten.slice.Tensor, (x, axis, start, end), end - start)
                for start, end in runs(program.tensor(index).tolist())
            ]
            whole = _call(program, node, aten.cat.default, (parts, axis), Meta(node).shape[axis])
        node.replace_all_uses_with(whole)
        program.graph.erase_node(node)
    return program


def _is_list(program: Program, node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and program.tensor(node).dim() == 1


def _call(program: Program, like: fx.Node, target: Any, args: Any, width: int) -> fx.Node:
    node = program.graph.call_function(target, args)
    copy_meta(like, node)
    shape = list(Meta(like).shape)
    shape[like.args[1]] = width  # type: ignore[call-overload]
    Meta(node).shape, Meta(node).dtype = tuple(shape), Meta(like).dtype
    return node


def runs(indices: list[int]) -> list[tuple[int, int]]:
    """Return the first and the end of every run of consecutive numbers."""
    cuts = [i for i, (a, b) in enumerate(pairwise(indices), 1) if b != a + 1]
    bounds = [0, *cuts, len(indices)]
    return [(indices[a], indices[b - 1] + 1) for a, b in pairwise(bounds)]


def slice_gathers(path: Path) -> None:
    """Rewrite the gathers of channels in an ONNX file as slices, concatenated."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(path)
    graph = model.graph
    constants = {t.name: t for t in graph.initializer}
    nodes = []

    def constant(values: list[int]) -> str:
        name = f"slice_{'_'.join(map(str, values))}"
        if name not in constants:
            constants[name] = numpy_helper.from_array(np.array(values, dtype=np.int64), name)
            graph.initializer.append(constants[name])
        return name

    for node in graph.node:
        index = constants.get(node.input[1]) if node.op_type == "Gather" else None
        if index is None or len(index.dims) != 1:
            nodes.append(node)
            continue
        axis = next(a.i for a in node.attribute if a.name == "axis")
        parts = []
        for start, end in runs(numpy_helper.to_array(index).tolist()):
            parts.append(f"{node.output[0]}_{start}")
            inputs = [node.input[0], constant([start]), constant([end]), constant([axis])]
            nodes.append(helper.make_node("Slice", inputs, parts[-1:]))
        nodes.append(helper.make_node("Concat", parts, node.output, node.name, axis=axis))
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, path)
