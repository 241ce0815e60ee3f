"""`ProgramModule`: a program as an ordinary, trainable `torch.nn.Module`."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.fx import traceback as fx_traceback

from narrows.ir.graph import interpret
from narrows.ir.meta import Meta
from narrows.ir.ops.args import training_flag, with_argument
from narrows.ir.program import Program
from narrows.ir.rewrite.factors import factored

# The annotation by which a traced operator remembers the program's node that it is.
ANNOTATION = "narrows"


class ProgramModule(nn.Module):
    """Runs a program's graph on parameters registered under their original names.

    BatchNorm and dropout follow ``module.training``. Shared weights are registered under every name
    they had, as one tensor. A weight that was computed from others is computed from what is left of
    them, which are the parameters then, where that is what it is (`narrows.ir.rewrite.factors`).
    The state dict holds what the model's does: the literals of its code are there, but not stored.
    ``torch.export`` sees through the module, so it can be captured again.

    Args:
        program: The program.
        shared: Whether the tensors are the program's own, for a module that is run or exported and
            not trained.
    """

    def __init__(self, program: Program, *, shared: bool = False) -> None:
        super().__init__()
        self._program = program
        made = {} if shared else factored(program)
        self._recipes = {n: r for n, r in made.items() if isinstance(r, Program)}
        tensors: dict[str, torch.Tensor] = {}
        for source in (program, *self._recipes.values()):
            for name, weight in source.weights.items():
                if name in self._recipes or name in tensors:
                    continue
                tensor = weight.detach() if shared else weight.detach().clone()
                trained = name not in source.buffers and tensor.is_floating_point()
                tensors[name] = nn.Parameter(tensor) if trained else tensor
                _register(self, name, tensors[name], name in source.stored)
        for source in (program, *self._recipes.values()):
            for alias, name in source.aliases.items():
                if name in tensors:
                    _register(self, alias, tensors[name], name in source.stored)
        self._names = tuple(tensors)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on inputs structured like the program's."""
        flat = self._program.flat_inputs(args, kwargs)
        weights = {name: _lookup(self, name) for name in self._names}
        for name, recipe in self._recipes.items():
            (weights[name],) = interpret(recipe.graph, (), weights, call=self._call)
        result = interpret(self._program.graph, flat, weights, call=self._call)
        return pytree.tree_unflatten(result, self._program.out_spec)

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flag = training_flag(node.target)
        if flag is not None and self.training:
            args, kwargs = with_argument(node.target, args, kwargs, flag, True)
        meta = Meta(node)
        origin = {
            "name": node.name, "source": meta.source, "code": meta.code, "module": meta.module
        }  # fmt: skip
        with fx_traceback.preserve_node_meta(), fx_traceback.annotate({ANNOTATION: origin}):
            return node.target(*args, **kwargs)  # type: ignore[operator]


def _register(root: nn.Module, name: str, tensor: torch.Tensor, stored: bool) -> None:
    *path, leaf = name.split(".")
    for part in path:
        child = root._modules.get(part)
        if child is None:
            child = nn.Module()
            root.add_module(part, child)
        root = child
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(leaf, tensor)
    else:
        root.register_buffer(leaf, tensor, persistent=stored)


def _lookup(root: nn.Module, name: str) -> torch.Tensor:
    *path, leaf = name.split(".")
    for part in path:
        root = root._modules[part]  # type: ignore[assignment]
    return getattr(root, leaf)
