"""`PQTree`: all the orders of some leaves in which given sets of leaves are intervals.

The structure is that of Booth & Lueker, "Testing for the consecutive ones property, interval
graphs, and graph planarity using PQ-tree algorithms" (1976). The children of a P node may stand in
any order, those of a Q node in theirs or the reverse; what the tree can be read as is exactly what
its sets allow. The reduction is one of our own, for few leaves and many trials: a node never
changes once made, so to keep a tree is to keep its root, and every node carries the leaves below it
as the bits of one integer, so that a subtree that a set misses or covers costs one operation.

A set costs the children of the nodes on the way down to where it splits, and those of the nodes
that it splits: never more than four looks per leaf, and mostly far fewer.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

__all__ = ["Node", "PQTree"]

_REDUCTION = 16  # looks that a reduction is worth beside those at children


class Node:
    """A node of the tree, never changed once made.

    Attributes:
        leaves: The leaves below it: bit i is leaf i.
        children: Empty for a leaf.
        ordered: Whether it is a Q node.
    """

    __slots__ = ("children", "leaves", "ordered")

    def __init__(self, leaves: int, children: tuple[Node, ...] = (), ordered: bool = False) -> None:
        self.leaves, self.children, self.ordered = leaves, children, ordered


class PQTree:
    """The orders of the leaves ``0 .. leaves - 1`` in which the sets reduced so far are intervals.

    Attributes:
        root: The tree; put an older root back to undo reductions.
        looks: The children looked at so far, plus a constant for each reduction: what the
            reductions cost, in a unit that does not depend on the machine.
    """

    def __init__(self, leaves: int) -> None:
        self.root = _any_order([Node(1 << leaf) for leaf in range(leaves)])
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
            place = next(i for i, child in enumerate(node.children) if child.leaves & subset)
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
            joined = Node(
                parent.leaves, (*around[:place], joined, *around[place + 1 :]), parent.ordered
            )
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
            if node.children:
                below = [sums[child.leaves] for child in node.children]
            else:
                below = [(1, place, place) for place in places[node.leaves.bit_length() - 1]]
            sizes, totals, firsts = zip(*below, strict=True)
            sums[node.leaves] = sum(sizes), sum(totals), min(firsts)

        order: list[int] = []
        stack: list[Node | list[int]] = [self.root]
        while stack:
            item = stack.pop()
            if isinstance(item, list):
                order.extend(item)
            elif not item.children:
                order.extend(sorted(places[item.leaves.bit_length() - 1]))
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
        block = [_any_order(full)] if full else []
        if partial:
            left = self._line(partial[0], subset)
            right = self._line(partial[1], subset) if len(partial) == 2 else []
            if left is None or right is None:
                return None
            children = (*left, *block, *reversed(right))
            block = [Node(_union(children), children, ordered=True)]
        return _any_order(empty + block)

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
                outside += [_any_order(empty)] if empty else []
                inside += [_any_order(full)] if full else []
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

        More than ``most`` of the last are a conflict, so the split ends with the first too many.
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


def _any_order(nodes: list[Node]) -> Node:
    """Return a P node over ``nodes``, or the only one."""
    return nodes[0] if len(nodes) == 1 else Node(_union(nodes), tuple(nodes))


def _union(nodes: Iterable[Node]) -> int:
    """Return the leaves below any of ``nodes``."""
    leaves = 0
    for node in nodes:
        leaves |= node.leaves
    return leaves


def _by_mean(
    node: Node,
    sums: dict[int, tuple[int, int, int]],
    places: Sequence[Sequence[int]],
    blocks: Container[int],
) -> list[Node | list[int]]:
    """Return what a P node stands for, by mean old place: subtrees, and the places of leaves."""
    items: list[tuple[float, int, Node | list[int]]] = []
    for child in node.children:
        if child.children or child.leaves in blocks:
            size, total, first = sums[child.leaves]
            items.append((total / size, first, child))
        else:
            own = places[child.leaves.bit_length() - 1]
            items.extend((place, place, [place]) for place in own)
    return [item for _, _, item in sorted(items, key=lambda item: item[:2])]


def _agreement(parts: Sequence[tuple[int, int, int]]) -> int:
    """Return the sum of old places, each times the leaves that now stand before its part."""
    before = total = 0
    for size, places, _ in parts:
        total += before * places
        before += size
    return total
