"""What cannot be captured, and the error that says which construct, where, and what to do."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    free_unbacked_symbols,
)
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from narrows.errors import CaptureError, NarrowsError
from narrows.frontend.containers import is_unknown_type
from narrows.frontend.inputs import TRACE_BATCH, Inputs, unsupported
from narrows.frontend.lifted import Lifted
from narrows.frontend.memory import schema_args
from narrows.frontend.provenance import is_user_file, short_path
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops.args import arguments, training_flag
from narrows.ir.program import Note, Program

aten = torch.ops.aten

# Dropout's probability, where it stands beside other work (attention).
_PROBABILITY = "dropout_p"
_BATCH_STATISTICS = frozenset(
    {aten._native_batch_norm_legit.default, aten._native_batch_norm_legit_functional.default}
)
_DATA_HINT = (
    "compute both sides and choose with torch.where, or pass the number as a plain Python argument"
)


# ---------------------------------------------------------------------- before the export


def check_model(model: nn.Module) -> None:
    """Refuse a model in train mode, and weights that no program can hold."""
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "the model is a TorchScript module",
            why="torch.export traces Python code",
            hint="pass the nn.Module that was scripted",
        )
    if model.training and not _from_export(model):
        raise CaptureError(
            f"{type(model).__name__} is in train mode",
            why="BatchNorm and dropout do something else there than at inference",
            hint="call model.eval() before capture",
        )
    for path, module in model.named_modules():
        if ".quantized" in type(module).__module__:
            raise CaptureError(
                f"{path or 'the model'} is already quantized ({type(module).__name__})",
                hint="capture the float model",
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise CaptureError(
                f"weight {name!r} of a lazy module has no shape yet",
                hint="run the model once, model(*example_inputs), before capture",
            )
        problem = unsupported(tensor)
        if problem:
            raise CaptureError(f"weight {name!r} is {problem}", hint="use dense real weights")


def _from_export(model: nn.Module) -> bool:
    """Tell whether ``model`` is ``ExportedProgram.module()``, which has no train or eval mode."""
    return isinstance(model, fx.GraphModule) and "eval" in vars(model)


def reparametrised(model: nn.Module) -> list[Note]:
    """Return a note for every weight that a hook or a parametrization computes in each forward."""
    notes = []
    for path, module in model.named_modules():
        names = [
            getattr(hook, "_tensor_name", getattr(hook, "name", ""))
            for hook in module._forward_pre_hooks.values()
            if type(hook).__module__.startswith("torch.nn.utils")
        ]
        if is_parametrized(module):
            names += list(module.parametrizations)  # type: ignore[arg-type]
        for name in filter(None, names):
            weight = f"{path}.{name}" if path else name
            notes.append(
                Note(
                    weight,
                    "reparametrised",
                    f"{weight!r} is computed in forward from other weights: a plan may name it, "
                    "and becomes a weight of its own where channels go",
                )
            )
    return notes


# ---------------------------------------------------------------------- after the export


def check_draft(lifted: Lifted) -> None:
    """Refuse operators and values that a program cannot hold."""
    for node in lifted.graph.nodes:
        if node.op == "get_attr" and "body" in node.meta:
            continue
        _check_value(lifted, node)
        if node.op == "call_function":
            _check_operator(lifted, node)


def _check_value(lifted: Lifted, node: fx.Node) -> None:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    for item in values:
        problem = unsupported(item) if isinstance(item, Tensor) else ""
        if problem:
            raise CaptureError(
                f"the result is {problem}",
                where=lifted.where(node),
                why="programs compute with dense real numbers",
                hint="keep that part out of the captured module",
            )
        if item is not None and free_unbacked_symbols(item) - set(lifted.sizes):
            raise CaptureError(
                "a size or a number depends on the data of a tensor",
                where=lifted.where(node),
                why="the shapes of a program follow from the shapes of its inputs",
                hint=_DATA_HINT,
            )


def _check_operator(lifted: Lifted, node: fx.Node) -> None:
    target = node.target
    if not isinstance(target, OpOverload):
        return
    given = {a.name: v for a, v in schema_args(node)}
    flag = training_flag(target)
    keeps_statistics = given.get("running_mean") is not None
    training = target in _BATCH_STATISTICS or bool(flag is not None and given.get(flag))
    if training and keeps_statistics:  # with none kept, it is a plain function of its input
        raise CaptureError(
            "BatchNorm uses batch statistics and updates its running ones",
            where=lifted.where(node),
            hint="call model.eval() before the capture or the export",
        )
    if _is_random(target, given):
        raise CaptureError(
            f"{target} draws random numbers",
            where=lifted.where(node),
            why="a program returns the same result for the same inputs",
            hint="give functional dropout training=self.training; pass noise in as an input",
        )


def _is_random(target: OpOverload, given: dict[str, Any]) -> bool:
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    arguments = target._schema.arguments
    value = {a.name: a.default_value for a in arguments if a.has_default_value()} | given
    flag = training_flag(target)
    if flag is not None:
        return bool(value[flag]) and value.get("p") != 0
    return value.get(_PROBABILITY) != 0


def check_weights(program: Program) -> None:
    """Refuse NaN in any weight and infinity in a trained one (masks hold infinities on purpose)."""
    for name, tensor in program.weights.items():
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum())):
            continue
        trained = name not in program.buffers
        bad = ~tensor.isfinite() if trained else tensor.isnan()
        count = int(bad.sum())
        if count:
            raise CaptureError(
                f"weight {name!r} has {count} NaN{' or infinite' if trained else ''} "
                f"entr{'y' if count == 1 else 'ies'} of {tensor.numel()}",
                hint="load a checkpoint that trained well",
            )


# ---------------------------------------------------------------------- when the export fails


def is_data_dependent(error: Exception) -> bool:
    """Tell whether torch.export met control flow on a tensor's data."""
    return isinstance(error, GuardOnDataDependentSymNode)


