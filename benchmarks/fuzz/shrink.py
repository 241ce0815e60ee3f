"""A failing network made smaller, as long as it fails in the same way."""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks.fuzz.apart import outcomes
from benchmarks.fuzz.graphs import FORMS, NOTHING, Graph, Mask, smaller
from benchmarks.fuzz.judge import CAUGHT, RAW, WRONG, Finding, judge

# Masks of the same kind that a smaller network is tried with.
SEEDS = 4
Attempt = tuple[Graph, list[Mask], list[str]]


def trouble(finding: Finding) -> bool:
    """Whether a finding must not be."""
    return finding.verdict in (WRONG, CAUGHT, RAW)


def like(finding: Finding, other: Finding) -> bool:
    """Whether two findings are of one kind: other numbers, or the same exception."""
    numbers = (WRONG, CAUGHT)
    if finding.verdict == RAW or other.verdict == RAW:
        return (finding.verdict, finding.reason) == (other.verdict, other.reason)
    return (
        finding.verdict in numbers
        and other.verdict in numbers
        and ((finding.stage in FORMS) == (other.stage in FORMS))
    )


def attempt(task: Attempt) -> Iterator[Finding]:
    """Yield the troubles of a network."""
    graph, masks, forms = task
    yield from (f for f in judge(graph, masks, forms) if trouble(f))


def shrunk(graph: Graph, finding: Finding, limit: float, end: float) -> tuple[Graph, Finding]:
    """Return a network as small as may be found that fails alike, and its finding.

    Args:
        graph: The network.
        finding: What is wrong with it.
        limit: Seconds of processor time that a try gets.
        end: No try begins later, by ``time.perf_counter``.
    """
    forms = [finding.stage] if finding.stage in FORMS else []
    seeds = dict.fromkeys((finding.mask.seed, *range(SEEDS)))
    masks = [Mask(finding.mask.kind, seed) for seed in seeds]
    masks = masks if finding.mask.kind == NOTHING else [Mask(NOTHING), *masks]
    if finding.stage in ("quantize", "ort", "c"):
        masks = [finding.mask]
    progress = True
    while progress:
        progress = False
        for candidate in smaller(graph):
            if time.perf_counter() > end:
                return graph, finding
            (outcome,) = outcomes(attempt, [(candidate, masks, forms)], 1, limit)
            alike = [f for f in outcome.found if like(f, finding)]
            if alike:
                graph, finding, progress = candidate, alike[0], True
                break
    return graph, finding
