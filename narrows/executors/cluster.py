"""`Ray`: jobs on a Ray cluster, or on one that is started for them on this machine."""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from narrows.errors import UsageError
from narrows.executors.base import LIVES, Outcome, Work, at_once, lost, packed


@dataclass(frozen=True)
class Ray:
    """Runs jobs as tasks of Ray, which begins those of a lost machine or process again elsewhere.

    The cluster is the one that Ray is connected to, that ``address`` or ``RAY_ADDRESS`` names, or
    one on this machine for this run alone. Functions of a person are imported there by their names,
    so the code has to be there, too; narrows itself as well, in the same version.

    Attributes:
        jobs: How many run at once; as many as the cluster has processors unless given.
        address: The address of a cluster.
    """

    name: ClassVar[str] = "ray"
    alone: ClassVar[bool] = False

    jobs: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        """Refuse to run nothing at once."""
        if self.jobs is not None:
            at_once(self.jobs)

    def run(self, work: Work, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield the number of every job, and what the work made of it, in the order of their
        ends."""
        if not jobs:
            return
        data = packed(work)
        ray = _ray()
        with self._connected(ray):
            yield from self._run(ray, data, jobs)

    def _run(self, ray: Any, data: bytes, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        held = ray.put(data)
        task = ray.remote(num_cpus=1, max_retries=LIVES - 1)(_served)
        waiting = deque(enumerate(jobs))
        most = self.jobs or max(1, int(ray.cluster_resources().get("CPU", 1)))
        running: dict[Any, int] = {}

        def begin() -> None:
            while waiting and len(running) < most:
                number, job = waiting.popleft()
                running[task.remote([held], job)] = number

        try:
            begin()
            while running:
                (done, *_), _ = ray.wait(list(running))
                number = running.pop(done)
                begin()  # before anybody looks at the result: the cluster need not wait
                yield number, _got(ray, done).get()
        finally:
            for reference in running:
                with contextlib.suppress(Exception):  # the cluster may be gone
                    ray.cancel(reference, force=True)

    @contextlib.contextmanager
    def _connected(self, ray: Any) -> Iterator[None]:
        """Have a cluster for the block, and leave one that was there before as it was."""
        if ray.is_initialized():
            yield
            return
        try:
            ray.init(address=self.address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as cause:
            raise UsageError(
                f"cannot connect to the Ray cluster {self.address or ''}".rstrip(), why=str(cause)
            ) from cause
        try:
            yield
        finally:
            ray.shutdown()


def _ray() -> Any:
    """Return the package; `UsageError` where it is not installed."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as cause:
        raise UsageError(
            "the executor ray needs the package ray",
            why=str(cause),
            hint="pip install narrows[ray]",
        ) from cause
    return ray


def _got(ray: Any, reference: Any) -> Outcome:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as cause:  # it was begun again, and lost every time
        raise lost(f"was lost: {cause}".partition("\n")[0]) from cause


def _served(held: list[Any], job: Any) -> Outcome:
    """Do one job: what runs on the cluster."""
    opened = _opened(held[0])
    return opened if opened.error is not None else Outcome.of(opened.value, job)


@functools.lru_cache(maxsize=1)
def _opened(reference: Any) -> Outcome:
    """Return the work, fetched and read once by each process."""
    return Outcome.of(pickle.loads, _ray().get(reference))


__all__ = ["Ray"]
