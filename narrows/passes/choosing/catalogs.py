"""`Catalog`: things of one kind that are dataclasses, spelled with their options like passes.

Criteria, budgets, allocators and compensations are found through one each: ``random{seed=3}`` is
the class called ``random``, made with that option.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from narrows.errors import PlanError, PlanUsageError, UsageError
from narrows.passes.spelling import make, parse_options
from narrows.registry import Registry


@dataclasses.dataclass(frozen=True)
class Catalog:
    """Classes of one kind by name.

    Attributes:
        registry: Where they are; its kind is how errors call one.
    """

    registry: Registry

    def providers(self) -> dict[str, str]:
        """Return ``name -> "module:Class"`` of every known one; see `Registry.providers`."""
        return self.registry.providers()

    def lookup(self, name: str) -> Any:
        """Return the class called ``name``; an error with a suggestion if there is none."""
        kind, found = self.registry.kind, self.registry.load_class(name)
        if not dataclasses.is_dataclass(found):
            raise PlanError(
                f"the {kind} {name!r} of {self.providers()[name]} is no dataclass",
                why="its fields are its options",
                hint="@dataclass(frozen=True)",
            )
        return found

    def one(self, given: Any, wanted: type) -> Any:
        """Return one from its spelling, or itself; `PlanUsageError` unless it is of a class."""
        found = self.made(given) if isinstance(given, str) else given
        if not isinstance(found, wanted):
            kind, called = self.registry.kind, wanted.__name__
            article, other = ("an" if word[0] in "aeiouAEIOU" else "a" for word in (kind, called))
            raise PlanUsageError(
                f"{article} {kind} is a name or {other} {called}, got {found!r:.60}",
                hint=f"narrows {kind}s lists them",
            )
        return found

    def made(self, text: str) -> Any:
        """Return one from its spelling, ``name{option=value}``."""
        try:
            name, options = parse_options(text)
            return make(self.lookup(name), options)
        except UsageError as error:
            raise PlanUsageError(
                error.what, where=error.where, why=error.why, hint=error.hint
            ) from None


__all__ = ["Catalog"]
