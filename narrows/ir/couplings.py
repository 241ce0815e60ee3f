"""Couplings: the channels that live or die together under a constrained plan.

An element-wise operator, a norm or a move of data needs its result's channels and its operands' to
be the same ones; a contraction sums its input's channels and makes fresh ones, so there a coupling
ends. `couplings` joins channels along the former and says which weight axes follow each set. An
input, an output, a norm's statistics, an operator without a row are barriers, each with a reason.

Where an operator reads channels as a grid, they stay rectangular: a grouped convolution or a head
of attention loses the channel at one position in every group or head alike; a norm over groups, a
depthwise convolution with a multiplier or a softmax over branches loses the whole group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from narrows.ir.channels import Facts, analyse
from narrows.ir.joining import Joined, is_identity
from narrows.ir.labels import Ints
from narrows.ir.ops.row import WeightAxis
from narrows.ir.program import Program

ROLES = {"out": "made", "in": "summed over", "with": "scaled or shifted"}


@dataclass(frozen=True, eq=False)
class Member:
    """A weight axis that follows a coupling.

    Attributes:
        weight: The weight's fully qualified name.
        axis: The axis of the weight.
        role: ``out`` where the axis makes the channels, ``in`` where it sums over them, ``with``
            where it only scales or shifts them.
        positions: The indices of the axis, ``[width, indices per channel]``, ascending in each row.
    """

    weight: str
    axis: int
    role: str
    positions: Ints

    @cached_property
    def indices(self) -> tuple[tuple[int, ...], ...]:
        """The indices of the axis, per channel of the coupling."""
        return tuple(map(tuple, self.positions.tolist()))

    def at(self, channels: Sequence[int]) -> tuple[int, ...]:
        """Return the sorted indices that belong to some channels of the coupling."""
        return tuple(np.sort(self.positions[list(channels)], axis=None).tolist())


@dataclass(frozen=True, eq=False)
class Coupling:
    """Channels that live or die together, one by one.

    Attributes:
        name: The first node that makes them; ``name#2`` for the second coupling that begins there.
        members: The weight axes that follow them, in the graph's order.
        width: How many channels there are.
        barrier: Why none of them can be removed, or an empty string.
        nodes: The nodes whose tensors hold them, in the graph's order.
    """

    name: str
    members: tuple[Member, ...]
    width: int
    barrier: str
    nodes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the coupling as JSON values, the members' indices left out."""
        members = [{"weight": m.weight, "axis": m.axis, "role": m.role} for m in self.members]
        return {
            "name": self.name,
            "width": self.width,
            "barrier": self.barrier,
            "nodes": list(self.nodes),
            "members": members,
        }


def couplings(program: Program, facts: Facts | None = None) -> tuple[Coupling, ...]:
    """Return the couplings of a program that a weight makes or reads, in the graph's order.

    Args:
        program: The program.
        facts: Its analysis, where there is one already.
    """
    joined = Joined(analyse(program) if facts is None else facts)
    joined.settle()
    return _Footprints(joined).couplings()


def to_table(found: Iterable[Coupling]) -> str:
    """Return couplings for a person: a line each with width and barrier, then the weight axes."""
    lines = []
    for c in found:
        channels = "1 channel" if c.width == 1 else f"{c.width} channels"
        lines.append(f"{c.name}  {channels}" + (f"  stays whole: {c.barrier}" if c.barrier else ""))
        wide = max((len(m.weight) for m in c.members), default=0)
        lines += [f"  {m.weight:{wide}}  axis {m.axis}  {ROLES[m.role]}" for m in c.members]
    return "\n".join(lines)


# ---------------------------------------------------------------------- sorting into couplings


