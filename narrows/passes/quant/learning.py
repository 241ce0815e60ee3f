"""`Learning`: how a reconstruction learns, and for how long."""

from __future__ import annotations

import os
from dataclasses import dataclass

from narrows.errors import UsageError
from narrows.ir.budget import seconds_of

LOSSES = ("l2", "norm")


@dataclass(frozen=True)
class Learning:
    """How ``method="rapq"`` learns; see `narrows.quantize`.

    Attributes:
        budget: Iterations of all blocks together, or a time: ``"600s"``, ``"10m"``, ``"2h"``.
        checkpoint: A file that keeps what was done, and from which the same call goes on.
        loss: ``l2``, or ``norm``: ``L_p`` with a ``p`` from 1 to 3 by the gains of the block's
            last batch norm.
        seed: What chance comes from.
        batch: How many samples an iteration takes.
        drop: The share of activations that are left unrounded while a block is learned.
        device: Where it runs; CUDA if there is one.
    """

    budget: int | str | None = None
    checkpoint: str | os.PathLike[str] | None = None
    loss: str = "l2"
    seed: int = 0
    batch: int = 32
    drop: float = 0.5
    device: str | None = None

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UsageError(f"loss is {' or '.join(LOSSES)}, got {self.loss!r}")
        whole = isinstance(self.budget, int) and not isinstance(self.budget, bool)
        if not (self.budget is None or isinstance(self.budget, str) or whole):
            raise UsageError(f"a budget is a number of iterations or a time, got {self.budget!r}")
        if whole and self.budget < 0:  # type: ignore[operator]
            raise UsageError(f"a budget of {self.budget} iterations is negative")
        if not isinstance(self.checkpoint, str | os.PathLike | None):
            raise UsageError(f"checkpoint is the path of a file, got {self.checkpoint!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise UsageError(f"seed is a whole number, got {self.seed!r}")
        self.seconds  # noqa: B018  (refuses what is no time)

    @property
    def seconds(self) -> float | None:
        """The budget as a time, if it is one."""
        if not isinstance(self.budget, str):
            return None
        seconds = seconds_of(self.budget)
        if seconds is None:
            raise UsageError(
                f"budget {self.budget!r} is no time",
                hint="20000 is a number of iterations; '600s', '10m' and '2h' are times",
            )
        return seconds


__all__ = ["LOSSES", "Learning"]
