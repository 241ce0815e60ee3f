"""`Gates`: masks on the channels of a model while it is trained, which become a `ChannelPlan`.

A subclass says what the masks are while the model trains (`Gates.masks`) and which channels stay in
the end (`Gates.hard`). The rest is here: parameters are replaced by masked ones for the length of
one forward call of the model, so its state dict, its parameters' order and its optimizer stay what
they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from narrows.errors import PlanError, UsageError, suggest
from narrows.ir.program import Program
from narrows.passes.plans.plan import ChannelPlan
from narrows.training.sites import Gate, Names, gates_of

Hook = Callable[[Tensor, Tensor], Tensor | None]  # of a module's first input and its result


@dataclass(eq=False, repr=False)
class Gates(nn.Module):
    """Gates on channels of a model; the base of those that learn.

    In train mode the model runs with `masks`, in eval mode with `hard`: what the plan will give.
    The module's own parameters are what the gates learn; give them to the optimizer, too.

    >>> program = narrows.capture(model.eval(), inputs)
    >>> gates = training.GumbelGates(model, program, outputs="*", ratio=0.5)
    >>> for x, y in batches:                     # model.train()
    ...     loss = F.cross_entropy(model(x), y) + gates.loss()
    ...     loss.backward(); gates.step(); optimizer.step(); optimizer.zero_grad()
    >>> gates.remove()
    >>> program = narrows.capture(model.eval(), inputs)
    >>> pruned = narrows.apply(program, gates.plan(program))

    Args:
        model: The model; it gets two hooks, until `remove`.
        program: Its program, of which the gates read the structure alone.
        outputs: Names or globs of weights whose output channels get gates. Such a gate multiplies
            what a channel contributes: gain and bias of the norm behind the layer, or where none
            follows, the layer's weight and bias.
        inputs: Names or globs of weights whose input channels get gates, for that layer alone.
        tied: Whether producers whose channels live or die together share one gate.

    Raises:
        PlanUsageError: A weight is unknown, or its channels cannot be gated.
        UsageError: The model is not the program's, or it is gated already.
    """

    straight: ClassVar[bool] = False  # whether parameters get the gradients of the unmasked ones

    model: InitVar[nn.Module]
    program: InitVar[Program]
    outputs: Names = ()
    inputs: Names = ()
    _: KW_ONLY
    tied: bool = False

    def __post_init__(self, model: nn.Module, program: Program) -> None:
        """Find the gates, and hook them to the model once nothing is left that could fail."""
        super().__init__()
        _refuse_models(model, program)
        sites = gates_of(program, self._named(), self.inputs, self.tied)
        self.gates: tuple[Gate, ...] = sites.gates
        self.skipped: Mapping[str, str] = sites.skipped
        self.done = 0  # how many training steps
        self._forwards = 0
        self._active = True
        self._learning = False  # whether the forward call that runs is one to learn from
        self._swapped: list[tuple[nn.Module, str, Any]] = []
        self._held: tuple[nn.Module, ...] = (model,)  # not a submodule: it is the user's
        self._program = program
        self._owners: dict[str, list[tuple[nn.Module, str]]] = {}
        self._watch(p.parameter for g in self.gates for p in (*g.weights, *g.masked))
        self._watched: list[tuple[nn.Module, Hook]] = []
        self._build()
        self._begun = [p.detach().clone() for p in self.parameters()]
        self._handles = list(self._attached(model))
        model.__dict__["_narrows_gates"] = self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse a copy and a pickle, also of the model that the gates are on."""
        raise UsageError(
            "gates are neither copied nor pickled",
            where=type(self).__name__,
            why="they are hooks on one model, which a copy would not have",
            hint="save gates.state_dict() and model.state_dict(), or gates.remove() first",
        )

    def extra_repr(self) -> str:
        """Return a line per gate, and what has none and why."""
        lines = [f"{g.name}: {g.width} channels" for g in self.gates]
        return "\n".join([*lines, *(f"{n}: {why}" for n, why in self.skipped.items())])

    # ------------------------------------------------------------------ what a subclass says

    def _build(self) -> None:
        """Make what this kind of gates needs: its parameters, and what is to be watched."""

    def _named(self) -> Names:
        """Return the names and globs of weights whose outputs get gates."""
        return self.outputs

    def masks(self) -> Sequence[Tensor]:
        """Return the masks of train mode, one per gate, ``[width]`` in 0..1; differentiable.

        They are ones unless a subclass says otherwise.
        """
        return [torch.ones(g.width, device=self._device()) for g in self.gates]

    def hard(self) -> list[Tensor]:
        """Return which channels stay, one boolean tensor per gate, ``[width]``."""
        raise NotImplementedError

    def loss(self) -> Tensor:
        """Return what the gates add to the loss of the last forward call, a number."""
        return torch.zeros((), device=self._device())

    def factors(self) -> Mapping[str, Tensor]:
        """Return further factors of parameters, by name, that `remove` leaves in them for good."""
        return {}

    def _advance(self) -> None:
        """Do what has to be done after a backward call and before the optimizer's step."""

    def _learns(self, model: nn.Module) -> bool:
        """Whether a forward call is one that the gates learn from."""
        return model.training

    def _may_close(self, number: int) -> bool:
        """Whether all channels of a gate may go."""
        return False

    def _untrained(self) -> str:
        """Return why the gates say nothing yet, or an empty string."""
        if not self._forwards:
            return "the model never ran in train mode with these gates"
        pairs = list(zip(self._begun, self.parameters(), strict=True))
        if pairs and all(torch.equal(a.to(b), b) for a, b in pairs):
            return "every parameter of the gates is what it began with"
        return ""

    # ------------------------------------------------------------------ using them

    def step(self) -> None:
        """Advance by one training step: call it between ``loss.backward()`` and the optimizer."""
        self._advance()
        self.done += 1

    def plan(self, program: Program, *, empty: bool = False) -> ChannelPlan:
        """Return the plan that keeps the open channels.

        Args:
            program: The model's program, captured anew: training changed the weights.
            empty: Whether a layer may lose all channels: it is a constant then, or where it ends a
                residual branch, the branch is gone.

        Raises:
            PlanError: The gates were never trained, or close all channels of a layer.
        """
        why = self._untrained()
        if why:
            raise PlanError(
                "these gates have not been trained",
                where=self.gates[0].name,
                why=why,
                hint="call the model in train mode, and gates.step() after each backward call; "
                "parameters of gates belong to the optimizer: gates.parameters()",
            )
        keeps: dict[str, dict[str, list[bool]]] = {"inputs": {}, "outputs": {}}
        for number, (gate, mask) in enumerate(zip(self.gates, self.hard(), strict=True)):
            if not empty and not self._may_close(number) and not bool(mask.any()):
                raise PlanError(
                    f"the gates close all {gate.width} channels: nothing would be left",
                    where=gate.name,
                    why="a layer without channels is a constant",
                    hint="ask for less (a lower ratio, a weaker loss), or plan(..., empty=True) "
                    "where a whole residual branch may go",
                )
            for side in gate.sides:
                keeps[side.side][side.weight] = mask.cpu()[side.channels].tolist()
        reason = f"gates {type(self).__name__}"
        return ChannelPlan.given(program, keeps["inputs"], keeps["outputs"], reason)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run the model without masks inside a ``with`` block."""
        before, self._active = self._active, False
        try:
            yield
        finally:
            self._active = before

    def remove(self) -> nn.Module:
        """Take the gates off the model and return it; `factors` stay in its parameters."""
        if not self._handles:
            return self._model
        with torch.no_grad():
            for name, factor in self.factors().items():
                parameter = self._parameters_by_name()[name]
                parameter.mul_(factor)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        del self._model.__dict__["_narrows_gates"]
        return self._model

    # ------------------------------------------------------------------ hooks

    @property
    def _model(self) -> nn.Module:
        return self._held[0]

    def _watch(self, names: Iterable[str]) -> None:
        """Find parameters that the gates read, multiply or rescale; `UsageError` without them."""
        for name in names:
            self._owners[name] = _owners(self._model, name, self._program)

    def _parameters_by_name(self) -> dict[str, Tensor]:
        return {name: getattr(*places[0]) for name, places in self._owners.items()}

    def _device(self) -> torch.device:
        return next(iter(self._parameters_by_name().values())).device

    def _attached(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Hook the gates to the model and yield a handle per hook."""
        yield model.register_forward_pre_hook(self._enter)
        yield model.register_forward_hook(self._leave, always_call=True)
        owners = {id(m): m for places in self._owners.values() for m, _ in places}
        for module in owners.values():
            yield module.register_forward_pre_hook(self._within)
        for module, hook in self._watched:
            yield module.register_forward_hook(self._called(hook))

    def _enter(self, model: nn.Module, args: Any) -> None:
        if not self._active or self._swapped:
            return
        if torch.compiler.is_exporting():
            raise UsageError(
                "a gated model is not captured",
                where=type(model).__name__,
                why="the masks would become part of the graph, or be lost",
                hint="gates.remove() first, or capture within `with gates.off():`",
            )
        self._learning = self._learns(model)
        if self._learning:
            self._forwards += 1
            masks = self.masks()
        else:
            masks = [m.to(self._device()) for m in self.hard()]
        self._swap(self._masked(masks))

    def _within(self, module: nn.Module, args: Any) -> None:
        """Refuse a call of a gated layer that is no part of a call of the model."""
        if self._active and not self._swapped:
            raise UsageError(
                "a gated layer runs outside of a call of the model",
                where=type(module).__name__,
                why="masks are in force while the model itself is called, so this layer would run "
                "without: called by itself, or again in the backward call (checkpointing)",
                hint="call the model, or the layer within `with gates.off():`; train gates "
                "without activation checkpointing",
            )

    def _masked(self, masks: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the parameters that masks change, multiplied."""
        dense = self._parameters_by_name()
        made: dict[str, Tensor] = {}
        for gate, mask in zip(self.gates, masks, strict=True):
            for place in gate.masked:
                held = made.get(place.parameter, dense[place.parameter])
                made[place.parameter] = held * place.spread(mask.to(held.dtype))
        for name, factor in self.factors().items():
            made[name] = made.get(name, dense[name]) * factor
        if not self.straight:
            return made
        return {n: dense[n] + (t - dense[n]).detach() for n, t in made.items()}

    def _swap(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            for owner, leaf in self._owners[name]:
                self._swapped.append((owner, leaf, owner._parameters[leaf]))
                owner._parameters[leaf] = tensor  # type: ignore[assignment]

    def _leave(self, model: nn.Module, args: Any, result: Any) -> None:
        for owner, leaf, parameter in reversed(self._swapped):
            owner._parameters[leaf] = parameter
        self._swapped = []
        self._learning = False

    def _watch_module(self, path: str, hook: Hook) -> None:
        """Call ``hook`` with the first input and the result of a module in each forward call.

        What it returns, if anything, is the result from then on.
        """
        try:
            module = self._model.get_submodule(path)
        except AttributeError:
            raise UsageError(
                f"the model has no module {path!r}",
                where=path,
                why="the gates work on what it returns",
                hint=suggest(path, [name for name, _ in self._model.named_modules()])
                or "print(model) shows the names of its modules",
            ) from None

        self._watched.append((module, hook))

    def _called(self, hook: Hook) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def call(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
            return hook(args[0], result) if self._active else None

        return call


@dataclass(eq=False, repr=False, kw_only=True)
class LearnedGates(Gates):
    """Gates with one parameter a channel, ``scores``; the base of those.

    Args:
        initial: What every score begins with.
    """

    initial: float = 0.0

    def _build(self) -> None:
        self.scores = nn.ParameterList(
            nn.Parameter(torch.full((g.width,), float(self.initial), device=self._device()))
            for g in self.gates
        )

    def hard(self) -> list[Tensor]:
        """Return where the scores are above zero."""
        return [s.detach() > 0 for s in self.scores]


# ------------------------------------------------------------------ checks


def _refuse_models(model: Any, program: Any) -> None:
    if not isinstance(model, nn.Module) or not isinstance(program, Program):
        raise UsageError(
            f"gates take a torch module and its program, got {type(model).__name__} and "
            f"{type(program).__name__}",
            where="model, program",
            why="the program says where the channels of the model's weights are",
            hint="Gates(model, narrows.capture(model.eval(), inputs), outputs=...)",
        )
    if "_narrows_gates" in model.__dict__:
        raise UsageError(
            "the model has gates already",
            where=type(model).__name__,
            why="two sets of gates would multiply the same parameters",
            hint="gates.remove() takes the others off",
        )


def gradient_of(name: str, parameter: Tensor) -> Tensor:
    """Return the gradient that a backward call left; `UsageError` where there is none."""
    if parameter.grad is None:
        raise UsageError(
            f"{name!r} has no gradient, which step() reads",
            where=name,
            why="no backward call came before, or the gradients were set to None since",
            hint="loss.backward(); gates.step(); optimizer.step(); optimizer.zero_grad()",
        )
    return parameter.grad


def _owners(model: nn.Module, name: str, program: Program) -> list[tuple[nn.Module, str]]:
    """Return the modules that have a parameter, each with its name there; several share it."""
    names = [name, *(alias for alias, own in program.aliases.items() if own == name)]
    return [_owner(model, n, tuple(program.weights[name].shape)) for n in names]


def _owner(model: nn.Module, name: str, wanted: tuple[int, ...]) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
        parameter = owner._parameters[leaf]
    except (AttributeError, KeyError):
        parameter = owner = None
    if owner is None or parameter is None or tuple(parameter.shape) != wanted:
        found = "no parameter" if parameter is None else f"a parameter of {list(parameter.shape)}"
        raise UsageError(
            f"the program is not of this model: it has {found} {name!r}",
            where=name,
            why=f"in the program it is a weight of {list(wanted)}",
            hint="program = narrows.capture(model.eval(), inputs), of the same model",
        )
    return owner, leaf


__all__ = ["Gates", "LearnedGates", "gradient_of"]
