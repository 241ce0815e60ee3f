"""`Program`: a graph of ATen operators, its weights by name, and where each node came from.

The graph is a `torch.fx.Graph` in one dialect:

* ``placeholder``: one per flat input, in the order of ``in_spec``;
* ``get_attr``: a weight; the target is a key of ``Program.weights``;
* ``call_function``: an ATen overload without side effects, ``operator.getitem`` on a tuple result,
  or arithmetic on sizes (``aten.sym_size.int``, ``operator.mul`` ...);
* ``output``: a tuple of the flat outputs, in the order of ``out_spec``.

A program is a value: graph, weights and attributes of a `Program` can be read, not changed. A
rewrite edits a `Draft`, a copy of the graph that shares the tensors, and seals it.
`narrows.ir.meta.Meta` is the only place that spells the keys of ``node.meta``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.fx.node import map_arg

from narrows.errors import NarrowsError, ProgramError, suggest
from narrows.ir.choices import Choices
from narrows.ir.graph import Call, Observe, Run, add_node
from narrows.ir.labels import Bools
from narrows.ir.meta import Meta, where
from narrows.ir.notes import Mark, Note, Origin
from narrows.ir.sealed import SealedDict, refuse, seal
from narrows.ir.states import State
from narrows.ir.views import VIEWS

aten = torch.ops.aten


@dataclass(eq=False)
class Program:
    """A captured network, and what is made of it: run it with ``program(*inputs)``.

    It is a value. `copy` gives a draft that can be changed. The tensors are shared with whoever has
    them, so what is written *into* one is seen; what was found out is then found out anew.

    Attributes:
        graph: The operators; see the module's text for the dialect.
        weights: Every parameter, buffer and constant by its original fully qualified name. A tensor
            that the model shares under several names stands here once.
        aliases: The other names of shared tensors, each with the name it stands under.
        buffers: Which weights are not trained (running statistics, constants).
        stored: Which of these checkpoints hold: persistent buffers, but no literals of the code.
        in_spec: The pytree of ``(args, kwargs)``.
        out_spec: The pytree of the result.
        examples: The flat example inputs of the capture; every pass is checked on them.
        dynamic_batch: Whether axis 0 of the inputs is free.
        name: The model's name in dumps and artifacts.
        notes: What the capture and the passes had to say, oldest first.
        history: The passes that made this program, in order.
        origins: For every weight that a pass sliced, where it came from.
        marks: What the last pass did, by node name.
        folded: The names of the batch norms that became part of the layers before them.
        states: The inputs that are handed back what an output was, and what is left of each.
        recipes: For every weight that was computed from others, the program without inputs that
            computes it, at its original shape (`narrows.ir.structure.computed`).
        pruning: What a pruned program was made from and what was chosen for it, for a pass that
            chooses another exact form. It holds the unpruned program, so a copy has none, and any
            other change to graph or weights ends it.
    """

    graph: fx.Graph
    weights: Mapping[str, Tensor]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    examples: tuple[Any, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    stored: frozenset[str] = frozenset()
    dynamic_batch: bool = False
    name: str = "program"
    notes: tuple[Note, ...] = ()
    history: tuple[str, ...] = ()
    origins: Mapping[str, Origin] = field(default_factory=dict)
    marks: Mapping[str, Mark] = field(default_factory=dict)
    folded: tuple[str, ...] = ()
    states: tuple[State, ...] = ()
    recipes: Mapping[str, Program] = field(default_factory=dict)
    pruning: Pruning | None = None
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Seal the graph, the weights, and what is known of both."""
        seal(self.graph)
        for name in ("weights", "aliases", "origins", "marks", "recipes"):
            object.__setattr__(self, name, SealedDict(getattr(self, name)))
        object.__setattr__(self, "_sealed", True)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse, once the program is made."""
        if getattr(self, "_sealed", False):
            refuse(f"{name} of {self.name}")
        object.__setattr__(self, name, value)

    def __deepcopy__(self, seen: dict[int, Any]) -> Self:
        """Copy the tensors, too."""
        tensors = {k: deepcopy(getattr(self, k), seen) for k in ("weights", "examples")}
        return self.replace(graph=self._copied_graph(), **tensors)

    def __reduce__(self) -> Any:
        """Pickle it for another process; see `narrows.ir.parcels`."""
        return VIEWS["parcel"](self)

    # ------------------------------------------------------------------ reading

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes in execution order."""
        return list(self.graph.nodes)

    @property
    def placeholders(self) -> list[fx.Node]:
        """The input nodes, one per flat input."""
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        """The output node."""
        return next(n for n in reversed(self.graph.nodes) if n.op == "output")

    def node(self, name: str) -> fx.Node:
        """Return the node called ``name``; `ProgramError` with a suggestion if there is none."""
        for node in self.graph.nodes:
            if node.name == name:
                return node
        names = [n.name for n in self.graph.nodes]
        raise ProgramError(f"{self.name} has no node {name!r}", hint=suggest(name, names))

    def canonical(self, weight: str) -> str:
        """Return the name a weight stands under; `ProgramError` with a suggestion if unknown."""
        name = self.aliases.get(weight, weight)
        if name not in self.weights:
            known = [*self.weights, *self.aliases]
            raise ProgramError(f"{self.name} has no weight {weight!r}", hint=suggest(weight, known))
        return name

    def state(self, name: str) -> State:
        """Return the state of an input; `ProgramError` with a suggestion if it is none."""
        for state in self.states:
            if state.name == name:
                return state
        raise ProgramError(
            f"{self.name} has no state {name!r}",
            hint=suggest(name, [s.name for s in self.states])
            or "narrows.capture(model, inputs, state={'input': 1}) declares one",
        )

    def users_of(self, weight: str) -> list[fx.Node]:
        """Return the nodes that read ``weight``, in execution order."""
        name = self.canonical(weight)
        return [
            u for n in self.graph.nodes if n.op == "get_attr" and n.target == name for u in n.users
        ]

    def tensor(self, node: fx.Node) -> Tensor:
        """Return the weight behind a ``get_attr`` node."""
        return self.weights[str(node.target)]

    @property
    def parameter_count(self) -> int:
        """How many numbers are trained."""
        return sum(t.numel() for n, t in self.weights.items() if n not in self.buffers)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights under all their names, shared ones under each."""
        return {**self.weights, **{a: self.weights[n] for a, n in self.aliases.items()}}

    # ------------------------------------------------------------------ running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program on inputs structured like the example's; no gradients are recorded."""
        flat = self.flat_inputs(args, kwargs)
        self._check_dtypes(flat)
        with torch.no_grad():
            return pytree.tree_unflatten(self.run_flat(flat), self.out_spec)

    def flat_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the values for the placeholders; keyword arguments may come in any order.

        Values under the names of all placeholders will do, too.
        """
        order = self.in_spec.unflatten(range(self.in_spec.num_leaves))[1]
        if set(kwargs) == set(order):
            kwargs = {name: kwargs[name] for name in order}
        flat, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        if spec == self.in_spec:
            return flat
        names = [n.name for n in self.placeholders]
        if not args and set(kwargs) == set(names):
            return [kwargs[name] for name in names]
        given = [f"{len(args)} positional inputs"] if args or not kwargs else []
        raise ProgramError(
            f"{self.name} was called with another structure than it was captured with",
            why=f"its inputs are {', '.join(names)}; got {' and '.join([*given, *kwargs])}",
        )

    def run_flat(
        self,
        inputs: Sequence[Any],
        weights: Mapping[str, Tensor] | None = None,
        observe: Observe | None = None,
        call: Call | None = None,
    ) -> list[Any]:
        """Run on flat inputs and return the flat outputs.

        Args:
            inputs: One value per placeholder.
            weights: Weights to use in place of the program's own.
            observe: Called with every node and its value.
            call: Runs one node in place of its target.
        """
        run = self.start(inputs, weights, observe, call)
        try:
            return run.finish()
        except NarrowsError:
            raise
        except Exception as cause:  # torch's own, which do not say where
            said = str(cause).partition("\n")[0] or type(cause).__name__
            raise ProgramError(
                f"{self.name} cannot run on these inputs: {said}", where=where(run.at)
            ) from cause

    def start(
        self,
        inputs: Sequence[Any],
        weights: Mapping[str, Tensor] | None = None,
        observe: Observe | None = None,
        call: Call | None = None,
    ) -> Run:
        """Return a run that has not begun, on flat inputs; the arguments are `run_flat`'s."""
        self._check_inputs(inputs)
        given = self.weights if weights is None else weights
        return Run(self.graph, inputs, given, observe=observe, call=call)

    def _check_inputs(self, inputs: Sequence[Any]) -> None:
        holders = self.placeholders
        if len(inputs) != len(holders):
            raise ProgramError(f"{self.name} takes {len(holders)} inputs, got {len(inputs)}")
        for node, value, example in zip(holders, inputs, self.examples, strict=True):
            shape, dynamic = Meta(node).shape, Meta(node).dynamic
            if not isinstance(example, Tensor):  # a number or None is part of the graph
                if isinstance(value, Tensor) or value != example:
                    raise ProgramError(
                        f"input {node.name} is {value!r}, the program was captured with {example!r}"
                    )
                continue
            if not isinstance(value, Tensor) or shape is None:
                raise ProgramError(f"input {node.name} is a {type(value).__name__}, not a tensor")
            fits = value.dim() == len(shape) and all(
                a in dynamic or value.shape[a] == shape[a] for a in range(len(shape))
            )
            if not fits:
                smaller = any(s.name == node.name and s.kept is not None for s in self.states)
                call = f"program.state({node.name!r}).gather({node.name})"
                raise ProgramError(
                    f"input {node.name} has shape {list(value.shape)}, "
                    f"the program takes {format_shape(shape, dynamic)}",
                    where=where(node),
                    hint=f"of the model's whole state: {call}" if smaller else "",
                )

    def _check_dtypes(self, inputs: Sequence[Any]) -> None:
        """Refuse floating-point inputs of another dtype than the example's, and the reverse."""
        for node, value, example in zip(self.placeholders, inputs, self.examples, strict=False):
            if not isinstance(value, Tensor) or not isinstance(example, Tensor):
                continue
            floating = value.is_floating_point() or example.is_floating_point()
            if floating and value.dtype != example.dtype:
                raise ProgramError(
                    f"input {node.name} is {value.dtype}, the program takes {example.dtype}",
                    where=where(node),
                    hint=f"convert it: {node.name}.to({example.dtype})",
                )

    # ------------------------------------------------------------------ deriving

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some attributes replaced; graph and tensors are shared."""
        if "graph" in changes or "weights" in changes:
            changes.setdefault("pruning", None)
            changes["_memo"] = {}
        if "states" in changes:
            changes["_memo"] = {}
        return dataclasses.replace(self, **changes)

    def memo(self, key: str, build: Callable[[], Any] | None = None) -> Any:
        """Return what ``build`` made of graph, weights and states, made once.

        Without ``build``, ``None`` where it would have to be made. Nobody may change what it
        returns. It is not for values that depend on anything else of the program.
        """
        try:  # tensors are shared, and somebody may train one
            versions = [w._version for w in self.weights.values()]
        except RuntimeError:  # tensors of inference mode do not count their changes
            return None if build is None else build()
        if self._memo.get("versions") != versions:
            self._memo.clear()
            self._memo["versions"] = versions
        if key in self._memo or build is None:
            return self._memo.get(key)
        made = self._memo[key] = build()
        return made

    def copy(self, **changes: Any) -> Draft:
        """Return a copy that can be changed, with a graph of its own; the tensors are shared.

        Args:
            changes: Attributes that it has in place of the program's, the graph among them.
        """
        held = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        held |= {"pruning": None, "_memo": {}, **changes}
        if "graph" not in changes:
            held["graph"] = self._copied_graph()
        return Draft(**{**held, **{k: dict(held[k]) for k in ("weights", "aliases")}})

    def _copied_graph(self) -> fx.Graph:
        graph, new = fx.Graph(), {}
        for node in self.graph.nodes:
            args, kwargs = map_arg((node.args, node.kwargs), new.__getitem__)
            new[node] = add_node(graph, node.op, node.target, args, kwargs, node.name)
            new[node].meta = dict(node.meta)
        return graph

    def seal(self) -> Program:
        """Return the program itself: it is finished."""
        return self

    def with_weights(self, state: Mapping[str, Tensor]) -> Program:
        """Return the program with the tensors of another checkpoint of the same model.

        Args:
            state: Tensors by fully qualified name, as in ``model.state_dict()``. Names that the
                program does not use (``num_batches_tracked``) are ignored; a missing one or another
                shape is a `ProgramError`. What no checkpoint holds (see ``stored``) stays as it is.
        """
        return VIEWS["with_state"](self, state)

    def to(self, dtype: torch.dtype) -> Program:
        """Return the program with floating-point weights, examples and literals in ``dtype``."""
        return VIEWS["in_precision"](self, dtype)

    def to_module(self, train: bool = False) -> torch.nn.Module:
        """Return a trainable module with the original parameter names.

        In train mode BatchNorm uses batch statistics and updates its running ones, and dropout
        drops. The module can be captured again.

        Args:
            train: Whether it is returned in train mode; a program whose batch norms were folded is
                then a `ProgramError`, as it would train without them.
        """
        if train and self.folded:
            raise ProgramError(
                f"{self.name} has lost batch norms that training needs: {len(self.folded)}",
                where=", ".join(self.folded[:3]) + (" ..." if len(self.folded) > 3 else ""),
                why="they are part of the layers before them, as a form for a target has it",
                hint="narrows.apply(program, plan) without a target keeps them; lowering folds",
            )
        return VIEWS["module"](self).train(train)

    def couplings(self) -> Any:
        """Return the sets of channels that live or die together; see `narrows.ir.couplings`."""
        return VIEWS["couplings"](self)

    # ------------------------------------------------------------------ printing

    def __str__(self) -> str:
        return VIEWS["text"](self)

    def __repr__(self) -> str:
        count = sum(n.op == "call_function" for n in self.graph.nodes)
        return f"Program({self.name}: {count} ops, {self.parameter_count:,} parameters)"


@dataclass(eq=False)
class Draft(Program):
    """A program that is being made, by the one who has it: graph, weights and the rest may change.

    It can be run and analysed as a `Program` can. It remembers nothing of that: each analysis is
    made anew.
    """

    weights: dict[str, Tensor]
    aliases: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Stay open."""

    def memo(self, key: str, build: Callable[[], Any] | None = None) -> Any:
        """Return what ``build`` makes of the graph and the weights as they are now."""
        return None if build is None else build()

    def seal(self) -> Program:
        """Return the finished program. The draft is used up, and refuses changes from then on."""
        held = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        made = Program(**{**held, "_memo": {}})
        super().__post_init__()
        return made


