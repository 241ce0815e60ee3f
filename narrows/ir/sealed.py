"""A graph that is finished: its nodes, their arguments and their facts can be read, not changed.

A program that is done remembers what was found out about it, so nothing may change behind its back.
`seal` makes a graph's own methods refuse; who wants another graph edits a draft of the program
(`narrows.ir.program.Program.copy`), which is a copy.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import fx

from narrows.errors import ProgramError


def refuse(what: str) -> NoReturn:
    """Raise the `ProgramError` that says how a program is changed."""
    raise ProgramError(
        f"a finished program is not changed: {what}",
        why="what was found out about it would no longer hold",
        hint="change a copy: `draft = program.copy()`, and at the end `program = draft.seal()`",
    )


def _refusing(name: str) -> Any:
    def method(self: Any, *_: Any, **__: Any) -> NoReturn:
        refuse(f"{name} of {getattr(self, 'name', 'its graph')}")

    method.__name__ = name
    return method


def _closed(self: Any, *_: Any, **__: Any) -> NoReturn:
    refuse("its weights and what its nodes know of themselves can only be read")


class SealedDict(dict[str, Any]):
    """The weights of a finished program, or what one of its nodes knows of itself."""

    __setitem__ = __delitem__ = __ior__ = _closed
    update = setdefault = pop = popitem = clear = _closed

    def __reduce__(self) -> Any:
        """Copy and pickle as a plain dictionary: a program seals what it is made of."""
        return dict, (dict(self),)


class SealedNode(fx.Node):
    """A node of a finished program."""

    replace_all_uses_with = _refusing("replace_all_uses_with")
    replace_input_with = _refusing("replace_input_with")
    prepend = _refusing("prepend")
    append = _refusing("append")
    _update_args_kwargs = _refusing("args")

    def __setattr__(self, name: str, value: Any) -> None:
        refuse(f"{name} of {self.name}")


class SealedGraph(fx.Graph):
    """The graph of a finished program."""

    create_node = _refusing("create_node")
    erase_node = _refusing("erase_node")
    node_copy = _refusing("node_copy")
    graph_copy = _refusing("graph_copy")
    eliminate_dead_code = _refusing("eliminate_dead_code")


def seal(graph: fx.Graph) -> None:
    """Make a graph and its nodes refuse every change, for good."""
    if isinstance(graph, SealedGraph):
        return
    for node in graph.nodes:
        node.meta = SealedDict(node.meta)
        node.__class__ = SealedNode
    graph.__class__ = SealedGraph
