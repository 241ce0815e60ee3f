"""`Costs`: what operators cost on a target, as far as anyone asks who chooses a program's form.

The passes that choose widths, reads, orders and kernels ask these questions and no others, so a
processor of any kind fits: its class has to say the seconds of a `Work`. All other questions have
the answers of a runtime that computes operator by operator, keeps tensors as PyTorch does, and
likes no width better than the next.

Many runtimes do not. Some keep tensors in a layout of their own, which only some widths allow; what
has another width lies *plain*, as PyTorch has it, and pays for the changes between the two. Some
compute an operator inside the one before it. A class that says so is
`narrows.backends.onnx.staircase.StairTable`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from narrows.ir.account import OpCost, account
from narrows.ir.program import Program
from narrows.ir.work import Work

# Other spellings of an operator, for which a runtime may have another kernel.
DILATED = "dilated"
CHANNELS_LAST = "channels-last"
SPELLINGS = (DILATED, CHANNELS_LAST)

# Steps in which widths are worth trying: vector registers, blocks of a layout, sets of blocks.
STEPS = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Joined:
    """What becomes of the operands of a join of channels (a concat).

    Attributes:
        seconds: What that costs beyond the join itself.
        plain: Whether the result lies plain although the runtime has a layout of its own, and so
            does what follows, up to the next convolution.
    """

    seconds: float = 0.0
    plain: bool = False


class Costs(ABC):
    """Seconds of operators and programs on one target.

    Attributes:
        name: What they are the costs of, for messages: ``onnxruntime``.
    """

    name: str

    @property
    def origin(self) -> str:
        """What they are, and where they were measured, for a person."""
        return self.name

    # ------------------------------------------------------------------ operators

    @abstractmethod
    def seconds(self, work: Work) -> float:
        """Return the seconds of one call of an operator, among others of its like.

        Where it cannot run in the layout that its neighbours have, that includes the changes of
        layout before and after it.
        """

    @property
    def least_seconds(self) -> float:
        """The seconds that a call takes however little it does."""
        return 0.0

    def passing_seconds(self, work: Work, *, plain: bool = False) -> float:
        """Return the seconds of an operator that hands its channels on to the next one.

        Args:
            work: What it does. What a join pays for layouts is told by `join`, and not here.
            plain: Whether it reads what lies plain and may leave it so.
        """
        return self.seconds(work)

    def fuses(self, work: Work) -> bool:
        """Whether a convolution, or a norm, takes in an operator that follows it."""
        return False

    @property
    def fuses_sums(self) -> bool:
        """Whether a convolution takes in the sum of its result and another tensor."""
        return False

    def fused_seconds(self, work: Work) -> float:
        """Return the seconds of an operator inside the convolution that took it in."""
        return 0.0

    @property
    def has_spellings(self) -> bool:
        """Whether the runtime has other kernels for other spellings of an operator."""
        return False

    def spelling(self, work: Work) -> str:
        """Return which of `SPELLINGS` has the fastest kernel for a work; empty for the usual one.

        The seconds of a work are those of its fastest spelling.
        """
        return ""

    # ------------------------------------------------------------------ widths

    @property
    def step(self) -> int:
        """What widths should be multiples of: time rises from one multiple to the next.

        1 where every channel counts.
        """
        return 1

    @property
    def least_step(self) -> int:
        """What a width that is less than a `step` should be a multiple of."""
        return 1

    def widths(self, least: int, most: int) -> list[int]:
        """Return the widths worth trying from ``least`` to ``most``, both included, ascending."""
        if most <= least:
            return [least]
        found = {least, most, *(rounded(least, step) for step in STEPS)}
        return sorted(w for w in found if least <= w <= most)

    def fits(self, work: Work) -> bool:
        """Whether a work has widths for which the runtime has its fast kernels.

        What does not fit, and would if its inputs were a multiple of `step`, may get channels of
        zeros.
        """
        return True

    # ------------------------------------------------------------------ moving channels

    def copy_seconds(
        self,
        kind: str,
        have: int,
        take: int,
        space: Sequence[int],
        batch: int = 1,
        *,
        plain: bool = False,
    ) -> float:
        """Return what a copy of channels costs.

        Args:
            kind: ``gather``, ``pick`` (a gather of channels that lie innermost), ``slice`` or
                ``concat``.
            have: How many there are (of a concat: over all operands).
            take: How many are taken.
            space: The positions, ``(height, width)``.
            batch: The number of examples.
            plain: Whether it stands among tensors that lie plain; else it may have to leave the
                runtime's own layout and come back.
        """
        return self.seconds(copied(kind, have, take, tuple(space), batch))

    @property
    def join_step(self) -> int:
        """What each operand's width must be a multiple of for a join to stay in the fast layout.

        1 where a join costs the same whatever its operands are.
        """
        return 1

    def join(self, work: Work, parts: Sequence[tuple[int, int]], width: int) -> Joined:
        """Return what becomes of a join's operands.

        Args:
            work: The join, at full width.
            parts: Per operand how many channels it has and how many of them are joined.
            width: How many come out.
        """
        return Joined()

    # ------------------------------------------------------------------ whole programs

    def account(self, program: Program, batch: int | None = None) -> list[OpCost]:
        """Return what every node of a program costs, in parts.

        Args:
            program: The program, before lowering; what the runtime folds or fuses costs nothing, or
                `fused_seconds`.
            batch: The number of examples; that of the program's example inputs by default.
        """
        return account(self, program, batch)

    def predict(self, program: Program, batch: int | None = None) -> list[tuple[str, float]]:
        """Return the seconds of every node of a program, changes of layout included."""
        return [(op.node, op.total) for op in self.account(program, batch)]

    def again(self, op: OpCost, work: Work) -> float:
        """Return the seconds of an operator of an account at other widths.

        It is computed as it is there; the changes of layout that the account has are not counted.
        """
        return self.seconds(work)


def copied(kind: str, have: int, take: int, space: tuple[int, ...], batch: int) -> Work:
    """Return the work of a copy of channels; see `Costs.copy_seconds`."""
    return Work(kind, batch=batch, inputs=have, outputs=take, space=space, source=space)


def rounded(width: int, step: int) -> int:
    """Return the next multiple of ``step``."""
    return -(-width // step) * step


__all__ = [
    "CHANNELS_LAST", "DILATED", "SPELLINGS", "Costs", "Joined", "OpCost", "copied", "rounded",
]  # fmt: skip
