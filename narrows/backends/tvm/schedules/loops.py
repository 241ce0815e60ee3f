"""`Kernel`: one PrimFunc under a schedule, its blocks by what they do, and its loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import s_tir, tirx
from tvm.ir import IRModule

from narrows.backends.tvm.kernels import PADDING, ROLE

PARTITION = "pragma_loop_partition_hint"

REDUCTION = 2  # the iteration type of TVM's reduction axes


class Kernel:
    """A PrimFunc that is being scheduled.

    Attributes:
        schedule: TVM's schedule.
    """

    def __init__(self, function: tirx.PrimFunc) -> None:
        self.schedule: Any = s_tir.Schedule(IRModule({"main": function}))

    @property
    def blocks(self) -> list[Any]:
        """The blocks in execution order."""
        try:
            root = self.schedule.get_sblock("root")
        except s_tir.ScheduleError:  # a kernel that TVM wrote as loops, which is left as it is
            return []
        return list(self.schedule.get_child_blocks(root))

    def block(self, rv: Any) -> Any:
        """Return the block that a variable of the schedule stands for."""
        return self.schedule.get(rv)

    def same(self, a: Any, b: Any) -> bool:
        """Whether two variables of the schedule stand for one block."""
        return self.block(a).name_hint == self.block(b).name_hint

    def role(self, rv: Any) -> str:
        """Return the role of a block, or an empty string."""
        return str(self.block(rv).annotations.get(ROLE, ""))

    def with_role(self, *roles: str) -> Any:
        """Return the first block that has one of the roles, or ``None``."""
        return next((b for b in self.blocks if self.role(b) in roles), None)

    def dtype(self, rv: Any) -> str:
        """Return the dtype of what a block writes."""
        return str(self.block(rv).writes[0].source.dtype)

    def _axes(self, rv: Any, reduction: bool) -> list[int]:
        axes = self.block(rv).iter_vars
        return [int(axis.dom.extent) for axis in axes if (axis.iter_type == REDUCTION) is reduction]

    def extents(self, rv: Any) -> list[int]:
        """Return the sizes of the axes of a block's result."""
        return self._axes(rv, reduction=False)

    def reductions(self, rv: Any) -> list[int]:
        """Return the sizes of the axes that a block sums over."""
        return self._axes(rv, reduction=True)

    def looks_up(self) -> bool:
        """Whether a block reads at indices that are data: they name more than its axes."""
        for block in map(self.block, self.blocks):
            axes = [axis.var for axis in block.iter_vars]
            for span in (span for read in block.reads for span in read.region):
                named = tirx.analysis.undefined_vars(span.min)
                if not all(any(v.same_as(a) for a in axes) for v in named):
                    return True
        return False

    def follows(self, rv: Any, main: Any) -> bool:
        """Whether a block computes each element from the same element of what ``main`` writes."""
        if self.extents(rv) != self.extents(main):
            return False
        block, written = self.block(rv), self.block(main).writes[0].source
        axes = [axis for axis in block.iter_vars if axis.iter_type != REDUCTION]
        for read in block.reads:
            if read.source.same_as(written):
                pairs = zip(read.region, axes, strict=True)
                return all(r.min.same_as(a.var) or int(a.dom.extent) == 1 for r, a in pairs)
        return False

    # ------------------------------------------------------------------ steps

    def inline(self, keep: Sequence[Any]) -> Any:
        """Inline every element-wise block but those to keep and the last one; return the last."""
        names = {self.block(b).name_hint for b in keep}
        for block in self.blocks[:-1]:
            if self.block(block).name_hint in names or self.role(block) == PADDING:
                continue
            if not self.reductions(block):
                self.schedule.compute_inline(block)
        return self.blocks[-1]

    def extent(self, loop: Any) -> int:
        """Return how often a loop runs."""
        return int(self.schedule.get(loop).extent)

    def vectorize(self, loop: Any, lanes: int) -> tuple[Any, Any]:
        """Split a loop into vectors, with a remainder where they do not fill it; return both.

        There is no remainder where indices are data: TVM narrows them to 32 bits in the loop's
        bound, but not in what it bounds, and cannot compare the two.
        """
        size = self.extent(loop)
        width = min(lanes, size)
        if size % width and self.looks_up():
            width = max(w for w in range(1, width) if size % w == 0)
        outer, inner = self.schedule.split(loop, [None, width])
        self.schedule.vectorize(inner)
        if size % width:
            self.schedule.annotate(outer, PARTITION, 1)
        return outer, inner

    def parallel(self, loops: Sequence[Any]) -> Any:
        """Fuse loops and run them on all cores; return the fused one."""
        fused = self.schedule.fuse(*loops) if len(loops) > 1 else loops[0]
        self.schedule.parallel(fused)
        return fused
