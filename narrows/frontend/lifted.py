"""`Lifted`: an exported graph on its way to the dialect, and how it is lifted and finished.

Its nodes still carry what `torch.export` left in ``node.meta``; ``val`` (a fake tensor or a
symbolic number) is what the steps between `lift` and `finish` go by. It is changed in place by
the one who made it; only `finish` makes a `Program`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.fx.node import map_arg

from narrows.errors import CaptureError
from narrows.frontend.provenance import choose_names, set_provenance, user_frame
from narrows.ir.graph import live_nodes
from narrows.ir.meta import Meta
from narrows.ir.program import Note, Program

aten = torch.ops.aten


@dataclass
class Lifted:
    """A graph that is being normalised.

    Attributes:
        graph: Placeholders, ``get_attr`` of weights, ATen calls, and one output with a tuple.
        weights: The tensors by fully qualified name, in the model's order.
        aliases: Other names of shared tensors.
        parameters: Which weights are trained.
        constants: Which weights are in no state dict: literals of the forward function.
        examples: The flat example inputs.
        sizes: The example value of every symbol.
        free: The symbols of the inputs' free sizes.
        readers: For every free size of an input, the placeholder and the axis that has it.
        generated: The user's stacks behind code that `torch.fx` generated.
        stored: Which weights beside the parameters are in the model's state dict.
        notes: What a person should know of the capture.
    """

    graph: fx.Graph
    weights: dict[str, Tensor]
    aliases: dict[str, str]
    parameters: frozenset[str]
    constants: set[str]
    examples: tuple[Any, ...]
    sizes: dict[Any, Any] = field(default_factory=dict)
    free: set[Any] = field(default_factory=set)
    readers: dict[Any, tuple[fx.Node, int]] = field(default_factory=dict)
    generated: Mapping[str, str] = field(default_factory=dict)
    stored: frozenset[str] = frozenset()
    notes: list[Note] = field(default_factory=list)

    def where(self, node: fx.Node) -> str:
        """Return the node's operator and the user's source line."""
        source, code = user_frame(node.meta.get("stack_trace") or "", self.generated)
        what = f"{node.name}, {node.target}" if node.op == "call_function" else node.name
        return f"{source}  {code}  ({what})" if source else what

    def number(self, value: Any) -> Any:
        """Return a plain number for a symbolic one, at the example's sizes."""
        if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return value
        expr = value.node.expr.xreplace(self.sizes)
        kind = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(value)]
        return kind(expr)

    def new_constant(self, tensor: Tensor) -> str:
        """Store a literal tensor under a fresh name and return the name."""
        name = f"_folded_{len(self.constants)}"
        self.weights[name] = tensor
        self.constants.add(name)
        return name


def lift(
    exported: torch.export.ExportedProgram,
    examples: Sequence[Any],
    names: Mapping[str, tuple[str, ...]],
    generated: Mapping[str, str],
) -> Lifted:
    """Return the graph of an exported program; parameters and constants become ``get_attr`` nodes.

    Args:
        exported: The program.
        examples: The flat example inputs.
        names: For every weight that has several names, all of them, the canonical one first.
        generated: The user's stacks behind generated code.
    """
    canonical = {n: group[0] for group in names.values() for n in group}
    parameters = exported.graph_signature.inputs_to_parameters.values()
    kinds = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    stored = {**exported.state_dict, **exported.constants}
    graph = fx.Graph()
    lifted = Lifted(
        graph=graph,
        weights={},
        aliases={n: c for n, c in canonical.items() if n != c},
        parameters=frozenset(canonical.get(n, n) for n in parameters),
        constants=set(),
        examples=tuple(examples),
        generated=generated,
        stored=frozenset(
            canonical.get(str(s.target), str(s.target))
            for s in exported.graph_signature.input_specs
            if s.kind is InputKind.BUFFER and s.persistent
        ),
    )
    env: dict[fx.Node, fx.Node] = {}
    weight_nodes: dict[str, fx.Node] = {}

    def read(node: fx.Node) -> fx.Node:
        """Return the new node; a weight gets its node right before its first reader."""
        if node in env:
            return env[node]
        spec = kinds[node.name]
        own = str(spec.target)
        name = canonical.get(own, own)
        if name not in weight_nodes:
            tensor = stored[own]
            lifted.weights[name] = tensor.detach()
            if spec.kind is InputKind.CONSTANT_TENSOR:
                lifted.constants.add(name)
            weight_nodes[name] = new = graph.create_node("get_attr", name)
            new.meta = {"val": node.meta.get("val", tensor)}
        env[node] = weight_nodes[name]
        return env[node]

    for node in exported.graph.nodes:
        if node.op == "placeholder":
            kind = kinds[node.name].kind
            if kind is InputKind.USER_INPUT:
                env[node] = graph.node_copy(node)
            elif kind in (InputKind.CUSTOM_OBJ, InputKind.TOKEN):
                raise CaptureError(
                    f"the model holds an object that is no tensor: {kinds[node.name].target}",
                    why="a program's weights are tensors",
                    hint="keep scripted and custom-class objects out of forward",
                )
        elif node.op == "output":
            outputs = _user_outputs(exported, node, lifted)
            graph.output(map_arg(outputs, read)).meta = dict(node.meta)
        elif node.op == "get_attr":  # the body of a higher-order operator
            env[node] = graph.node_copy(node)
            env[node].meta["body"] = getattr(exported.graph_module, str(node.target))
        else:
            env[node] = graph.node_copy(node, read)
    _bind_sizes(lifted)
    return lifted