@dataclass(frozen=True, eq=False)
class Pruning:
    """A program that is pruned, and what was chosen so far among the exact forms of the result.

    It is a value: a stage (`narrows.passes.pruning.stages`) takes one and returns another. Its form
    is the program that the choices ask for (`narrows.passes.pruning.form.emit`).

    Attributes:
        program: The program before its channels went.
        ignored: Per name of a contraction's node, the input channels that count as zero for it.
        choices: What is read, how wide tensors are, and in which order channels stand.
        wider: The same reads with the widths that they were weighed with, for the stage that takes
            these; ``None`` where no widths are waiting.
    """

    program: Program
    ignored: Mapping[str, Bools] = field(default_factory=dict)
    choices: Choices = field(default_factory=Choices)
    wider: Pruning | None = None
    _memo: dict[str, Any] = field(default_factory=dict, repr=False)
    _form: list[Program] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        """Let go of what the program was pruned from before."""
        object.__setattr__(self, "program", _unlinked(self.program))

    @staticmethod
    def of(program: Program) -> Pruning:
        """Return what a program came from, or the pruning of it that has not begun."""
        return program.pruning or Pruning(program).formed(program)

    @property
    def untouched(self) -> bool:
        """Whether nothing went and nothing was chosen: the form is the program itself."""
        return not self.choices and any(f.graph is self.program.graph for f in self._form)

    def choose(self, choices: Choices) -> Pruning:
        """Return the pruning with other choices, and no widths waiting."""
        return dataclasses.replace(self, choices=choices, wider=None, _form=[])

    def formed(self, form: Program) -> Pruning:
        """Return the pruning with a program that is its form already."""
        return dataclasses.replace(self, _form=[_unlinked(form)])

    def form(self, emit: Callable[[Pruning], Program]) -> Program:
        """Return the form, which ``emit`` makes at most once."""
        if not self._form:
            self._form.append(_unlinked(emit(self)))
        return self._form[0]

    def memo(self, key: str, build: Callable[[], Any]) -> Any:
        """Return what ``build`` made of the program and what is ignored, once for all choices."""
        if key not in self._memo:
            self._memo[key] = build()
        return self._memo[key]

    def translated(self, change: Callable[[Program], Program]) -> Pruning:
        """Return the same choices for what ``change`` makes of each program, node by node."""
        wider = None if self.wider is None else self.wider.translated(change)
        forms = [_unlinked(change(form)) for form in self._form]
        return Pruning(change(self.program), self.ignored, self.choices, wider, _form=forms)


def _unlinked(program: Program) -> Program:
    return program if program.pruning is None else program.replace(pruning=None)


def format_shape(shape: Iterable[int], dynamic: Iterable[int] = ()) -> str:
    """Return ``[b,64,56,56]``: a free axis prints as ``b``."""
    free = set(dynamic)
    return "[" + ",".join("b" if i in free else str(s) for i, s in enumerate(shape)) + "]"
