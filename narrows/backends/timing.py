"""How long artifacts take: several take turns, so that what slows the machine slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from narrows.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np

    from narrows.backends.artifact import Artifact

WARM = 2
SAMPLE = 0.004  # seconds: in a race a shorter call is made several times a turn
LEAST, MOST = 3, 500  # turns of who is in front at the end
# After so many turns, who is that much slower than the fastest leaves a race.
LEAVING = ((1, 1.5), (3, 1.15), (6, 1.05), (12, 1.02))
CLOCK = time.thread_time  # tells the time of a trial
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


# Runs something so many times, and returns the seconds of one time, on the processor.
Trial = Callable[[int], float]


def here(run: Callable[[], Any]) -> Trial:
    """Return a trial of a function, by the time that this thread is on the processor."""

    def trial(count: int) -> float:
        start = CLOCK()
        for _ in range(count):
            run()
        return (CLOCK() - start) / count

    return trial


def race(trials: Mapping[str, Trial], seconds: float) -> dict[str, list[float]]:
    """Return the seconds of one call per trial and turn.

    They take turns, each round beginning with another one. Who is clearly slower than the fastest
    leaves, so that the time goes to those that are near each other; a race ends when one is left.

    Args:
        trials: What is timed, by name.
        seconds: How long it may take; every trial has a turn, and those in front have `LEAST`.
    """
    found: dict[str, list[float]] = {name: [] for name in trials}
    first = {name: max(trial(1), 1e-6) for name, trial in trials.items()}
    counts = {name: max(1, round(SAMPLE / once)) for name, once in first.items()}
    spent, order = sum(first.values()), list(trials)
    for turn in range(1, MOST + 1):
        for name in order:
            found[name].append(trials[name](counts[name]))
            spent += found[name][-1] * counts[name]
        margin = dict(LEAVING).get(turn)
        if margin is not None:
            medians = {name: statistics.median(found[name]) for name in order}
            best = min(medians.values()) * margin
            order = [name for name in order if medians[name] <= best]
        if len(order) == 1 or (turn >= LEAST and spent >= seconds):
            break
        order = [*order[1:], order[0]]
    return found


def inputs_of(artifact: Artifact, batch: int) -> dict[str, np.ndarray]:
    """Return made-up inputs of an artifact.

    Args:
        artifact: The artifact.
        batch: The size of its free axes.
    """
    specs = ((spec.name, spec.shape, spec.dtype) for spec in artifact.inputs)
    return drawn(specs, batch)


def drawn(
    specs: Iterable[tuple[str, Sequence[int | str], str]], batch: int
) -> dict[str, np.ndarray]:
    """Return made-up inputs: normal numbers, or zeros where they are whole.

    Args:
        specs: Name, shape and numpy's name of the dtype of each.
        batch: The size of free axes.
    """
    import numpy as np

    generator = np.random.default_rng(0)
    arrays = {}
    for name, sizes, dtype in specs:
        shape = [batch if isinstance(s, str) else s for s in sizes]
        floats = dtype.startswith("float")
        numbers = generator.standard_normal(shape) if floats else np.zeros(shape)
        arrays[name] = numbers.astype(dtype)
    return arrays


def spread(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Return median and quartiles."""
    if len(values) == 1:
        low = middle = high = values[0]
    else:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    pairs = (("median", middle), ("low", low), ("high", high))
    return {key: float(f"{v * scale:.5g}") for key, v in pairs}


__all__ = ["Timing", "Trial", "drawn", "here", "inputs_of", "measure", "race", "spread"]
