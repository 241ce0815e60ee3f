"""The operators that rewrites and passes write, one for each meaning.

Captured programs may hold other spellings; what narrows adds to a graph is spelled like this, and
its backends are tried on that.
"""

from __future__ import annotations

import torch

aten = torch.ops.aten

ADD = aten.add.Tensor
MULTIPLY = aten.mul.Tensor
CLAMP = aten.clamp.default
# ``x`` where a mask is true, else a number.
CHOOSE = aten.where.ScalarOther
# A number where a mask is true, else ``x``.
HIDE = aten.where.ScalarSelf
NOT = aten.logical_not.default
EITHER = aten.logical_or.default
SOFTMAX = aten.softmax.int
# Its shares of a row that is minus infinity everywhere are 0, not NaN.
SAFE_SOFTMAX = aten._safe_softmax.default

LINEAR = aten.linear.default
MATMUL = aten.matmul.default
# By the number of axes of the operand: batch, channels and 1 to 3 of space.
CONVOLUTION = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}

CAST = aten.to.dtype
ALIAS = aten.alias.default
CONTIGUOUS = aten.contiguous.default
SLICE = aten.slice.Tensor
PICK = aten.index_select.default
SQUEEZE = aten.squeeze.dim
TURN = aten.permute.default
REPEAT_EACH = aten.repeat_interleave.self_int
