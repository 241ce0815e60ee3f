"""What a program says of itself: its passes' notes, where its weights came from, marks on nodes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """One thing a pass wants a person to know.

    Attributes:
        where: The node or weight the note is about.
        reason: A short stable word that reports can count by (``padding``, ``groups``, ``merge``
            ...).
        message: The sentence for a person.
        channels: How many channels of a layer's inputs or outputs stay, as plans count them,
            although the plan drops them or nothing needs them; 0 where a note is about anything
            else. A channel counts where it is made, not again in what passes it on.
        source: The user's source line, ``file:line``.
    """

    where: str
    reason: str
    message: str
    channels: int = 0
    source: str = ""


@dataclass(frozen=True)
class Origin:
    """Where a rewritten weight came from: ``new = old[index[0]][:, index[1]]...``, and perhaps a
    bias.

    Attributes:
        name: The original weight's fully qualified name.
        shape: The original shape.
        index: Per axis the kept original indices in their new order, or ``None`` for the whole
            axis; -1 is a channel of zeros that was added. Where the groups of a convolution keep
            different channels, one axis has a tuple per kept index of the other sliced axis
            instead: row ``i`` takes ``index[axis][i]``.
    """

    name: str
    shape: tuple[int, ...]
    index: tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True)
class Mark:
    """What the last pass did to a node, for dumps.

    Attributes:
        was: The shape before it, where it has another one now.
        remark: What the pass says of it.
    """

    was: tuple[int, ...] | None = None
    remark: str = ""