def explain(error: Exception, model: nn.Module, inputs: Inputs) -> CaptureError:
    """Return the error for a model that torch.export does not trace."""
    place = error_line(error) or _forward_line(model)
    if isinstance(error, NarrowsError):  # a hook of narrows on the model says it better
        return CaptureError(error.what, where=error.where, why=error.why, hint=error.hint)
    if is_data_dependent(error):
        return CaptureError(
            "the control flow, or a size, depends on the data of a tensor",
            where=place,
            why=_first_line(error),
            hint=_DATA_HINT,
        )
    eager = _eager_error(model, inputs)
    if eager is not None:
        return _fails(eager, model, inputs, place)
    text = _first_line(error)
    if is_unknown_type(error):
        return CaptureError(
            "the model returns something that is no tensor",
            where=place,
            why=text.partition(" If this type")[0],
            hint="return tensors in tuples, lists and dicts, or register the class with "
            "torch.utils._pytree.register_pytree_node",
        )
    return CaptureError(
        f"torch.export cannot trace this: {type(error).__name__}: {text}",
        where=place,
        why="a program holds tensor operators only; Python code runs once, at the capture",
        hint="keep numpy, .item() and .tolist() out of forward, or capture the part without them",
    )


def check_dtypes(model: nn.Module, inputs: Inputs) -> None:
    """Refuse example inputs of another type than the weights, if the model cannot take them.

    `torch.export` does not notice: it runs layers without data.
    """
    kinds = {v.dtype for v in inputs.flat if isinstance(v, Tensor)}
    if len(kinds | {p.dtype for p in model.parameters()}) < 2:
        return
    error = _eager_error(model, inputs)
    if error is not None:
        raise _fails(error, model, inputs, _forward_line(model))


def _fails(error: Exception, model: nn.Module, inputs: Inputs, place: str) -> CaptureError:
    """Return the error for a model that does not run on its example inputs."""
    kinds = _precisions(model, inputs)
    hint = "check the shapes and the types of the example inputs"
    if len(kinds) > 1:
        hint = f"they and the weights are {' and '.join(kinds)}: convert one with .to(dtype)"
    return CaptureError(
        f"the model fails on the example inputs: {type(error).__name__}: {_first_line(error)}",
        where=error_line(error) or place,
        hint=hint,
    )


