"""What becomes of quotients of two activations, and of vector norms, in C."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from narrows.backends.c.elementwise import elementwise, tail
from narrows.backends.c.layout import View
from narrows.backends.c.moves import reduced
from narrows.backends.c.sketch import Sketch
from narrows.ir.meta import Meta

# By so much every quotient of codes but 0 lies beyond the codes; by 8 bits and by 16.
BEYOND = {False: 18, True: 33}


def div(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    """Add the step of a quotient."""
    wide = any(Meta(n).dtype is torch.int16 for n in (node, *node.all_input_nodes))
    by = max(args["shift_by"], -BEYOND[wide])
    extra = f"{by}, {args['a_zero']}, {args['b_zero']}, {tail(args)}"
    operands = [sketch.view(args["a"]), sketch.view(args["b"])]
    return elementwise(sketch, node, "quotient", operands, extra)


def vector_norm(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    """Add the step of a norm over axes."""
    # Beyond these shifts a norm is 0, or everything but 0 lies beyond the codes.
    by = max(min(args["shift_by"], 26), -17)
    order = 0 if args["order"] == math.inf else int(args["order"])
    extra = f"{order}, {by}, {args['x_zero']}, {tail(args)}"

    def call(y: str, count: int, x: str, step: str, over: str) -> str:
        return f"vector_norm({y}, {count}, {x}, {step}, {over}, {extra});"

    view = sketch.view(args["x"])
    return reduced(sketch, node, "vector_norm", view, list(args["axes"]), call)


__all__ = ["div", "vector_norm"]