class _Footprints:
    """Components that show up in the same places make one coupling.

    A *track* is an array of channels that nodes or weight axes have in common.
    """

    def __init__(self, joined: Joined) -> None:
        self.joined = joined
        self._tracks: list[Ints] = []
        self._number: dict[int, int] = {}
        self._nodes: list[list[str]] = []
        self._axes: list[list[WeightAxis]] = []
        for node, channels in joined.channels.items():
            self._nodes[self._track(channels)].append(node.name)
        for axis in joined.axes:
            channels = joined.channels[axis.holder]
            if not is_identity(axis.labels, len(channels)):
                channels = channels[axis.labels]
            self._axes[self._track(channels)].append(axis)

    def _track(self, channels: Ints) -> int:
        number = self._number.setdefault(id(channels), len(self._tracks))
        if number == len(self._tracks):
            self._tracks.append(channels)  # which also keeps its id from being used again
            self._nodes.append([])
            self._axes.append([])
        return number

    def couplings(self) -> tuple[Coupling, ...]:
        """Return the couplings that a weight makes or reads."""
        component = self.joined.component
        roots = np.flatnonzero(component == np.arange(len(component)))
        dense = np.cumsum(component == np.arange(len(component))) - 1
        tracks = [dense[component[t]] for t in self._tracks]
        prints = self._prints(tracks, len(roots))
        numbers: dict[tuple[bytes, str], int] = {}
        keys = zip(prints, self.joined.reasons(), strict=True)
        group = np.array([numbers.setdefault(k, len(numbers)) for k in keys], dtype=np.int64)
        widths = np.bincount(group, minlength=len(numbers))
        channel = np.empty(len(roots), dtype=np.int64)
        channel[np.argsort(group, kind="stable")] = _count_up(widths)
        nodes: list[list[str]] = [[] for _ in numbers]
        members: list[list[tuple[WeightAxis, Ints]]] = [[] for _ in numbers]
        for number, track in enumerate(tracks):
            for g, positions in _parted(group[track], channel[track], widths):
                nodes[g] += self._nodes[number]
                members[g] += [(axis, positions) for axis in self._axes[number]]
        reasons = [reason for _, reason in numbers]
        return self._named(nodes, members, widths.tolist(), reasons)

    @staticmethod
    def _prints(tracks: list[Ints], count: int) -> list[bytes]:
        """Return per component the tracks it is on, as often as it is there."""
        if not tracks:
            return []
        number = np.repeat(np.arange(len(tracks)), [len(t) for t in tracks])
        code = np.sort(np.concatenate(tracks) * len(tracks) + number)
        starts = np.searchsorted(code, np.arange(count + 1) * len(tracks)).tolist()
        number = code % len(tracks)
        return [number[a:b].tobytes() for a, b in pairwise(starts)]

    def _named(
        self,
        nodes: list[list[str]],
        members: list[list[tuple[WeightAxis, Ints]]],
        widths: list[int],
        reasons: list[str],
    ) -> tuple[Coupling, ...]:
        place = {node.name: i for i, node in enumerate(self.joined.facts.program.graph.nodes)}
        order = {id(axis): i for i, axis in enumerate(self.joined.axes)}
        found: list[Coupling] = []
        names: Counter[str] = Counter()
        for held, axes, width, reason in zip(nodes, members, widths, reasons, strict=True):
            axes.sort(key=lambda a: order[id(a[0])])
            held.sort(key=place.__getitem__)
            roles = {a.role for a, _ in axes}
            if not roles & {"out", "in"}:
                continue
            name = next((a.holder.name for a, _ in axes if a.role == "out"), held[0])
            names[name] += 1
            found.append(
                Coupling(
                    name=name if names[name] == 1 else f"{name}#{names[name]}",
                    members=tuple(Member(str(a.weight.target), a.axis, a.role, p) for a, p in axes),
                    width=width,
                    barrier=reason or ("" if "out" in roles else "no weight makes them"),
                    nodes=tuple(held),
                )
            )
        return tuple(found)


def _count_up(widths: Ints) -> Ints:
    """Return ``0 .. w-1`` for each of several widths, one after the other."""
    return np.arange(int(widths.sum())) - np.repeat(np.cumsum(widths) - widths, widths)


def _parted(group: Ints, channel: Ints, widths: Ints) -> Iterator[tuple[int, Ints]]:
    """Yield the couplings on a track, each with the places of its channels: ``[width, places]``."""
    if not len(group):  # a part of no width
        return
    if group[0] == group[-1] and (group == group[0]).all():
        one = int(group[0])
        yield one, np.argsort(channel, kind="stable").reshape(widths[one], -1)
        return
    order = np.lexsort((channel, group))
    numbers, starts = np.unique(group[order], return_index=True)
    for number, places in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
        yield number, places.reshape(widths[number], -1)
