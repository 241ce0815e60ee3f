"""A program run without its data: shapes, dtypes and strides at no cost of arithmetic.

Weights and examples go to torch's ``meta`` device, which holds no numbers. An operator that names a
device of its own (``arange``, ``x.to(device, dtype)``, ``type_as``) is given that one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from narrows.ir.graph import Observe, interpret
from narrows.ir.ops.args import with_argument
from narrows.ir.program import Program


def run_blank(program: Program, observe: Observe) -> None:
    """Run a program on tensors without data; ``observe`` is called with every node and value.

    An operator that torch cannot run so (one that looks at numbers) makes it a run on the examples.
    """
    inputs = [_blank(e) for e in program.examples]
    weights = {n: _blank(t) for n, t in program.weights.items()}
    seen: list[tuple[fx.Node, Any]] = []
    try:
        interpret(
            program.graph, inputs, weights, observe=lambda n, v: seen.append((n, v)), call=_call
        )
    except (NotImplementedError, RuntimeError):
        with torch.no_grad():
            interpret(program.graph, program.examples, program.weights, observe=observe)
        return
    for node, value in seen:
        observe(node, value)


def _blank(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


def _call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target: Any = node.target
    args, kwargs = with_argument(target, args, kwargs, "device", "meta")
    return target(*args, **kwargs)
