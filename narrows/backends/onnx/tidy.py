"""Clean-ups of an exported model that runtimes and readers need: pooling, names, no leftovers.

They work on `onnx_ir.Model` in place, so they hold for models that no protobuf message can hold.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from narrows.files.quoting import plain

# Where onnxscript notes which values a folded constant was made of.
FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"


def tidy(model: Any, name: str, weights: Mapping[str, Any]) -> None:
    """Clean up a model in place.

    Args:
        model: An `onnx_ir.Model`.
        name: The graph's name.
        weights: The weights of the program; constants made of one weight are named after it.
    """
    pool_globally(model)
    drop_identities(model)
    name_constants(model, weights)
    strip(model, name)


def pool_globally(model: Any) -> None:
    """Turn every mean over all spatial axes into ``GlobalAveragePool``, which runtimes know."""
    import onnx_ir as ir

    for node in list(model.graph):
        if node.op_type != "ReduceMean" or not _is_spatial_mean(node):
            continue
        keep = node.attributes.get_int("keepdims", 1)
        pooled = ir.node("GlobalAveragePool", [node.inputs[0]])
        nodes = [pooled]
        if not keep:
            nodes.append(ir.node("Flatten", [pooled.outputs[0]], attributes={"axis": 1}))
        old, new = node.outputs[0], nodes[-1].outputs[0]
        new.name, new.shape, new.type = old.name, old.shape, old.type
        old.name = None
        pooled.outputs[0].name = pooled.outputs[0].name or f"{new.name}_pool"
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], nodes, [old], [new])


def _is_spatial_mean(node: Any) -> bool:
    """Return whether a mean is over the axes 2 to the last of a float tensor."""
    import onnx_ir as ir

    x = node.inputs[0]
    if x.shape is None or x.dtype is None or not x.dtype.is_floating_point():
        return False
    rank = len(x.shape)
    axes = node.attributes.get_ints("axes", None)
    if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        tensor = ir.convenience.get_const_tensor(node.inputs[1])
        axes = None if tensor is None else tensor.numpy().reshape(-1).tolist()
    return rank > 2 and axes is not None and {a % rank for a in axes} == set(range(2, rank))


def drop_identities(model: Any) -> None:
    """Remove every ``Identity`` that does not stand between an input or a weight and an output."""
    import onnx_ir as ir

    for node in list(model.graph):
        if node.op_type != "Identity" or node.domain:
            continue
        source, result = node.inputs[0], node.outputs[0]
        if result.is_graph_output():
            # An output has a name to keep, and is computed, once.
            if source.producer() is None or source.is_graph_output():
                continue
            name = result.name
            result.name = None
            source.name, source.shape = name, result.shape or source.shape
        ir.convenience.replace_all_uses_with(result, source, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def name_constants(model: Any, weights: Mapping[str, Any]) -> None:
    """Name what was folded from a single weight after it: ``fc.weight.T``, ``fc.weight.folded``."""
    for value in list(model.graph.initializers.values()):
        if value.name in weights or value.is_graph_output():
            continue
        origins = ast.literal_eval(value.metadata_props.get(FOLDED_FROM, "[]"))
        sources = [origin for origin in origins if origin in weights]
        if len(sources) == 1:
            shape = list(weights[sources[0]].shape)
            transposed = len(shape) == 2 and list(value.shape) == shape[::-1]
            suffix = "T" if transposed else "folded"
            value.name = _free_name(model, f"{sources[0]}.{suffix}")


def _free_name(model: Any, name: str) -> str:
    taken, number, free = model.graph.initializers, 1, name
    while free in taken:
        number += 1
        free = f"{name}.{number}"
    return free


def strip(model: Any, name: str) -> None:
    """Name nodes after what they make, and drop the exporter's traces and their local paths."""
    from narrows.version import VERSION

    model.producer_name, model.producer_version = "narrows", VERSION
    model.graph.name = plain(name)
    model.doc_string = model.graph.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph:
        node.name = node.outputs[0].name
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