def _precisions(model: nn.Module, inputs: Inputs) -> list[str]:
    """Return the floating-point types among the example inputs and the parameters."""
    tensors = [*(v for v in inputs.flat if isinstance(v, Tensor)), *model.parameters()]
    return sorted({str(t.dtype) for t in tensors if t.is_floating_point()})


def _eager_error(model: nn.Module, inputs: Inputs) -> Exception | None:
    try:
        run_eagerly(model, inputs)
    except Exception as error:
        return error
    return None


def run_eagerly(model: nn.Module, inputs: Inputs) -> Any:
    """Return what the model itself makes of the inputs, which stay as they are, as it does."""
    args, kwargs = inputs.copy().nested
    with torch.no_grad(), unchanged(model):
        return model(*args, **kwargs)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what forward assigns to attributes; those of a traced one would stay without data."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            now = vars(module)
            for name in [n for n, v in now.items() if attributes.get(n, now) is not v]:
                del now[name]
            now.update(attributes)


def error_line(error: BaseException) -> str:
    """Return ``file.py:12  code`` of the innermost user frame that an exception passed."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_user_file(frame.filename):
            return f"{short_path(frame.filename)}:{frame.lineno}  {frame.line}"
    return ""


def _forward_line(model: nn.Module) -> str:
    forward = inspect.unwrap(type(model).forward)
    code = getattr(forward, "__code__", None)
    name = f"{type(model).__qualname__}.forward"
    return f"{short_path(code.co_filename)}:{code.co_firstlineno}  {name}" if code else name


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def squeezed_batch_note(program: Program) -> Note | None:
    """Return why the batch cannot be free: the code takes its axis away where it is 1 long.

    The number of axes then depends on the batch, and so does what any later operator means.
    """
    for node in program.graph.nodes:
        if node.target not in _SQUEEZES:
            continue
        given = arguments(node)
        shape, free = shape_of(given["self"]), Meta(given["self"]).dynamic
        axes = given.get("dim", range(len(shape)))
        axes = [axes] if isinstance(axes, int) else axes
        if any(a % max(len(shape), 1) in free and shape[a] == TRACE_BATCH for a in axes):
            meta = Meta(node)
            place = f" ({meta.source}  {meta.code})" if meta.source else ""
            message = (
                "the batch size is fixed to the example's: the code squeezes the batch's axis, "
                f"which takes it away from a batch of 1{place}; flatten(1), or squeeze with the "
                "axes that are meant, leaves it free"
            )
            return Note("batch", "fixed-batch", message, source=meta.source)
    return None


_SQUEEZES = frozenset({aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims})
_SIZE = re.compile(r"L\[[^ ]*?\.size\(\)\[0\]")  # how torch spells the size of an input
_GUARD = "satisfy the generated guard "


def fixed_batch_note(error: Exception) -> Note:
    """Return the note that says why the batch is not free, and which line fixes it."""
    source, code = _guarding_line(error)
    bullets = [
        line.strip().removeprefix("- ")
        for line in str(error).splitlines()
        if line.lstrip().startswith("- ")
    ]
    why = _SIZE.sub("batch", bullets[0] if bullets else _first_line(error))
    if "specialized it to be a constant" in why:
        why = "the code makes a constant of it"
    elif _GUARD in why:
        why = f"the code asks for {why.partition(_GUARD)[2]}"
    place = f" ({source}  {code})" if source else ""
    message = f"the batch size is fixed to the example's: {why}{place}"
    return Note("batch", "fixed-batch", message, source=source)


def _guarding_line(error: BaseException) -> tuple[str, str]:
    """Return the user's line that first asked something of the batch, if torch knows it."""
    trace = error.__traceback__
    while trace is not None:
        mode = trace.tb_frame.f_locals.get("fake_mode")
        guards = getattr(getattr(mode, "shape_env", None), "guards", ())
        for guard in guards:
            frame = guard.sloc.framework_loc  # a frame of the model's own, or of torch's
            if is_user_file(getattr(frame, "filename", "<")):
                return f"{short_path(frame.filename)}:{frame.lineno}", frame.line or ""
        trace = trace.tb_next
    line = error_line(error).split("  ", 1)
    return (line[0], line[1]) if len(line) == 2 else ("", "")
