"""`Leaders`: nodes in families that are joined one by one, each known by one of its nodes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx


class Leaders:
    """Families of nodes (a union-find whose paths are halved)."""

    def __init__(self) -> None:
        """Begin without any."""
        self._above: dict[fx.Node, fx.Node] = {}

    def __contains__(self, node: fx.Node) -> bool:
        """Whether a node is in a family."""
        return node in self._above

    def __iter__(self) -> Iterator[fx.Node]:
        """Yield the nodes in the order in which they came."""
        return iter(self._above)

    def add(self, node: fx.Node) -> None:
        """Make a node a family of its own."""
        self._above[node] = node

    def find(self, node: fx.Node) -> fx.Node:
        """Return the node that a node's family is known by."""
        above = self._above
        while above[node] is not node:
            above[node] = above[above[node]]
            node = above[node]
        return node

    def join(self, node: fx.Node, other: fx.Node) -> None:
        """Join a node's family to another's, which keeps its leader."""
        self._above[self.find(node)] = self.find(other)


__all__ = ["Leaders"]
