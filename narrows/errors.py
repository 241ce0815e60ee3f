"""Every error a user of narrows can meet, as one family.

An error says four things: *what* went wrong, *where* (the node and the user's own source line),
*why*, and what to *try*. ``str(error)`` prints them in that order, one line each, so that a message
reads the same in a traceback, on the command line and in a report.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class NarrowsError(Exception):
    """The base of the family; catch it to catch all that narrows raises on purpose.

    Args:
        what: One sentence that states the failure with the values involved.
        where: A node, a weight, a file or a source line.
        why: The rule that was broken, when ``what`` does not say it already.
        hint: What to do about it.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", hint: str = "") -> None:
        self.what, self.where, self.why, self.hint = what, where, why, hint
        parts = [what]
        parts += [f"  at {where}"] if where else []
        parts += [f"  because {why}"] if why else []
        parts += [f"  try: {hint}"] if hint else []
        super().__init__("\n".join(parts))


class CaptureError(NarrowsError):
    """The model cannot be turned into a program."""


class ProgramError(NarrowsError):
    """A program breaks an invariant of the IR, or was called with unfit inputs."""


class OpError(NarrowsError):
    """A row of the op table is wrong, registered twice, or missing under ``strict``."""


class PlanError(NarrowsError):
    """A channel plan does not fit the program, or cannot be read."""


class PassError(NarrowsError):
    """A pass or a pipeline is misused, or broke its own promise."""


class FidelityError(PassError):
    """A rewritten program differs from its reference by more than its pass promises."""


class LowerError(NarrowsError):
    """A program cannot be lowered to the target."""


class ArtifactError(NarrowsError):
    """An artifact cannot be written, read or run."""


class UsageError(NarrowsError):
    """The command line or an argument is malformed."""


class PlanUsageError(UsageError, PlanError):
    """What a plan is asked for is malformed, or names what is not there."""


class UnreachableError(PlanError):
    """A budget cannot be met."""


class PassUsageError(UsageError, PassError):
    """What a pass is asked for is malformed, or names what is not there."""


class ArtifactUsageError(UsageError, ArtifactError):
    """There is no artifact where one was named."""


@contextlib.contextmanager
def users_code(what: str, error: type[NarrowsError]) -> Iterator[None]:
    """Raise an error that says what a person's function failed at, whatever it raised itself.

    What narrows raised inside it stays as it is.
    """
    try:
        yield
    except NarrowsError:
        raise
    except Exception as cause:
        raise error(f"{what}: {type(cause).__name__}: {cause}") from cause


def unknown_option(owner: str, name: str, known: Iterable[str]) -> UsageError:
    """Return the error for an option that a function, a pass or a target has not."""
    options = list(known)
    return UsageError(
        f"{owner} has no option {name!r}",
        why=f"its options are: {', '.join(options) or 'none'}",
        hint=suggest(name, options),
    )


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for the closest known name, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else ""
