"""The exact forms of a pruned program that may be the fastest, each with its predicted time.

The search begins in several places and ends with the best of all, so it is never worse than where
it began:

============== =====================================================================================
``smallest``   every layer reads just what counts for it
``unpruned``   nothing is gone
``common``     every layer reads all that its tensor holds (`narrows.passes.forms.common`);
               ``common-16`` with widths rounded up to multiples of 16
``chosen``     reads and widths space by space (`narrows.passes.forms.widths`), from the smallest
``from-...``   the same from other widths: those of ``common-8``, say; ``trimmed-16`` are those of
               the common mask where residual streams are cut for later readers
``mixed``      of all of these the best for every part (`narrows.passes.forms.mixing`)
``split``      producers made once per reader (`narrows.passes.forms.splitting`)
============== =====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from narrows.errors import PassUsageError, suggest
from narrows.ir.channels import Facts
from narrows.ir.choices import Choices
from narrows.ir.costs import Costs
from narrows.ir.labels import Bools
from narrows.ir.liveness import Demand
from narrows.ir.program import Program, Pruning
from narrows.ir.rewrite import demand_of, everything, facts_of
from narrows.passes.forms.common import common
from narrows.passes.forms.mixing import Account, Mixture
from narrows.passes.forms.padding import padded
from narrows.passes.forms.sketch import sketched
from narrows.passes.forms.splitting import apart
from narrows.passes.forms.widths import Chooser, Decision
from narrows.passes.pruning.form import emit

SMALLEST, UNPRUNED, CHOSEN, SPLIT, MIXED = "smallest", "unpruned", "chosen", "split", "mixed"
LEAST_STEP = 8  # half of a target's step is tried, too, if it is no less
TIE = 1e-9  # of a time: what is nearer is equal


@dataclass(frozen=True, eq=False)
class Rival:
    """A form, and what a target's costs say of it.

    Attributes:
        name: What it is called.
        pruning: Its choices; ``wider`` has the widths that go with its reads.
        seconds: What it takes by the costs.
        made: Whether its program was made for that; else it is a sketch's.
    """

    name: str
    pruning: Pruning
    seconds: float
    made: bool = True

    @property
    def whole(self) -> Pruning:
        """The choices with their widths."""
        return self.pruning.wider or self.pruning

    @property
    def bare(self) -> Rival:
        """The rival without the program that was made of it, which holds weights."""
        wide = self.pruning.wider
        bare = self.pruning.choose(self.pruning.choices)
        return replace(self, pruning=replace(bare, wider=wide and wide.choose(wide.choices)))


def rivals(
    pruning: Pruning, costs: Costs, batch: int = 1, *, fill: bool = False
) -> Sequence[Rival]:
    """Return the forms of a pruned program, the one that is predicted to be fastest first.

    They are found once; the arguments are those of `narrows.passes.pruning.stages.reads`.
    """
    known: list[tuple[Costs, int, bool, tuple[Rival, ...]]] = pruning.memo("rivals", list)
    for of, size, filled, found in known:
        if of is costs and (size, filled) == (batch, fill):
            return found
    found = _Field(pruning, costs, batch, fill).ranked()
    known.append((costs, batch, fill, tuple(rival.bare for rival in found)))
    return found


def rival(
    pruning: Pruning, costs: Costs, batch: int = 1, *, fill: bool = False, name: str = ""
) -> Rival:
    """Return the fastest form, or the one of a name; `PassUsageError` if there is none."""
    found = rivals(pruning, costs, batch, fill=fill)
    named = [r for r in found if r.name == name] if name else found
    if named:
        return named[0]
    names = sorted(r.name for r in found)
    raise PassUsageError(
        f"there is no form {name!r} of {pruning.program.name}",
        why=f"its forms are {', '.join(names)}",
        hint=suggest(name, names),
    )


@dataclass(eq=False)
class _Field:
    """All forms of one program."""

    pruning: Pruning
    costs: Costs
    batch: int
    fill: bool

    @cached_property
    def base(self) -> Pruning:
        """The pruning, with channels of zeros where widths were odd before."""
        return padded(self.pruning, self.costs) or self.pruning

    @cached_property
    def facts(self) -> Facts:
        return facts_of(self.base)

    @cached_property
    def demand(self) -> Demand:
        """The liveness of the smallest form."""
        return demand_of(self.base.choose(Choices()))

    def ranked(self) -> list[Rival]:
        """Return them, the fastest first."""
        found = [self._formed(SMALLEST, self.pruning), self._unpruned()]
        search = Search.of(self.base, self.costs, self.batch, self.fill)
        found.append(self._searched(CHOSEN, search))
        twice = apart(self.base, search.chooser, search.decisions)
        if twice is not None:
            again = Search.of(twice, self.costs, self.batch, self.fill)
            split = self._searched(SPLIT, again)
        accounts = {r.name: account for r, account in found}
        forms = [r for r, _ in found]
        for one, account in self._common():
            forms.append(one)
            accounts[one.name] = account
        forms.sort(key=lambda r: accounts[r.name].seconds)
        mixed = self._mixed(forms, accounts)
        others = [*([split[0]] if twice is not None else []), *([mixed] if mixed else [])]
        return self._made(sorted([*forms, *others], key=self._order))

    def _made(self, found: list[Rival]) -> list[Rival]:
        """Return them with a first one that was made: a sketch may know less than its program."""
        while not found[0].made:
            first = found[0]
            made = self._formed(first.name, first.whole, first.pruning)[0]
            found = sorted([made, *found[1:]], key=self._order)
        return found

    def _order(self, rival: Rival) -> tuple[float, int]:
        """Return what a rival is ranked by: what is as fast as the smallest form comes after it.

        Where channels are to be taken back it comes before.
        """
        fixed = [SMALLEST, UNPRUNED, CHOSEN, SPLIT, MIXED]
        last = fixed.index(rival.name) if rival.name in fixed else len(fixed)
        if self.fill and rival.name in (SMALLEST, UNPRUNED):
            last += len(fixed) + 1
        return float(f"{rival.seconds:.9g}"), last

    # ------------------------------------------------------------------ one form

    def _account(self, program: Program) -> Account:
        return Account(program, self.costs.account(program, self.batch))

    def _formed(
        self, name: str, wide: Pruning, narrow: Pruning | None = None
    ) -> tuple[Rival, Account]:
        """Return a form and its account; ``narrow`` are its reads without its widths."""
        account = self._account(emit(wide))
        seconds = sum(s for _, s in self.costs.predict(account.form, self.batch))
        pruning = wide if narrow is None else replace(narrow, wider=wide)
        return Rival(name, pruning, seconds), account

    def _unpruned(self) -> tuple[Rival, Account]:
        whole = self.pruning.choose(everything(facts_of(self.pruning)))
        account = self._account(self.pruning.program)
        seconds = sum(s for _, s in self.costs.predict(account.form, self.batch))
        return Rival(UNPRUNED, replace(whole, wider=whole), seconds), account

    def _searched(self, name: str, search: Search) -> tuple[Rival, Account]:
        return self._formed(name, search.choose(aligned=True), search.choose(aligned=False))

    # ------------------------------------------------------------------ from the common mask

    def _common(self) -> list[tuple[Rival, Account]]:
        """Return the forms of the common mask, and what a search makes from them."""
        plain = self._choices(1, streams=True)
        halves = [s for s in (self.costs.step // 2, self.costs.step) if s >= LEAST_STEP]
        steps = {step: self._choices(step, streams=True) for step in halves or [1]}
        steps = {1: plain, **{s: c for s, c in steps.items() if not _same(c, plain)}}
        found = []
        for step, choices in steps.items():
            account = self._account(sketched(self.facts, choices))
            wide = self.base.choose(choices)
            pruning = replace(self.base.choose(plain), wider=wide)
            found.append(
                (Rival(_stepped("common", step), pruning, account.seconds, False), account)
            )
        first = min((s for s in steps if s > 1), default=1)
        starts = {_stepped("common", first): steps[first]}
        if self.costs.step > 1:
            trimmed = self._choices(self.costs.step, streams=False)
            starts[_stepped("trimmed", self.costs.step)] = trimmed
        nothing = {n.name: self.demand.needed(n) for n in self.facts.flows if self.demand.alive(n)}
        for name, choices in starts.items():
            if not _same(choices, Choices(nothing)):
                search = Search.of(self.base, self.costs, self.batch, self.fill, choices.forced)
                found.append(self._searched(f"from-{name}", search))
        return found

    def _choices(self, step: int, *, streams: bool) -> Choices:
        return common(self.facts, self.demand, step, streams=streams, fill=self.fill)

    # ------------------------------------------------------------------ the best of all

    def _mixed(self, forms: Sequence[Rival], accounts: dict[str, Account]) -> Rival | None:
        """Return the best of several forms, part by part, if that is ahead of all of them.

        Args:
            forms: The forms, the fastest first.
            accounts: Their accounts.
        """
        mixture = Mixture(self.facts, self.costs, accounts)
        chosen = mixture.run(forms[0].name)
        if len(set(chosen.values())) == 1:
            return None

        def choices(of: Callable[[Rival], Pruning]) -> Pruning:
            return self.base.choose(mixture.choices(chosen, {r.name: of(r).choices for r in forms}))

        mixed = self._formed(MIXED, choices(lambda r: r.whole), choices(lambda r: r.pruning))[0]
        return mixed if mixed.seconds < forms[0].seconds * (1 - TIE) else None


def _stepped(name: str, step: int) -> str:
    return name if step == 1 else f"{name}-{step}"


def _same(one: Choices, other: Choices) -> bool:
    """Whether two choices hold the same labels."""
    return one.forced.keys() <= other.forced.keys() and all(
        np.array_equal(held, other.forced[name]) for name, held in one.forced.items()
    )


# ------------------------------------------------------------------ space by space


@dataclass(frozen=True, eq=False)
class Search:
    """The form of a program that its target's costs ask for.

    Attributes:
        pruning: What the decisions are about.
        chooser: What made them.
        decisions: One per space.
    """

    pruning: Pruning
    chooser: Chooser
    decisions: Sequence[Decision]

    @staticmethod
    def of(
        pruning: Pruning,
        costs: Costs,
        batch: int,
        fill: bool,
        held: Mapping[str, Bools] | None = None,
    ) -> Search:
        """Return the form that costs least, space by space.

        Args:
            pruning: What is pruned.
            costs: The target's costs.
            batch: The number of examples to choose for.
            fill: As for `narrows.passes.pruning.stages.reads`.
            held: Labels that tensors hold at the least, by the names of their nodes.
        """
        demand = demand_of(pruning.choose(Choices(held or {})))
        chooser = Chooser(facts_of(pruning), demand, costs, batch, fill)
        return Search(pruning, chooser, chooser.run())

    def choose(self, *, aligned: bool) -> Pruning:
        """Return what was decided; without ``aligned``, no tensor is wider for it."""
        return self.pruning.choose(_choices(self.decisions, aligned=aligned))


def _choices(decisions: Sequence[Decision], *, aligned: bool) -> Choices:
    """Return what the decisions ask for; without ``aligned``, in no tensor more than it asks."""
    forced: dict[str, Bools] = {}
    columns: dict[str, Bools] = {}
    for decision in decisions:
        hold = decision.hold if aligned else decision.start
        for node in decision.space.core:
            forced[node.name] = hold
        for i, reader in enumerate(decision.space.readers):
            takes, tail = decision.takes[i].labels, decision.takes[i].tail
            if not aligned:
                late = np.array_equal(tail, decision.hold)
                takes = hold if decision.reads_all(i) else reader.wants
                tail = hold if late else takes
            for node in reader.tail:
                forced[node.name] = tail
            if not np.array_equal(takes, reader.wants) or not np.array_equal(takes, hold):
                columns[reader.node.name] = np.any(takes[reader.columns], axis=0)
    return Choices(forced, columns)


__all__ = ["CHOSEN", "MIXED", "SMALLEST", "SPLIT", "UNPRUNED", "Rival", "Search", "rival", "rivals"]
