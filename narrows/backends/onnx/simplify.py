"""onnxsim on a model whose weights stay at home.

onnxsim takes and gives a serialized model, which costs more than its work and stops at 2 GB. It
needs the values of shapes and scalars, not of weights. So large weights travel as inputs of the
model, and are put back afterwards; that keeps their names, too.
"""

from __future__ import annotations

from typing import Any

from narrows.backends.onnx.quiet import quiet, quiet_native
from narrows.errors import LowerError

# Elements from which a constant is a weight rather than a shape, a scalar or a list of indices.
WEIGHT_SIZE = 1024

# Constants larger than this are not computed in advance: they would stand in the file.
FOLD_LIMIT = "1MB"


def simplify(model: Any) -> Any:
    """Return the model simplified by onnxsim; names and shapes of inputs and outputs stay."""
    import onnx_ir as ir
    import onnxsim

    inputs = [(value.name, value.shape) for value in model.graph.inputs]
    outputs = [(value.name, value.shape) for value in model.graph.outputs]
    weights = take_weights(model)
    try:
        with quiet(), quiet_native():
            proto, _ = onnxsim.simplify(ir.to_proto(model), tensor_size_threshold=FOLD_LIMIT)
    except Exception as error:  # it raises what its C++ does
        raise LowerError(
            "onnxsim fails on the exported model",
            why=str(error).strip().partition("\n")[0] or type(error).__name__,
            hint="simplify=False lowers without it",
        ) from error
    simpler = ir.from_proto(proto)
    put_weights(simpler, weights)
    _restore(simpler.graph.inputs, inputs)
    _restore(simpler.graph.outputs, outputs)
    return simpler


def take_weights(model: Any) -> dict[str, Any]:
    """Turn large initializers into inputs, and return them by name."""
    outputs = {value.name for value in model.graph.outputs}
    taken: dict[str, Any] = {}
    for name, value in list(model.graph.initializers.items()):
        if value.const_value.size < WEIGHT_SIZE or name in outputs:
            continue
        taken[name] = value.const_value
        del model.graph.initializers[name]
        value.const_value = None
        model.graph.inputs.append(value)
    return taken


def put_weights(model: Any, weights: dict[str, Any]) -> None:
    """Turn the inputs that stand for weights into initializers; those nobody reads are dropped."""
    for value in list(model.graph.inputs):
        if value.name not in weights:
            continue
        model.graph.inputs.remove(value)
        if value.uses():
            value.const_value = weights[value.name]
            model.graph.register_initializer(value)


def _restore(values: Any, wanted: list[tuple[str, Any]]) -> None:
    """Put values in the given order, with the given shapes; add an input that was dropped."""
    import onnx_ir as ir

    by_name = {value.name: value for value in values}
    assert len(by_name) <= len(wanted), "onnxsim made up an input or an output"
    restored = []
    for name, shape in wanted:
        value = by_name.get(name) or ir.Value(name=name)
        value.shape = shape
        restored.append(value)
    values[:] = restored
