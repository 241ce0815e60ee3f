"""A float program as an ONNX model, written operator by operator from its arguments.

`narrows.backends.onnx.export` gives any program to ``torch.onnx``, which takes seconds, and more
than twice as many for a program twice as long. The operators that nearly all networks are made of
have a rule here, one small function each, and a program of these alone is written in a fraction of
that. What comes out is what the export gives: the same operators, values named after the program's
nodes, weights under their names. A program with one operator, type or free size that no rule is
for is exported as a whole.

* `narrows.backends.onnx.floats.finding`: which rule a node has.
* `narrows.backends.onnx.floats.layers`: convolutions, products, norms, attention, pooling.
* `narrows.backends.onnx.floats.pointwise`: functions of one and two numbers, reductions.
* `narrows.backends.onnx.floats.moving`: what moves numbers or fills in between them.
"""

from __future__ import annotations

from narrows.backends.onnx.floats.finding import rule_of
from narrows.backends.onnx.floats.writing import written

__all__ = ["rule_of", "written"]