def _user_outputs(
    exported: torch.export.ExportedProgram, node: fx.Node, lifted: Lifted
) -> tuple[Any, ...]:
    values = []
    results: Any = node.args[0]
    for spec, value in zip(exported.graph_signature.output_specs, results, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            values.append(value)
        elif spec.kind is OutputKind.USER_INPUT_MUTATION:
            note_input_mutation(lifted, str(spec.target), "")
        else:
            raise mutation_error(str(spec.target), "")
    return tuple(values)


def note_input_mutation(lifted: Lifted, name: str, source: str) -> None:
    """Say once that the program, unlike the model, leaves an input as it was."""
    message = f"the model writes into its input {name!r}; the program leaves it as it was"
    if all(n.message != message for n in lifted.notes):
        lifted.notes.append(Note(name, "input-mutation", message, source=source))


def mutation_error(name: str, where: str) -> CaptureError:
    """Return the error for a forward function that writes into a weight."""
    return CaptureError(
        f"forward changes {name!r}, which the next call would see",
        where=where,
        why="a program has no state",
        hint="call model.eval() if it is a running statistic; else return the value as an output",
    )


def _bind_sizes(lifted: Lifted) -> None:
    """Give each symbol of the inputs' shapes its value in the example."""
    holders = [n for n in lifted.graph.nodes if n.op == "placeholder"]
    for node, example in zip(holders, lifted.examples, strict=True):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not isinstance(example, Tensor):
            continue
        for axis, (size, actual) in enumerate(zip(value.shape, example.shape, strict=True)):
            if not isinstance(size, torch.SymInt):
                continue
            expr = size.node.expr
            lifted.readers.setdefault(expr, (node, axis))
            for symbol in expr.free_symbols - set(lifted.sizes):  # one; a size may be 2 * s0
                lifted.sizes[symbol] = sympy.solve(expr.xreplace(lifted.sizes) - actual, symbol)[0]
                lifted.free.add(symbol)


def finish(
    lifted: Lifted,
    specs: tuple[pytree.TreeSpec, pytree.TreeSpec],
    name: str,
    *,
    order: Sequence[str],
    input_names: Sequence[str] = (),
) -> Program:
    """Return the program of a normalised graph: final names, `Meta`, nothing dead.

    Args:
        lifted: The graph; it is not used any more afterwards.
        specs: The pytree of ``(args, kwargs)``, and that of the result.
        name: The program's name.
        order: The order of the weights.
        input_names: Names for the placeholders in place of those of forward's arguments.
    """
    live = list(live_nodes(lifted.graph))
    names = choose_names(live)
    holders = [n for n in live if n.op == "placeholder"]
    names |= dict(zip(holders, input_names, strict=False))
    constants = _constant_names(lifted, live, order)
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    used: dict[str, Tensor] = {}

    def read(node: fx.Node) -> fx.Node:
        if node not in env:  # a weight stands right before its first reader
            target = constants.get(str(node.target), str(node.target))
            used[target] = lifted.weights[str(node.target)]
            env[node] = graph.create_node("get_attr", target, name=target.replace(".", "_"))
            _set_meta(lifted, node, env[node])
            Meta(env[node]).module = target.rpartition(".")[0]
        return env[node]

    for node in live:
        if node.op == "get_attr":
            continue
        args, kwargs = map_arg((node.args, node.kwargs), read)
        if node.op == "output":
            results: Any = args[0]
            graph.output(tuple(results))
            continue
        target_name = names.get(node, node.name)
        env[node] = graph.create_node(node.op, node.target, args, kwargs, name=target_name)
        if node.op == "placeholder":
            env[node].target = env[node].name
        _set_meta(lifted, node, env[node])
    rank = {n: i for i, n in enumerate(order)}
    weights = {n: used[n] for n in sorted(used, key=lambda n: rank.get(n, len(rank)))}
    dynamic = any(0 in Meta(n).dynamic for n in graph.nodes if n.op == "placeholder")
    return Program(
        graph=graph,
        weights=weights,
        in_spec=specs[0],
        out_spec=specs[1],
        examples=lifted.examples,
        aliases={a: n for a, n in lifted.aliases.items() if n in weights},
        buffers=frozenset(n for n in weights if n not in lifted.parameters),
        stored=lifted.stored & weights.keys(),
        dynamic_batch=dynamic,
        name=name,
        notes=tuple(lifted.notes),
    )


def _constant_names(
    lifted: Lifted, live: Sequence[fx.Node], order: Sequence[str]
) -> dict[str, str]:
    """Give literals that have no name of the user's the names ``const_0``, ``const_1`` ..."""
    taken = {*order, *lifted.aliases}
    names: dict[str, str] = {}
    index = 0
    for node in live:
        target = str(node.target)
        nameless = target.startswith(("lifted_tensor_", "_folded_", "_tensor_constant"))
        if node.op != "get_attr" or target not in lifted.constants or not nameless:
            continue
        while f"const_{index}" in taken:
            index += 1
        names.setdefault(target, f"const_{index}")
        taken.add(names[target])
    return names


def _set_meta(lifted: Lifted, old: fx.Node, new: fx.Node) -> None:
    new.meta = {}
    meta = Meta(new)
    set_provenance(new, old.meta, lifted.generated)
    value = old.meta.get("val")
    if isinstance(value, Tensor):
        meta.shape = tuple(lifted.number(s) for s in value.shape)
        meta.dtype = value.dtype
        meta.dynamic = tuple(i for i, s in enumerate(value.shape) if free_symbols(s) & lifted.free)
    elif value is not None and not isinstance(value, (tuple, list)):
        meta.size = lifted.number(value)


def val(node: Any) -> Any:
    """Return the fake tensor or the symbolic number of a node; a literal stands for itself."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def is_item(node: fx.Node) -> bool:
    """Tell whether ``node`` takes one item of a tuple result."""
    return node.op == "call_function" and node.target is operator.getitem
