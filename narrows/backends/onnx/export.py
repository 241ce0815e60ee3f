"""Program -> `onnx_ir.Model` through ``torch.onnx``, node names kept.

A program already is a graph in the dialect of ``torch.export``, so it is not traced again, which
is what takes most of the time of an ordinary export. Its graph gets its weights as inputs and its
batch size as a symbol, and goes to the exporter as an `ExportedProgram`. Every ONNX value has the
name of the node it comes from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymBoolArgument,
    SymFloatArgument,
    SymIntArgument,
    TensorArgument,
)
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.node import map_arg

from narrows.backends.onnx.legalize import LEGALIZE
from narrows.backends.onnx.quiet import quiet
from narrows.errors import LowerError
from narrows.ir.meta import Meta, op_name, where
from narrows.ir.program import Program

BATCH = "batch"  # the name of the free axis in the model file

# The batch that comparisons of sizes see. No other axis is likely to be as long, so that none is
# taken for the batch.
BATCH_HINT = 1009

ARGUMENTS: dict[type, Any] = {
    torch.SymInt: SymIntArgument, int: SymIntArgument,
    torch.SymFloat: SymFloatArgument, float: SymFloatArgument,
    torch.SymBool: SymBoolArgument, bool: SymBoolArgument,
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """A program as an ONNX model.

    Attributes:
        model: The `onnx_ir.Model`.
        inputs: Name, shape and dtype of each, as the manifest has them.
        outputs: As ``inputs``.
    """

    model: Any
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]


def export(program: Program, outputs: Sequence[fx.Node], opset: int, batch: int = 0) -> Exported:
    """Return the model that computes ``outputs``, with values named after the nodes.

    Inputs that are not tensors are built into it.

    Args:
        program: The program.
        outputs: The nodes that the model returns.
        opset: The version of the ONNX operators.
        batch: The batch size of the examples, where a free axis of an input may be a multiple of
            it; else every free axis is the batch.

    Raises:
        LowerError: An operator has no ONNX form; names the node.
    """
    with quiet():
        traced = build(program, outputs, batch)
        inputs, results = describe(traced)
        try:
            model = _translate(program, traced, opset, batch)
        except torch.onnx.errors.OnnxExporterError as error:
            if traced.decomposed is not None:
                raise _refusal(program, traced, error) from error
            # An operator that the exporter neither knows nor takes apart unasked: now ask.
            traced.always_decompose = True
            try:
                model = _translate(program, traced, opset, batch)
            except torch.onnx.errors.OnnxExporterError as error:
                raise _refusal(program, traced, error) from error
    return Exported(model, inputs, results)


class Traced(ExportedProgram):
    """An exported program that is taken apart only when an operator has no ONNX form as it is.

    Attributes:
        always_decompose: Whether to take it apart in any case.
        decomposed: The result, if that happened.
    """

    always_decompose = False
    decomposed: ExportedProgram | None = None

    def run_decompositions(self, decomp_table: Any = None, **options: Any) -> ExportedProgram:
        """Return the program itself, or decomposed when one of its operators is in the table.

        The exporter calls this with a table of the operators that it has no translation for.
        """
        targets = {n.target for n in self.graph.nodes if n.op == "call_function"}
        table = {} if decomp_table is None else decomp_table
        if not self.always_decompose and not any(target in table for target in targets):
            return self
        self.decomposed = super().run_decompositions(decomp_table, **options)
        _name_parts(self.decomposed)
        return self.decomposed


def _name_parts(decomposed: ExportedProgram) -> None:
    """Name what operators were taken apart into after them: the last part is the result.

    torch names the parts anew, by names that other nodes had, and that outputs have still.
    """
    calls = [n for n in decomposed.graph.nodes if n.op == "call_function"]
    origin = {n: n.meta.get("custom", {}).get("node", "") for n in calls}
    last = {name: node for node, name in origin.items() if name}
    old = {n: n.name for n in calls}
    weights = {str(spec.target) for spec in decomposed.graph_signature.input_specs}
    names = {n: f"{name}_" if name in weights else name for name, n in last.items()}
    taken = {n.name for n in decomposed.graph.nodes if n not in old} | set(names.values())
    for node in calls:
        if node not in names:
            names[node] = _free_name(f"{origin[node] or node.name}_part", taken)
            taken.add(names[node])
    for node, name in names.items():
        decomposed.graph._graph_namespace.create_name(name, None)  # no later node takes it
        node.name = name  # `_rename` would not, where another node had it
    renamed = {old[n]: n.name for n in calls}
    for spec in decomposed.graph_signature.output_specs:
        spec.arg.name = renamed.get(spec.arg.name, spec.arg.name)


def _free_name(name: str, taken: set[str]) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free


def build(program: Program, outputs: Sequence[fx.Node], batch: int = 0) -> Traced:
    """Return the program as the exporter takes it; `export` tells of the arguments."""
    builder = Builder(program, batch)
    for node in program.graph.nodes:
        if node.op == "call_function":
            builder.add(node)
    return builder.finish(outputs)


def describe(traced: Traced) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return name, shape and dtype of every input and output, the batch as ``"b"``."""
    values = {node.name: node.meta["val"] for node in traced.graph.nodes if "val" in node.meta}
    names = [list(traced.graph_signature.user_inputs), list(traced.graph_signature.user_outputs)]
    sizes = (size for name in names[0] for size in values[name].shape)
    symbol = next((str(size) for size in sizes if isinstance(size, torch.SymInt)), "")

    def spec(name: str) -> dict[str, Any]:
        value = values[name]
        if not isinstance(value, Tensor):  # a size or a number made of sizes
            whole = isinstance(value, int | torch.SymInt)
            return {"name": name, "shape": [], "dtype": "int64" if whole else "float32"}
        shape = [s if isinstance(s, int) else str(s).replace(symbol, "b") for s in value.shape]
        return {"name": name, "shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}

    inputs, outputs = ([spec(str(name)) for name in group] for group in names)
    return inputs, outputs


class Builder:
    """Copies a program's graph node by node, and runs every node on tensors without data.

    Attributes:
        graph: The graph so far; ``node.meta["val"]`` is the node's value, without data.
    """

    def __init__(self, program: Program, sized: int = 0) -> None:
        self.program, self.sized = program, sized
        self.graph = fx.Graph()
        self.shapes = ShapeEnv()
        self.fake = FakeTensorMode(shape_env=self.shapes, allow_non_fake_inputs=True)
        self.batch = self._new_batch() if program.dynamic_batch else None
        self.env: dict[fx.Node, Any] = {}
        self.inputs: list[InputSpec] = []
        self.weights: dict[str, Tensor] = {}  # by their names in the model file
        self._add_weights()
        self._add_inputs()

    def _add_weights(self) -> None:
        holders: dict[str, fx.Node] = {}
        inputs = {node.name for node in self.program.placeholders}
        for node in self.program.graph.nodes:
            if node.op != "get_attr":
                continue
            name = str(node.target)
            if name not in holders:
                holder = self.graph.placeholder(f"weight_{len(holders)}")
                tensor = self.program.weights[name].detach()
                holder.meta["val"] = self.fake.from_tensor(tensor, static_shapes=True)
                unique = f"{name}_" if name in inputs else name
                self.weights[unique] = tensor
                argument = TensorArgument(holder.name)
                self.inputs.append(InputSpec(InputKind.BUFFER, argument, unique, persistent=True))
                holders[name] = holder
            self.env[node] = holders[name]

    def _add_inputs(self) -> None:
        for node, example in _tensor_inputs(self.program):
            free = _free_axes(self.program, node)
            shape: list[Any] = list(example.shape)
            for axis in free:
                assert self.batch is not None  # nothing is free without it
                shape[axis] = self.batch * _times(example.shape[axis], self.sized)
            holder = self.graph.create_node("placeholder", node.name, name=node.name)
            with self.fake:
                holder.meta["val"] = torch.empty(shape, dtype=example.dtype)
            self.inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(holder.name), None))
            self.env[node] = holder
        for node, example in zip(self.program.placeholders, self.program.examples, strict=True):
            self.env.setdefault(node, example)  # what is no tensor is a constant

    def _new_batch(self) -> Any:
        """Return the one symbol that every free axis is."""
        env, source = self.shapes, ConstantSource("batch")
        symbol = env.create_symbol(BATCH_HINT, source, dynamic_dim=DimDynamic.DYNAMIC)
        return env.create_symintnode(symbol, hint=BATCH_HINT, source=source)

    def add(self, node: fx.Node) -> None:
        """Copy one operator; one that ONNX spells otherwise is replaced on the way."""
        args, kwargs = map_arg((node.args, node.kwargs), self.env.__getitem__)
        legalize = LEGALIZE.get(node.target)
        try:
            replaced = None if legalize is None else legalize(self, node.name, *args, **kwargs)
            if replaced is None:
                replaced = self.emit(node.name, node.target, *args, **kwargs)
        except Exception as error:
            raise LowerError(
                f"{op_name(node)} cannot run on a batch of unknown size"
                if self.program.dynamic_batch
                else f"{op_name(node)} cannot run without data",
                where=where(node),
                why=_first_line(error),
                hint="capture with dynamic_batch=False" if self.program.dynamic_batch else "",
            ) from error
        self.env[node] = replaced
        if self.batch is not None and self.batch.node.maybe_as_int() is not None:
            raise LowerError(
                f"{op_name(node)} only works for one batch size",
                where=where(node),
                hint="capture with dynamic_batch=False",
            )

    def emit(self, name: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call, and run it on tensors without data."""
        unique = f"{name}_" if name in self.weights else name
        created = self.graph.create_node("call_function", target, args, kwargs, name=unique)
        values, named = map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.fake, enable_python_dispatcher(), torch.no_grad():
            created.meta["val"] = target(*values, **named)
        created.meta["custom"] = {"node": name}  # survives decomposition; see `_refusal`
        return created

    def finish(self, outputs: Sequence[fx.Node]) -> Traced:
        """Close the graph and wrap it up."""
        results: list[fx.Node] = []
        for node in outputs:
            result = self.env[node]
            # ONNX wants every output once, and computed.
            if result.op == "placeholder" or result in results:
                result = self.emit(node.name, torch.ops.aten.clone.default, result)
            results.append(result)
        self.graph.output(tuple(results))
        outs = [OutputSpec(OutputKind.USER_OUTPUT, _argument(r), None) for r in results]
        examples = tuple(example for _, example in _tensor_inputs(self.program))
        call = ModuleCallSignature(
            inputs=[],
            outputs=[],
            in_spec=pytree.tree_flatten((examples, {}))[1],
            out_spec=pytree.tree_flatten(tuple(results))[1],
        )
        return Traced(
            root=torch.nn.Module(),
            graph=self.graph,
            graph_signature=ExportGraphSignature(self.inputs, outs),
            state_dict=dict(self.weights),
            range_constraints={},
            module_call_graph=[ModuleCallEntry("", call)],
            example_inputs=(examples, {}),
        )


def _argument(node: fx.Node) -> Any:
    return ARGUMENTS.get(type(node.meta["val"]), TensorArgument)(node.name)


def _tensor_inputs(program: Program) -> list[tuple[fx.Node, Tensor]]:
    pairs = zip(program.placeholders, program.examples, strict=True)
    return [(node, example) for node, example in pairs if isinstance(example, Tensor)]


def _free_axes(program: Program, node: fx.Node) -> tuple[int, ...]:
    return tuple(Meta(node).dynamic) if program.dynamic_batch else ()


def _times(size: int, batch: int) -> int:
    """Return how many batches a free axis holds."""
    return size // batch if batch and size % batch == 0 else 1


def _names(node: fx.Node, program: Program, example: Tensor, batch: int) -> dict[int, str]:
    """Return the names of an input's free axes; one that is no plain batch has none."""
    free = _free_axes(program, node)
    return dict.fromkeys((a for a in free if _times(example.shape[a], batch) == 1), BATCH)


def _translate(program: Program, traced: Traced, opset: int, batch: int) -> Any:
    pairs = _tensor_inputs(program)
    nodes = [node for node, _ in pairs]
    result = torch.onnx.export(
        traced,
        (),
        dynamo=True,
        opset_version=opset,
        input_names=[node.name for node in nodes],
        output_names=[spec.arg.name for spec in traced.graph_signature.output_specs],
        # names the axes; which of them are free was decided when the graph was built
        dynamic_shapes=tuple(_names(n, program, e, batch) for n, e in pairs),
        optimize=True,
        verbose=False,
    )
    if result is None:
        raise LowerError("torch.onnx.export returned nothing")
    made = result.model.opset_imports.get("")
    if made != opset:  # it only logs that its conversion failed
        raise LowerError(
            f"the exporter cannot write this program for opset {opset}",
            why=f"it wrote opset {made}, and found no way from there",
            hint=f"onnx{{opset={made}}}",
        )
    return result.model


def _refusal(program: Program, traced: Traced, error: BaseException) -> LowerError:
    """Return the error for what the exporter said, with the program's node that it is about."""
    name = ""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
        found = re.search(r"node %(\S+) :", str(cause))
        name = found.group(1) if found else name
    graph = (traced.decomposed or traced).graph
    for part in graph.nodes:
        if part.name == name:
            name = part.meta.get("custom", {}).get("node", name)
            break
    node = next((n for n in program.graph.nodes if n.name == name), None)
    return LowerError(
        f"ONNX has no form for {op_name(node)}" if node else "the program has no ONNX form",
        where=where(node) if node else "",
        why=_first_line(cause),
        hint="replace the operator by others before capturing",
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
