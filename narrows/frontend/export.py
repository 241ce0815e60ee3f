"""`capture`: a model and example inputs in, a `Program` out.

`torch.export` traces the model (undecomposed), `lift` makes weights nodes of the graph, `normalise`
brings it into the dialect, `finish` names the nodes. Read those four in this order.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from narrows.errors import CaptureError
from narrows.frontend.containers import is_unknown_type, register_dataclasses
from narrows.frontend.inputs import Inputs, read_inputs
from narrows.frontend.lifted import finish, lift
from narrows.frontend.normalise import normalise
from narrows.frontend.provenance import full_stacks, generated_stacks
from narrows.frontend.refuse import (
    check_dtypes,
    check_model,
    check_weights,
    explain,
    fixed_batch_note,
    is_data_dependent,
    reparametrised,
    run_eagerly,
    squeezed_batch_note,
    unchanged,
)
from narrows.frontend.states import with_states
from narrows.ir.module import ProgramModule
from narrows.ir.program import Note, Program
from narrows.ir.tracing import alone


@alone
def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    name: str | None = None,
    state: Mapping[str, Any] | None = None,
) -> Program:
    """Return the program of a model in eval mode.

    Where the model's code fixes the batch size, the program has the batch of the example inputs,
    and a note with the reason ``fixed-batch`` says so. The program shares the model's tensors.

    Args:
        model: A module, a ``torch.fx.GraphModule``, or a ``torch.export.ExportedProgram``.
        example_inputs: The positional arguments of forward, or one tensor. For an exported program
            they may be left out.
        kwargs: The keyword arguments of forward.
        dynamic_batch: Whether the batch stays free: axis 0 of the first tensor, and of every other
            input tensor of the same size there. The examples are then cut or repeated to a batch
            of 2.
        name: The program's name; by default that of the model's class.
        state: Per input that is handed back what an output was, that output
            (`narrows.frontend.states`).

    Raises:
        CaptureError: The model cannot be captured; says what, where, and what to do.
    """
    if isinstance(model, ExportedProgram):
        program = _from_exported(model, example_inputs, kwargs, dynamic_batch, name or "program")
        return with_states(program, state or {})
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"cannot capture a {type(model).__name__}",
            hint="pass an nn.Module, a torch.fx.GraphModule or a torch.export.ExportedProgram",
        )
    if example_inputs is None and not kwargs:
        raise CaptureError("a module needs example_inputs", hint="pass a tuple of tensors")
    check_model(model)
    given = read_inputs(() if example_inputs is None else example_inputs, kwargs, dynamic_batch)
    check_dtypes(model, given)
    exported, inputs, notes = _export(model, given)
    program = _from_module(model, exported, inputs, name)
    fixed = squeezed_batch_note(program)
    if inputs.batch and not program.dynamic_batch:
        fixed = _fixed_note(_FIXED_BY_TORCH)
    if fixed is not None:
        inputs, notes = given.fixed(), (fixed,)
        program = _from_module(model, _trace(model, inputs), inputs, name)
    check_weights(program)
    program = program.replace(notes=(*notes, *reparametrised(model), *program.notes))
    if state is None and isinstance(model, ProgramModule):
        return program.replace(states=model._program.states)
    return with_states(program, state or {})


def _from_module(
    model: nn.Module, exported: ExportedProgram, inputs: Inputs, name: str | None
) -> Program:
    """Return the program of a traced module; one made by ``to_module`` keeps its names."""
    held = model._program if isinstance(model, ProgramModule) else None
    return _build(
        exported,
        inputs,
        name or (held.name if held else type(model).__name__.lower()),
        state=model.state_dict(keep_vars=True),
        generated=generated_stacks(model),
        input_names=[n.name for n in held.placeholders] if held else [],
    )


def _from_exported(
    exported: ExportedProgram,
    example_inputs: Any,
    kwargs: Mapping[str, Any] | None,
    dynamic_batch: bool,
    name: str,
) -> Program:
    if example_inputs is None and not kwargs:
        if exported.example_inputs is None:
            raise CaptureError("the exported program has no example inputs", hint="pass some")
        example_inputs, kwargs = exported.example_inputs
    takes: Any = exported.call_spec.in_spec
    order = takes.unflatten(range(takes.num_leaves))[1]
    if kwargs and set(kwargs) == set(order):
        kwargs = {k: kwargs[k] for k in order}
    inputs = read_inputs(() if example_inputs is None else example_inputs, kwargs, dynamic_batch)
    holders = _user_placeholders(exported)
    if inputs.spec != takes:
        raise CaptureError(
            "the example inputs have another structure than the exported program's",
            why=f"it takes {takes}, got {inputs.spec}",
        )
    free = tuple(i for i in inputs.batch if _takes_trace_batch(exported, holders[i]))
    resized = Inputs(inputs.flat, inputs.spec, free).resized()
    program = _build(exported, resized, name, free=dynamic_batch)
    check_weights(program)
    fixed = squeezed_batch_note(program)
    if fixed is not None:
        program = _build(exported, inputs.fixed(), name, free=False)
        return program.replace(notes=(fixed, *program.notes))
    if not dynamic_batch or program.dynamic_batch:
        return program
    why = _FIXED_BY_TORCH if free else "the model was exported with a fixed one"
    return program.replace(notes=(_fixed_note(why), *program.notes))


_FIXED_BY_TORCH = "torch fixes it where it makes the in-place writes functional"


def _fixed_note(why: str) -> Note:
    return Note("batch", "fixed-batch", f"the batch size is fixed: {why}")


def _user_placeholders(exported: ExportedProgram) -> list[fx.Node]:
    specs = exported.graph_signature.input_specs
    names = {s.arg.name for s in specs if s.kind is InputKind.USER_INPUT}
    return [n for n in exported.graph.nodes if n.op == "placeholder" and n.name in names]


def _takes_trace_batch(exported: ExportedProgram, holder: fx.Node) -> bool:
    """Tell whether axis 0 of an input is free and may be 2."""
    size = holder.meta["val"].shape[0]
    if not isinstance(size, torch.SymInt) or not size.node.expr.is_Symbol:
        return False
    allowed = exported.range_constraints.get(size.node.expr)
    return allowed is None or 2 in allowed


def _build(
    exported: ExportedProgram,
    inputs: Inputs,
    name: str,
    *,
    state: Mapping[str, Any] | None = None,
    generated: Mapping[str, str] | None = None,
    free: bool = True,
    input_names: Sequence[str] = (),
) -> Program:
    """Return the program of an exported one; in-place writes may take a second trace.

    Args:
        exported: The trace.
        inputs: The inputs it was traced with.
        name: The program's name.
        state: The model's own state dict: all names of shared tensors, in the model's order.
        generated: The user's stacks behind generated code.
        free: Whether free sizes stay free.
        input_names: Names for the placeholders in place of forward's.
    """
    state = {**(state or {}), **exported.state_dict, **exported.constants}
    tensors = {n: t for n, t in state.items() if isinstance(t, Tensor)}
    for again in (False, True):
        lifted = lift(exported, inputs.flat, _shared_names(tensors), generated or {})
        if not free:
            lifted.free = set()
        if normalise(lifted):
            out_spec: Any = exported.call_spec.out_spec
            specs = inputs.spec, out_spec
            return finish(lifted, specs, name, order=list(tensors), input_names=input_names)
        if again:
            break
        with _tracing():
            exported = exported.run_decompositions({})
    raise CaptureError(
        "the model writes into a tensor in a way that cannot be made functional",
        hint="replace in-place operators by ordinary ones",
    )


def _export(model: nn.Module, inputs: Inputs) -> tuple[ExportedProgram, Inputs, tuple[Note, ...]]:
    """Return the exported model, the inputs it was traced with, and what to say of the batch."""
    if not inputs.batch:
        return _trace(model, inputs), inputs, ()
    traced = inputs.resized()
    try:
        return _call_export(model, traced, traced.dynamic_shapes()), traced, ()
    except Exception as error:
        if is_data_dependent(error):
            raise explain(error, model, traced) from error
        note = fixed_batch_note(error)
    return _trace(model, inputs.fixed()), inputs.fixed(), (note,)


def _trace(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    try:
        return _call_export(model, inputs, None)
    except Exception as error:
        raise explain(error, model, inputs) from error


def _call_export(model: nn.Module, inputs: Inputs, shapes: Any) -> ExportedProgram:
    """Return what torch.export makes of a model, whose results may be dataclasses."""
    args, kwargs = inputs.nested
    try:
        with unchanged(model), _explicit_signature(model, inputs), _tracing():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        if not is_unknown_type(error) or not register_dataclasses(run_eagerly(model, inputs)):
            raise
    return _call_export(model, inputs, shapes)


@contextmanager
def _tracing() -> Iterator[None]:
    """Trace with full stacks, without gradients, fused attention, and torch's chatter.

    With gradients on, every ``torch.no_grad`` block would be a context of its own; with them off,
    ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` would each take their fused path
    and become one opaque operator. Where a trace fails, torch prints half a graph; our error says
    what matters.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    levels = {logging.getLogger(n): logging.getLogger(n).level for n in _CHATTY}
    printed = io.StringIO()
    torch.backends.mha.set_fastpath_enabled(False)
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(printed),
            torch.inference_mode(False),
            torch.no_grad(),
            full_stacks(),
        ):
            warnings.simplefilter("ignore")
            yield
        sys.stderr.write(printed.getvalue())  # what the model itself had to say
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for logger, level in levels.items():
            logger.setLevel(level)


@contextmanager
def _explicit_signature(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Spell out the ``**kwargs`` of forward while it is traced.

    torch.export loses the free sizes of tensors that arrive through ``**kwargs``.
    """
    signature = inspect.signature(model.forward)
    extra = next((p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    _, kwargs = inputs.nested
    named = [k for k in kwargs if k not in signature.parameters]
    if extra is None or not named or "forward" in vars(model):
        yield
        return
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    parameters = [p for p in signature.parameters.values() if p is not extra]
    parameters += [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY) for k in named]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    model.forward = forward
    try:
        yield
    finally:
        del model.forward


# The loggers that speak when a trace fails, which is not always an error of ours.
_CHATTY = (
    "torch.fx.experimental.symbolic_shapes",
    "torch.export",
    "torch._export",
    "torch._subclasses.fake_tensor",
)


def _shared_names(state: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Return the groups of names that stand for one tensor, by the first name of each."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        groups.setdefault(key if tensor.numel() else name, []).append(name)
    return {g[0]: tuple(g) for g in groups.values() if len(g) > 1}
