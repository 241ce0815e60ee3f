"""The four stages of pruning: what goes, what is read, how wide tensors are, and their order.

`prune` leaves the smallest program: each layer reads just the channels that count for it, copied
together where its tensor holds others. A target may run another exact form faster, and its cost
table says which (`narrows.passes.forms.widths`). Reads and widths are weighed together and taken
one after the other: `reads` lets layers read channels with zero weights where that is cheaper than
a copy, `widths` keeps channels so that widths meet the target's steps. `order` puts channels in an
order in which layers read intervals (`narrows.passes.forms.families`).

Each takes a `Pruning` and returns another with what there is to say of it, and `emit` makes the
program. The passes `prune-channels`, `legalize-reads`, `align-channels` and `reorder-channels` are
one stage each; who only wants what they make together calls the stages (`fastest`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from narrows.ir.choices import Choices
from narrows.ir.costs import Costs
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops import table
from narrows.ir.program import Note, Program, Pruning
from narrows.ir.rewrite import demand_of, facts_of
from narrows.passes.base import PassResult
from narrows.passes.forms.families import orders
from narrows.passes.forms.padding import padded
from narrows.passes.forms.splitting import split_notes
from narrows.passes.plans.plan import ChannelPlan, fingerprint, refuse_nan
from narrows.passes.plans.remains import constant_outputs, remaining
from narrows.passes.pruning.form import emit, is_idle
from narrows.passes.pruning.rivals import SMALLEST, UNPRUNED, rival

# Rounds that a program gets to settle in; the second finds nothing, as a rule.
ROUNDS = 4

NOT_PRUNED = "prune-channels must run right before it"
FULL = "prune-channels removed nothing right before it, and no width is in the way"
FASTEST = "the smallest form is the fastest by the target's costs"
WHOLE = "no channel is removed: by the target's costs no pruned form is faster"
NO_WIDTHS = "legalize-reads found nothing to choose"


@dataclass(frozen=True, eq=False)
class Chosen:
    """What a stage chose.

    Attributes:
        pruning: The pruning with that choice; the one the stage was given where nothing is chosen.
        notes: What a person should know.
    """

    pruning: Pruning
    notes: tuple[Note, ...] = ()


def result_of(program: Program, chosen: Chosen) -> PassResult:
    """Return what a pass that is one stage made of a program.

    Args:
        program: The program that the pass was given.
        chosen: What the stage chose for ``Pruning.of(program)``.
    """
    pruning, form = chosen.pruning, emit(chosen.pruning)
    if form.graph is not program.graph:
        made = form.replace(notes=program.notes, pruning=pruning)
        return PassResult(made, True, (*chosen.notes, *_state_notes(program, form)))
    if not pruning.untouched and pruning is not program.pruning:
        program = program.replace(pruning=pruning)
    return PassResult(program, False, chosen.notes)


def _state_notes(before: Program, after: Program) -> Iterator[Note]:
    """Yield what is left of every state of which more or fewer channels are there now."""
    for old, new in zip(before.states, after.states, strict=True):
        if old.kept != new.kept:
            yield Note(new.name, "state", f"{new}, as an input and as output {new.output}")


def fastest(
    program: Program, plan: ChannelPlan, costs: Costs, batch: int = 1, *, fill: bool = False
) -> Pruning:
    """Return the pruning by a plan with a target's reads and widths, in the old order.

    The arguments are those of `prune` and `reads`.
    """
    pruning = prune(program, plan).pruning
    return widths(reads(pruning, costs, batch, fill=fill).pruning).pruning


# ------------------------------------------------------------------ what goes


def prune(program: Program, plan: ChannelPlan, *, ordered: bool = False) -> Chosen:
    """Choose the smallest form; the notes say what stays, and why.

    Args:
        program: The program.
        plan: Which channels are masked.
        ordered: Whether the channels that stay are put in order as well. The form is the one that
            `order` makes of the smallest one, made once.
    """
    refuse_nan(program)
    masked, ignored = plan.split(program)
    first = Pruning(masked.replace(notes=()), ignored)
    pruning, found = _settled(first, ordered=ordered)
    form = emit(pruning)
    found = (*found, *remaining(program, plan, first, form, found))
    found = (*found, *constant_outputs(program, pruning))
    notes = (*plan.notes, *_on_plan(plan, program), *found)
    if is_idle(program, form):
        idle = Note(program.name, "idle", "no channel is masked, dead or constant")
        return Chosen(Pruning.of(program), (*notes, idle))
    return Chosen(pruning, notes)


def _on_plan(plan: ChannelPlan, program: Program) -> Iterator[Note]:
    """Yield how many channels the plan masks, and whether it was made for another structure."""
    counts = {reason: count for reason, count in plan.by_reason().items() if count}
    if counts:
        parts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items()))
        yield Note(program.name, "plan", f"the plan masks {plan.removed:,} channels: {parts}")
    if plan.fingerprint and plan.fingerprint != fingerprint(program):
        yield Note(
            program.name, "plan", "the plan was made before other rewrites, or for another model"
        )


def _settled(pruning: Pruning, *, ordered: bool) -> tuple[Pruning, tuple[Note, ...]]:
    """Return the last removal of a program from which nothing more goes, and what it has to say."""
    settled, notes = pruning, ()
    for turn in range(ROUNDS):
        ranks, told = orders(pruning) if ordered else ({}, ())
        pruning = pruning.choose(Choices(order=ranks))
        form = emit(pruning)
        if turn and is_idle(pruning.program, form):
            break
        settled, notes = pruning, (*form.notes, *told)
        form = form.replace(notes=())
        if not _is_restless(form, notes):
            break
        pruning = Pruning(form)
    return settled, notes


def _is_restless(program: Program, notes: tuple[Note, ...]) -> bool:
    """Whether another rewrite may find more.

    It may where a layer reads nothing and keeps one channel of zeros for its operator's sake, which
    makes constants of what comes after it; where layers that share a weight had to wait for one
    another; and where a tensor stayed for the sake of a shape that it no longer has.
    """
    if any(note.reason in ("shared", "ragged") for note in notes):
        return True
    weights = [program.tensor(n) for n in program.graph.nodes if n.op == "get_attr"]
    wide = [w for w in weights if w.dim() > 1]
    return not all(bool(w.reshape(-1)[:64].any()) or bool(w.any()) for w in wide)


# ------------------------------------------------------------------ reads and widths


def reads(
    pruning: Pruning, costs: Costs, batch: int = 1, *, fill: bool = False, form: str = ""
) -> Chosen:
    """Choose what layers read, and the widths that go with it, which `widths` takes.

    Args:
        pruning: What was chosen so far; reads, widths and an order of before are given up.
        costs: The target's cost table.
        batch: The number of examples to choose for.
        fill: Whether masked channels stay wherever that costs nothing, those with the largest
            weights (L1) first, for who takes them back (`narrows.passes.plans.take_back`).
        form: The name of the form to take (`narrows.passes.pruning.rivals`); the fastest unless
            given.
    """
    if pruning.untouched and padded(pruning, costs) is None:
        return _idle(pruning, FULL)
    best = rival(pruning, costs, batch, fill=fill, name=form)
    if best.name == SMALLEST:
        return _idle(pruning, f"the form {SMALLEST} was asked for" if form else FASTEST)
    if best.name == UNPRUNED:
        why = f"no channel is removed: the form {UNPRUNED} was asked for" if form else WHOLE
        notes = [Note(pruning.program.name, "idle", why)]
    else:
        notes = [*split_notes(best.pruning), *_read_notes(best.pruning)]
    return Chosen(_kept(pruning, best.pruning), tuple(notes))


def widths(pruning: Pruning) -> Chosen:
    """Choose the widths that `reads` weighed its reads with; the notes say what became wider."""
    if pruning.wider is None:
        return _idle(pruning, NO_WIDTHS)
    wider = pruning.wider
    return Chosen(_kept(pruning, wider), tuple(_width_notes(emit(pruning), emit(wider))))


def _read_notes(pruning: Pruning) -> Iterator[Note]:
    """Yield which layers read channels that count as zero for them."""
    facts, least = facts_of(pruning), demand_of(pruning.choose(Choices()))
    for node, flow in facts.flows.items():
        columns = pruning.choices.columns.get(node.name)
        if columns is None or not flow.reads or not least.alive(node):
            continue
        labels = flow.facts[1]
        held = pruning.choices.forced.get(flow.reads[0].operand.name)
        if held is None or not np.array_equal(columns, np.any(held[labels], axis=0)):
            continue  # a part is copied together for it
        wanted = np.any(least.required(node, 0)[labels], axis=0)
        extra = int((columns & ~wanted).sum())
        if extra:
            read = "channel is" if extra == 1 else "channels are"
            yield Note(
                node.name, "reads", f"{extra} {read} read with zero weights: a copy without "
                "them costs more on this target", extra, Meta(node).source,
            )  # fmt: skip


def _width_notes(before: Program, after: Program) -> Iterator[Note]:
    """Yield which tensors became wider."""
    shapes = {n.name: shape_of(n) for n in before.graph.nodes}
    for node in after.graph.nodes:
        old, new = shapes.get(node.name), shape_of(node)
        if node.op != "call_function" or old is None or new is None or len(old) != len(new):
            continue
        grown = [(a, b) for a, b in zip(old, new, strict=True) if b > a]
        row = table.find(node)
        if grown and row is not None and row.makes_channels:
            ((a, b), *_) = grown
            yield Note(
                node.name, "width", f"{b} channels wide instead of {a}: faster on this target",
                b - a, Meta(node).source,
            )  # fmt: skip


# ------------------------------------------------------------------ order


def order(pruning: Pruning) -> Chosen:
    """Choose one order for the channels of every tensor; a note per order says what it serves."""
    if pruning.untouched:
        return _idle(pruning, NOT_PRUNED)
    ranks, notes = orders(pruning)
    if not ranks:
        return Chosen(pruning, notes)
    ordered = pruning.choose(replace(pruning.choices, order=ranks))
    same = is_idle(emit(pruning), emit(ordered))
    return Chosen(pruning if same else ordered, notes)


# ------------------------------------------------------------------ what a stage leaves alone


def _idle(pruning: Pruning, why: str) -> Chosen:
    return Chosen(pruning, (Note(pruning.program.name, "idle", why),))


def _kept(before: Pruning, after: Pruning) -> Pruning:
    """Return a choice; where its form is none but that of before, with the one of before."""
    form = emit(before)
    return after.formed(form) if is_idle(form, emit(after)) else after
