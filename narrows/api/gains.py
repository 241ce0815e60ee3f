"""What a compile came to, for its last lines: sizes and times, before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from narrows.api.contest import Contest
    from narrows.backends.artifact import Artifact
    from narrows.ir.program import Program
    from narrows.passes.pipeline import Pipeline

UNPRUNED = "unpruned"


@dataclass(frozen=True)
class Size:
    """How large a program is, and how long it takes by a target's costs.

    Attributes:
        parameters: Its trained numbers.
        bytes: Those of all weights.
        seconds: What is predicted; ``None`` without costs.
    """

    parameters: int
    bytes: int
    seconds: float | None

    @staticmethod
    def of(program: Program, passes: Pipeline) -> Size:
        """Return the size of a program, predicted by the costs that the passes choose by."""
        from narrows.passes.legalize_reads import LegalizeReads, table_of

        found = next((p for p in passes.passes if isinstance(p, LegalizeReads)), None)
        costs = None if found is None else table_of(found.costs, found.name)
        seconds = None
        if costs is not None and found is not None:
            seconds = sum(s for _, s in costs.predict(program, found.batch))
        held = sum(t.nbytes for t in program.weights.values())
        return Size(program.parameter_count, held, seconds)


def gains(before: Size, after: Size, artifact: Artifact, held: Contest | None) -> dict[str, Any]:
    """Return what the manifest says of a compile: ``gain`` and, where there was one, ``contest``.

    Args:
        before: The size of the captured program.
        after: The size of what was made of it.
        artifact: What was lowered; its bytes are those of its files.
        held: The contest of forms.
    """
    gain: dict[str, Any] = {
        "parameters": [before.parameters, after.parameters],
        "bytes": [before.bytes, artifact.size],
    }
    if before.seconds is not None and after.seconds is not None:
        gain["predicted_ms"] = [_ms(before.seconds), _ms(after.seconds)]
    if held is None:
        return {"gain": gain}
    ends = [held.entry(UNPRUNED), held.entry(held.winner)]
    times = [e.measured for e in ends if e is not None and e.measured is not None]
    if len(times) == len(ends):
        gain["measured_ms"] = [_ms(t) for t in times]
    return {"gain": gain, "contest": held.to_json()}


def _ms(seconds: float) -> float:
    return float(f"{seconds * 1e3:.4g}")


__all__ = ["Size", "gains"]
