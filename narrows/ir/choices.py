"""What may be chosen among the exact forms of a pruned program: wider reads, wider tensors, another
order.

The smallest program is not always the fastest one. A consumer may read channels that count as zero
for it rather than have the others copied together; a tensor may keep channels that nobody reads
rather than have an awkward width; and the channels of a tensor may stand in any order. `Choices`
says which of these to do, `narrows.ir.program.Pruning` what they are about, and
`narrows.ir.rewrite` does them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from narrows.ir.labels import Bools, Ints


@dataclass(frozen=True, eq=False)
class Choices:
    """Deviations from the smallest form, all by node name in the unpruned program.

    Attributes:
        forced: Labels that a node's result holds although nobody needs them.
        columns: The input channels that a contraction reads, those included that count as zero
            for it. It reads no others, even where reading them would spare a copy.
        order: For a node that makes channels, a rank per label: lower ones come first.
    """

    forced: Mapping[str, Bools] = field(default_factory=dict)
    columns: Mapping[str, Bools] = field(default_factory=dict)
    order: Mapping[str, Ints] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether anything differs from the smallest form."""
        return bool(self.forced or self.columns or self.order)

    def holds_like(self, other: Choices) -> bool:
        """Whether both were made with the same channels, in whatever order."""
        own, others = (self.forced, self.columns), (other.forced, other.columns)
        return all(a is b or not (a or b) for a, b in zip(own, others, strict=True))
