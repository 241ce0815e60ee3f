"""States that a user declares: which input is handed back which output, and where its channels lie.

The channels of a state lie along the axes along which its output has any; where the output says
nothing, along the axis that the first contraction after the input sums over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.utils._pytree as pytree
from torch import fx

from narrows.errors import CaptureError, suggest
from narrows.ir.channels import Facts, analyse, input_axis
from narrows.ir.labels import Value
from narrows.ir.meta import Meta, where
from narrows.ir.ops import table
from narrows.ir.program import Program
from narrows.ir.states import State


def with_states(program: Program, declared: Mapping[str, Any]) -> Program:
    """Return the program with the states that a user declares.

    Args:
        program: A program as captured.
        declared: Per input the output that it is handed back. An input is named as forward's
            argument, or, of one that holds several tensors, as the program names each. An output is
            the number of a result, or a path of indices and keys into nested ones. An argument and
            an output that hold several tensors are as many states.

    Raises:
        CaptureError: There is no such input or output, the two are no one state, or nothing tells
            along which axis its channels lie.
    """
    if not declared:
        return program
    if not isinstance(declared, Mapping):
        raise CaptureError(
            f"state takes a dict of outputs by the inputs' names, got {type(declared).__name__}",
            hint='state={"k_cache": 1}',
        )
    found: list[State] = []
    for name, output in declared.items():
        inputs, outputs = _inputs(program, name), _outputs(program, name, output)
        if len(inputs) != len(outputs):
            raise CaptureError(
                f"the input {name!r} holds {len(inputs)} tensors, output {_spelled(output)} "
                f"{len(outputs)}",
                hint=f"declare them one by one: {', '.join(inputs[:3])}",
            )
        found += [State(a, b) for a, b in zip(inputs, outputs, strict=True)]
    _check_once(found)
    for state in found:
        _check_alike(program, state)
    return _placed(program.replace(states=tuple(found)))


# ---------------------------------------------------------------------- names


def _inputs(program: Program, name: str) -> list[str]:
    """Return the placeholders that a name stands for."""
    names = [n.name for n in program.placeholders]
    if str(name).lower() in names:  # torch names inputs after arguments, in small letters
        return [str(name).lower()]
    nested = program.in_spec.unflatten(range(program.in_spec.num_leaves))
    groups: dict[str, list[str]] = {}
    for path, leaf in pytree.tree_flatten_with_path(nested)[0]:
        within = "".join(f"_{_key(k)}" for k in path[2:])
        groups.setdefault(names[leaf].removesuffix(within), []).append(names[leaf])
    if str(name).lower() in groups:
        return groups[str(name).lower()]
    known = list(dict.fromkeys([*names, *groups]))
    raise CaptureError(
        f"state names the input {name!r}, which there is not",
        why=f"the inputs are {', '.join(names)}",
        hint=suggest(str(name), known),
    )


def _outputs(program: Program, name: str, output: Any) -> list[int]:
    """Return the positions of the flat outputs at a number or a path."""
    wanted = tuple(output) if isinstance(output, Sequence) and not isinstance(output, str) else None
    path = (output,) if wanted is None else wanted
    nested = program.out_spec.unflatten(range(program.out_spec.num_leaves))
    leaves = [([_key(k) for k in p], i) for p, i in pytree.tree_flatten_with_path(nested)[0]]
    found = [i for keys, i in leaves if tuple(keys[: len(path)]) == path]
    number = path[0] if len(path) == 1 and type(path[0]) is int else -1
    numbered = any(isinstance(keys[0], int) for keys, _ in leaves if keys)
    if not found and not numbered and 0 <= number < len(leaves):
        return [number]  # of one tensor, or of results by name
    if not found:
        count = program.out_spec.num_leaves
        listed = ", ".join(_spelled(tuple(keys)) for keys, _ in leaves if keys) or "0"
        raise CaptureError(
            f"state gives the input {name!r} output {_spelled(output)}, which there is not",
            why=f"the {count} outputs are {listed}" if count > 1 else f"the one output is {listed}",
        )
    return found


def _key(key: Any) -> Any:
    """Return an index, a key or an attribute's name from a step of torch's paths."""
    return next(getattr(key, a) for a in ("idx", "key", "name") if hasattr(key, a))


def _spelled(output: Any) -> str:
    if isinstance(output, tuple | list) and len(output) == 1:
        (output,) = output
    return str(list(output)) if isinstance(output, tuple | list) else repr(output)


# ---------------------------------------------------------------------- what is one state


def _check_once(states: Sequence[State]) -> None:
    for what, key in (("input", "name"), ("output", "output")):
        given = [getattr(s, key) for s in states]
        twice = next((g for g in given if given.count(g) > 1), None)
        if twice is not None:
            raise CaptureError(f"state names {what} {twice!r} twice", why="a state is one of each")


def _ends(program: Program, state: State) -> tuple[fx.Node, Any]:
    results: Any = program.output.args[0]
    return program.node(state.name), results[state.output]


def _check_alike(program: Program, state: State) -> None:
    """Raise `CaptureError` unless an output can be handed back as an input."""
    holder, result = _ends(program, state)
    what = f"the input {state.name!r} and output {state.output} are no one state"
    a, b = Meta(holder), Meta(result) if isinstance(result, fx.Node) else None
    if a.shape is None or b is None or b.shape is None:
        one = "the input" if a.shape is None else "the output"
        raise CaptureError(what, where=where(holder), why=f"{one} is no tensor")
    if a.dtype != b.dtype:
        raise CaptureError(what, where=where(result), why=f"{a.dtype} goes in, {b.dtype} comes out")
    longer = [i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=False)) if m != n]
    grows = len(longer) == 1 and b.shape[longer[0]] > a.shape[longer[0]] > 0
    if len(a.shape) != len(b.shape) or (longer and not (grows and _joins(holder, result))):
        raise CaptureError(
            what,
            where=where(result),
            why=f"{list(a.shape)} goes in, {list(b.shape)} comes out",
            hint="one axis may grow, that along which torch.cat joins what is new",
        )
    if len(a.shape) == 0:
        raise CaptureError(what, where=where(holder), why="a number has no channels")


def _joins(holder: fx.Node, result: fx.Node) -> bool:
    """Whether a join lies between an input and an output."""
    seen, queue = {holder}, [holder]
    while queue:
        for user in queue.pop().users:
            if table.concatenates(user) and _reaches(user, result):
                return True
            if user not in seen:
                seen.add(user)
                queue.append(user)
    return False


def _reaches(node: fx.Node, result: fx.Node) -> bool:
    seen, queue = {node}, [node]
    while queue:
        current = queue.pop()
        if current is result:
            return True
        new = [u for u in current.users if u not in seen]
        seen.update(new)
        queue += new
    return False


# ---------------------------------------------------------------------- where its channels lie


def _placed(program: Program) -> Program:
    """Return the program with the axes of its states' channels.

    An input has those of its output, which may have them from another state's input.
    """
    while True:
        facts = analyse(program)
        axes = [{*s.axes, *_output_axes(facts, s)} for s in program.states]
        known = [set(s.axes) for s in program.states]
        if axes == known:
            bare = next((i for i, a in enumerate(axes) if not a), None)
            if bare is None:
                return program
            axes[bare] = {_input_axis(facts, program.states[bare])}
        pairs = zip(program.states, axes, strict=True)
        program = program.replace(states=tuple(_along(facts, s, a) for s, a in pairs))


def _output_axes(facts: Facts, state: State) -> tuple[int, ...]:
    value = facts.flows[_ends(facts.program, state)[1]].value
    return value.axes if isinstance(value, Value) else ()


def _input_axis(facts: Facts, state: State) -> int:
    """Return the axis that the first reader of an input sums over; `CaptureError` without one."""
    holder, result = _ends(facts.program, state)
    axis = input_axis(holder)
    if axis is not None:
        return axis
    barriers = [f"{where(n)} is a barrier: {why}" for n, why in facts.barriers.items()]
    raise CaptureError(
        f"nothing tells along which axis the channels of the state {state.name!r} lie",
        where=where(result),
        why=barriers[0] if barriers else "no layer makes or sums over them",
        hint="leave it out of state=: as an input and an output of their own they stay whole",
    )


def _along(facts: Facts, state: State, axes: set[int]) -> State:
    """Return a state with its axes; `CaptureError` if the input has another size along one."""
    holder, result = _ends(facts.program, state)
    given, made = Meta(holder).shape, Meta(result).shape
    for axis in axes:
        if given[axis] != made[axis] or axis in (*Meta(holder).dynamic, *Meta(result).dynamic):
            raise CaptureError(
                f"the channels of the state {state.name!r} lie along axis {axis}, which is not of "
                "one size",
                where=where(result),
                why=f"{list(given)} goes in, {list(made)} comes out",
            )
    order = tuple(sorted(axes))
    sizes = tuple(given[a] for a in order)
    return replace(state, axes=order, whole=sizes, sizes=sizes)


__all__ = ["with_states"]
