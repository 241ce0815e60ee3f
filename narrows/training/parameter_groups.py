"""Groups of parameters that follow a model through pruning: freezing and learning rates by layer.

Partial transfer (Z. Shen, Z. Liu, J. Qin, M. Savvides, K.-T. Cheng: Partial Is Better Than All,
AAAI 2021) gives every layer a learning rate of its own, zero among them. Said for the unpruned
model, `follow` says it for the pruned one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from narrows.errors import UsageError, suggest
from narrows.ir.program import Program
from narrows.training.sites import listed


def follow(
    groups: Sequence[Mapping[str, Any]],
    program: Program,
    pruned: Program,
    module: nn.Module,
    *,
    rest: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer of the pruned module.

    >>> groups = [{"names": ["stem.*"], "lr": 0.0}, {"names": ["*"], "lr": 0.01}]
    >>> pruned = narrows.apply(program, plan)
    >>> module = pruned.to_module(train=True)
    >>> optimizer = torch.optim.SGD(training.follow(groups, program, pruned, module), lr=0.01)

    A parameter belongs to the first group that names what it came from (`Program.origins`); one
    that pruning made anew, such as a bias that holds constants of removed channels, to the group of
    the weight beside it. A group with a learning rate of zero is frozen: its parameters require no
    gradient and are in none of the groups that are returned. (The norms' running statistics are not
    parameters: put frozen modules into eval mode, or they follow the batches.)

    Args:
        groups: Each with ``names``, names and globs of the unpruned model's parameters, and what
            the optimizer takes: ``lr``, ``weight_decay`` ...
        program: The unpruned program, whose names they are.
        pruned: What `narrows.apply` made of it, without a target.
        module: The pruned program's module, from ``to_module(train=True)``.
        rest: The options of parameters that no group names; without it they are an error.

    Raises:
        UsageError: A name matches nothing, a parameter has no group, or the module is not the
            pruned program's.
    """
    names = [n for n in program.weights if n not in program.buffers]
    known = [*names, *program.aliases]
    patterns = [_patterns(group, known) for group in groups]
    options = [{k: v for k, v in g.items() if k != "names"} for g in groups]
    if rest is not None:
        patterns.append(("*",))
        options.append(dict(rest))
    made: list[list[nn.Parameter]] = [[] for _ in options]
    for name, parameter in module.named_parameters():
        if name not in pruned.weights:
            raise UsageError(
                f"the pruned program has no parameter {name!r}",
                where=name,
                why="the module was made of another program",
                hint="module = pruned.to_module(train=True)",
            )
        number = _group_of(_called(name, program, pruned), patterns)
        if number is None:
            raise UsageError(
                f"no group has the parameter {name!r}",
                where=name,
                why="what is not named would be left as it is in silence",
                hint='name it, or say rest={"lr": ...}; {"lr": 0.0} freezes',
            )
        frozen = options[number].get("lr") == 0
        parameter.requires_grad_(not frozen)
        if not frozen:
            made[number].append(parameter)
    pairs = zip(made, options, strict=True)
    return [{"params": parameters, **own} for parameters, own in pairs if parameters]


def _patterns(group: Mapping[str, Any], known: Sequence[str]) -> tuple[str, ...]:
    names = group.get("names")
    if names is None or "params" in group:
        raise UsageError(
            f"a group has no names: it has {', '.join(group) or 'nothing'}",
            where="groups",
            why="parameters are named, as pruning makes new tensors of them",
            hint='{"names": ["stem.*"], "lr": 0.01}',
        )
    names = listed(names)
    for name in names:
        if not any(fnmatchcase(k, name) for k in known):
            raise UsageError(
                f"{name!r} matches no parameter of the model",
                where="groups",
                why=f"it has {len(known)}",
                hint=suggest(name, known) or "names of model.named_parameters(), or globs of them",
            )
    return names


def _called(name: str, program: Program, pruned: Program) -> list[str]:
    """Return the names that a pruned parameter goes by in the unpruned model."""
    origin = pruned.origins.get(name)
    original = name if origin is None else origin.name
    if original in program.weights:
        return [original, *(a for a, own in program.aliases.items() if own == original)]
    beside = original.rpartition(".")[0]
    return [n for n in program.weights if n.rpartition(".")[0] == beside]


def _group_of(names: Sequence[str], patterns: Sequence[Sequence[str]]) -> int | None:
    for number, own in enumerate(patterns):
        if any(fnmatchcase(name, pattern) for name in names for pattern in own):
            return number
    return None


__all__ = ["follow"]
