"""Kernels of our own as tensor expressions; `narrows.backends.tvm.schedules` makes them fast.

A kernel marks its main block with ``attrs={ROLE: ...}``, by which its schedule finds it.
"""

ROLE = "narrows.role"
LANES = "narrows.lanes"  # the longest vectors that a block is written for

CONTRACTION = "contraction"  # sums over a weight that is packed by vectors of output channels
DOT = "dot"  # one over codes and weights, with those of a quad in its innermost sum
DEPTHWISE = "depthwise"  # one filter a channel
COLUMNS = "columns"  # what a filter of integers reads, four rows in a number
PADDING = "padding"  # the operand with zeros around it
ROWS = "rows"  # statistics of rows, and what is done with them
WINDOW = "window"  # pooling

# Of a whole kernel: that it works element by element on a tensor of the result's shape. TVM sees
# that by itself only where the dtype is the same; only such kernels are fused with a sum before.
ALIKE = "narrows.alike"
