"""`PQTree`: all the orders of some leaves in which given sets of leaves are intervals.

The structure is that of Booth & Lueker, "Testing for the consecutive ones property, interval
graphs, and graph planarity using PQ-tree algorithms" (1976). The children of a P node may stand in
any order, those of a Q node in theirs or the reverse; what the tree can be read as is exactly what
its sets allow. The reduction is one of our own, for few leaves and many trials: a node never
changes once made, so to keep a tree is to keep its root; every node carries the leaves below it as
the bits of one integer, so that a subtree that a set misses or covers costs one operation; and the
leaves right below a P node are no nodes, but bits as well, so that all of them cost one operation.

A set costs the children of the nodes on the way down to where it splits, and those of the nodes
that it splits: never more than four looks per leaf, and mostly far fewer.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

import numpy as np

__all__ = ["Node", "PQTree"]

_REDUCTION = 16  # looks that a reduction is worth beside those at children


class Node:
    """A node of the tree, never changed once made.

    Attributes:
        leaves: The leaves below it: bit i is leaf i.
        children: The nodes right below it; none for a single leaf.
        loose: The leaves right below it, of a P node. A single leaf is a P node of one.
        ordered: Whether it is a Q node.
    """

    __slots__ = ("children", "leaves", "loose", "ordered")

    def __init__(
        self, leaves: int, children: tuple[Node, ...] = (), loose: int = 0, ordered: bool = False
    ) -> None:
        self.leaves, self.children, self.loose, self.ordered = leaves, children, loose, ordered


class PQTree:
    """The orders of the leaves ``0 .. leaves - 1`` in which the sets reduced so far are intervals.

    Attributes:
        root: The tree; put an older root back to undo reductions.
        looks: The children looked at so far, plus a constant for each reduction: what the
            reductions cost, in a unit that does not depend on the machine.
    """

    def __init__(self, leaves: int) -> None:
        self.root = _any_order([], (1 << leaves) - 1)
        self.looks = 0

    def reduce(self, subset: int) -> bool:
        """Demand that the leaves of ``subset`` (bit i is leaf i) be an interval.

        Returns:
            Whether some order is left. If none is, the tree stays as it was.
        """
        self.looks += _REDUCTION
        if not subset:
            return True
        path: list[tuple[Node, int]] = []
        node = self.root
        while node.leaves != subset:
            if subset & node.loose:
                if not subset & (subset - 1):
                    return True
                break
            place = 0
            while not node.children[place].leaves & subset:
                place += 1
            self.looks += place + 1
            child = node.children[place]
            if subset & ~child.leaves:
                break
            path.append((node, place))
            node = child
        else:
            return True
        joined = self._joined(node, subset)
        if joined is None:
            return False
        for parent, place in reversed(path):
            around = parent.children
            children = (*around[:place], joined, *around[place + 1 :])
            joined = Node(parent.leaves, children, parent.loose, parent.ordered)
        self.root = joined
        return True

    def reduce_all(self, subsets: Iterable[int]) -> bool:
        """Demand that every one of ``subsets`` be an interval; stop at the first that cannot."""
        return all(self.reduce(subset) for subset in subsets)

    def nearest_order(self, places: Sequence[Sequence[int]], blocks: Container[int]) -> list[int]:
        """Read the tree as the order that is nearest to a given one.

        Nearest is by the sum of squared displacements. It is least where the sum over the leaves of
        the old place times the new one is greatest, and that sum has one term per node, the sizes
        and old places of the node's children, so each node is arranged for itself: the children of
        a P node by mean old place, those of a Q node in the better of two directions.

        Args:
            places: The old places of each leaf: a leaf may stand for several channels that belong
                to the same sets, whether or not they have to be neighbours.
            blocks: The sets, so that a leaf which is itself one of them stays in one piece.

        Returns:
            The old places in their new order.
        """
        sums: dict[int, tuple[int, int, int]] = {}  # by leaves: size, sum and first of the places
        for node in reversed(self._nodes()):
            below = [sums[child.leaves] for child in node.children]
            for leaf in _bits(node.loose):
                own = places[leaf]
                below.append((len(own), sum(own), min(own)))
            sizes, totals, firsts = zip(*below, strict=True)
            sums[node.leaves] = sum(sizes), sum(totals), min(firsts)

        order: list[int] = []
        stack: list[Node | Sequence[int]] = [self.root]
        while stack:
            item = stack.pop()
            if not isinstance(item, Node):
                order.extend(item)
            elif item.ordered:
                forward = [sums[child.leaves] for child in item.children]
                backward = forward[::-1]
                gain = _agreement(forward) - _agreement(backward)
                turned = gain < 0 or (gain == 0 and backward[0][2] < forward[0][2])
                stack.extend(item.children if turned else item.children[::-1])
            else:
                stack.extend(_by_mean(item, sums, places, blocks)[::-1])
        return order

    def _nodes(self) -> list[Node]:
        """Return every node, parents before their children."""
        nodes = [self.root]
        for node in nodes:
            nodes.extend(node.children)
        return nodes

    def _joined(self, node: Node, subset: int) -> Node | None:
        """Return ``node`` with the leaves of ``subset``, in several of its children, an interval.

        The fewest children that must move do so: those of the set become one block, with the
        leaves of a partly covered child towards the block on that side of it.
        """
        if node.ordered:
            row = self._row(node, subset)
            return None if row is None else Node(node.leaves, tuple(row), ordered=True)
        empty, full, partial = self._split(node, subset, 2)
        if len(partial) > 2:
            return None
        inside = node.loose & subset
        block = [_any_order(full, inside)] if full or inside else []
        if partial:
            left = self._line(partial[0], subset)
            right = self._line(partial[1], subset) if len(partial) == 2 else []
            if left is None or right is None:
                return None
            children = (*left, *block, *reversed(right))
            block = [Node(_union(children), children, ordered=True)]
        return _any_order([*empty, *block], node.loose & ~subset)

    def _row(self, node: Node, subset: int) -> list[Node] | None:
        """Return the children of a Q node with ``subset`` as an interval, or ``None``."""
        self.looks += len(node.children)
        row: list[Node] = []
        begun = ended = False
        for child in node.children:
            inside = child.leaves & subset
            if not inside:
                ended = begun
                row.append(child)
                continue
            if ended:
                return None
            if inside == child.leaves:
                row.append(child)
            else:
                line = self._line(child, subset)
                if line is None:
                    return None
                row.extend(reversed(line) if begun else line)
                ended = begun  # a set that stops within a child can only go on before it
            begun = True
        return row

    def _line(self, node: Node, subset: int) -> list[Node] | None:
        """Return the parts of a partly covered node in a line: first those outside ``subset``.

        ``None`` when the leaves inside cannot all stand at one end.
        """
        outside: list[Node] = []
        inside: list[Node] = []  # from the end of the line
        while True:
            empty, full, partial = self._split(node, subset, 1)
            if len(partial) > 1:
                return None
            if not node.ordered:
                missed, covered = node.loose & ~subset, node.loose & subset
                outside += [_any_order(empty, missed)] if empty or missed else []
                inside += [_any_order(full, covered)] if full or covered else []
            else:
                line = node.children
                if not line[0].leaves & ~subset or not line[-1].leaves & subset:
                    line = line[::-1]
                    empty, full = empty[::-1], full[::-1]
                if line != (*empty, *partial, *full):
                    return None
                outside += empty
                inside += full[::-1]
            if not partial:
                return outside + inside[::-1]
            node = partial[0]

    def _split(
        self, node: Node, subset: int, most: int
    ) -> tuple[list[Node], list[Node], list[Node]]:
        """Return the children that ``subset`` misses, covers, and covers in part.

        Loose leaves are none of them. More than ``most`` of the last are a conflict, so the split
        ends with the first too many.
        """
        empty: list[Node] = []
        full: list[Node] = []
        partial: list[Node] = []
        for child in node.children:
            inside = child.leaves & subset
            if not inside:
                empty.append(child)
            elif inside == child.leaves:
                full.append(child)
            else:
                partial.append(child)
                if len(partial) > most:
                    break
        self.looks += len(empty) + len(full) + len(partial)
        return empty, full, partial


def _any_order(nodes: list[Node], loose: int) -> Node:
    """Return a P node over ``nodes`` and leaves, or the only node."""
    if len(nodes) == 1 and not loose:
        return nodes[0]
    return Node(_union(nodes) | loose, tuple(nodes), loose)


def _union(nodes: Iterable[Node]) -> int:
    """Return the leaves below any of ``nodes``."""
    leaves = 0
    for node in nodes:
        leaves |= node.leaves
    return leaves


def _bits(leaves: int) -> list[int]:
    """Return the numbers of the leaves."""
    if not leaves:
        return []
    size = -(-leaves.bit_length() // 8)
    packed = np.frombuffer(leaves.to_bytes(size, "little"), dtype=np.uint8)
    return np.flatnonzero(np.unpackbits(packed, bitorder="little")).tolist()


def _by_mean(
    node: Node,
    sums: dict[int, tuple[int, int, int]],
    places: Sequence[Sequence[int]],
    blocks: Container[int],
) -> list[Node | Sequence[int]]:
    """Return what a P node stands for, by mean old place: subtrees, and the places of leaves."""
    items: list[tuple[float, int, Node | Sequence[int]]] = []
    for child in node.children:
        size, total, first = sums[child.leaves]
        items.append((total / size, first, child))
    alone = node.loose == node.leaves and not node.loose & (node.loose - 1)
    for leaf in _bits(node.loose):
        own = places[leaf]
        if alone or 1 << leaf in blocks:
            items.append((sum(own) / len(own), min(own), sorted(own)))
        else:
            items.extend((place, place, [place]) for place in own)
    return [item for _, _, item in sorted(items, key=lambda item: item[:2])]


def _agreement(parts: Sequence[tuple[int, int, int]]) -> int:
    """Return the sum of old places, each times the leaves that now stand before its part."""
    before = total = 0
    for size, places, _ in parts:
        total += before * places
        before += size
    return total
