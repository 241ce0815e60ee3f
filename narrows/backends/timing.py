"""How long artifacts take: several take turns, so that what slows the machine slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from narrows.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np

    from narrows.backends.artifact import Artifact

WARM = 2
SHORTEST = 0.003  # seconds: a shorter model is run several times a round


@dataclass
class Timing:
    """The times of one artifact at one batch size, in seconds, one a round.

    Attributes:
        cpu: CPU time of the thread, or of the process where there are several threads.
        wall: Wall time.
    """

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return median and quartiles in milliseconds."""
        return {"cpu_ms": spread(self.cpu, 1e3), "wall_ms": spread(self.wall, 1e3)}


def measure(artifacts: Sequence[Artifact], batch: int, rounds: int, threads: int) -> list[Timing]:
    """Return the times of artifacts that take turns, in the other order every other round.

    Args:
        artifacts: One or two.
        batch: The size of the free axes of their inputs.
        rounds: How many turns each of them has.
        threads: How many threads the runtime may use.
    """
    clock = time.thread_time if threads == 1 else time.process_time
    sessions = [(a.open(threads), inputs_of(a, batch)) for a in artifacts]
    timings = [Timing() for _ in sessions]
    repeats = []
    for artifact, (session, arrays) in zip(artifacts, sessions, strict=True):
        start = time.perf_counter()
        try:
            for _ in range(WARM):
                session.run(arrays)
        except ArtifactError as error:
            where = f"{artifact.folder}, batch {batch}"
            raise ArtifactError(error.what, where=where, why=error.why, hint=error.hint) from error
        once = (time.perf_counter() - start) / WARM
        repeats.append(max(1, round(SHORTEST / max(once, 1e-6))))
    for number in range(rounds):
        turns = range(len(sessions)) if number % 2 else reversed(range(len(sessions)))
        for i in turns:
            session, arrays = sessions[i]
            wall, cpu = time.perf_counter(), clock()
            for _ in range(repeats[i]):
                session.run(arrays)
            timings[i].cpu.append((clock() - cpu) / repeats[i])
            timings[i].wall.append((time.perf_counter() - wall) / repeats[i])
    return timings


def inputs_of(artifact: Artifact, batch: int) -> dict[str, np.ndarray]:
    """Return made-up inputs of an artifact.

    Args:
        artifact: The artifact.
        batch: The size of its free axes.
    """
    import numpy as np

    generator = np.random.default_rng(0)
    arrays = {}
    for spec in artifact.inputs:
        shape = [batch if isinstance(s, str) else s for s in spec.shape]
        floats = spec.dtype.startswith("float")
        numbers = generator.standard_normal(shape) if floats else np.zeros(shape)
        arrays[spec.name] = numbers.astype(spec.dtype)
    return arrays


def spread(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Return median and quartiles."""
    if len(values) == 1:
        low = middle = high = values[0]
    else:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    pairs = (("median", middle), ("low", low), ("high", high))
    return {key: float(f"{v * scale:.5g}") for key, v in pairs}


__all__ = ["Timing", "inputs_of", "measure", "spread"]
