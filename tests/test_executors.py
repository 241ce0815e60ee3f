"""Jobs: every one is done, wherever they run and whatever is killed meanwhile."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import narrows
from narrows.errors import UsageError
from narrows.executors.base import Executor, ExecutorError
from narrows.executors.catalog import EXECUTORS, find
from narrows.executors.cluster import Ray
from narrows.executors.here import Here
from narrows.executors.processes import Processes
from tests.errands import Fragile, refusing, sleeping, square, unsendable
from tests.passes.residual import images, settled

JOBS = (5, 4, 3, 2, 1)
SQUARES = {0: 25, 1: 16, 2: 9, 3: 4, 4: 1}


@pytest.mark.parametrize("executor", [Here(), Processes(2), Processes(9)])
def test_every_job_is_done_once(executor: Executor):
    found = [*executor.run(square, JOBS)]
    assert dict(found) == SQUARES
    assert len(found) == len(JOBS)
    assert not [*executor.run(square, ())]
    assert not multiprocessing.active_children()


def test_a_killed_process_loses_nothing(tmp_path: Path):
    found = Processes(2).run(Fragile(tmp_path, 3), JOBS)
    assert dict(found) == SQUARES
    assert len([*tmp_path.glob("3.*")]) == 2
    assert not multiprocessing.active_children()


def test_a_job_that_kills_every_process_is_an_error(tmp_path: Path):
    with pytest.raises(ExecutorError, match="a job was lost 3 times") as caught:
        dict(Processes(1).run(Fragile(tmp_path, 3, times=9), JOBS))
    assert "exit code -9" in caught.value.why
    assert not multiprocessing.active_children()


def test_an_error_comes_back_with_all_it_says():
    with pytest.raises(UsageError) as caught:
        dict(Processes(2).run(refusing, JOBS))
    error = caught.value
    assert (error.what, error.where, error.why, error.hint) == (
        "there is no 3", "here", "it is odd", "4"
    )  # fmt: skip
    assert "in refusing" in error.__notes__[0]
    assert not multiprocessing.active_children()


def test_whoever_stops_asking_ends_all_processes():
    running: Any = Processes(2).run(sleeping, (0, 3600))
    assert next(running) == (0, 0)
    running.close()
    assert not multiprocessing.active_children()


def test_what_cannot_be_sent_is_told():
    with pytest.raises(UsageError, match="cannot be sent to another process") as caught:
        next(Processes(2).run(lambda job: job, JOBS))
    assert "not a lambda" in caught.value.hint


def test_a_result_that_cannot_be_sent_is_told():
    with pytest.raises(UsageError, match="what a job made cannot be sent from another") as caught:
        dict(Processes(1).run(unsendable, JOBS))
    assert "lambda" in caught.value.why
    assert not multiprocessing.active_children()


UNGUARDED = """
from narrows.executors.processes import Processes

class Large:
    def __init__(self):
        self.data = bytes(1 << 20)
    def __call__(self, job):
        return job

dict(Processes(2).run(Large(), (1, 2)))
"""


def test_a_script_without_its_guard_is_told(tmp_path: Path):
    """Its processes end while they start, and the work is more than a pipe takes."""
    (tmp_path / "script.py").write_text(UNGUARDED)
    ended = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "ExecutorError: a job was lost 3 times" in ended.stderr
    assert "if __name__ == '__main__'" in ended.stderr


def test_executors_are_found_by_name():
    assert find() == find("here") == find(jobs=1) == Here()
    assert find(jobs=3) == find("processes", 3) == Processes(3)
    assert find("ray") == Ray()
    own = Processes(4)
    assert find(own) is own
    for name in EXECUTORS.providers():
        assert isinstance(find(name), Executor)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("rya",), "there is no executor 'rya'"),
        ((3,), "an executor is a name or has name, alone and run, got 3"),
        ((None, 0), "jobs is a whole number of at least 1, got 0"),
        (("processes", True), "jobs is a whole number"),
        (("here", 2), "2 jobs cannot run at once in this process"),
        ((Here(), 2), "jobs has no effect beside an executor"),
    ],
)
def test_wrong_executors(given: tuple[Any, ...], message: str):
    with pytest.raises(UsageError, match=message):
        find(*given)


@pytest.mark.parametrize("kind", [Here, Processes])
@pytest.mark.parametrize("jobs", [None, 0, -1, True, 1.5, "2"])
def test_an_executor_refuses_what_is_no_number_of_jobs(kind: Any, jobs: Any):
    with pytest.raises(UsageError, match="jobs is a whole number of at least 1, got"):
        kind(jobs=jobs)


def test_ray_is_needed_for_ray(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="needs the package ray") as caught:
        next(Ray().run(square, JOBS))
    assert caught.value.hint == "pip install narrows[ray]"


def begun_by(folder: Path, job: int) -> list[str]:
    """Return on which machines a job was begun: the processes that are one for Ray."""
    return [file.read_text().split()[0] for file in folder.glob(f"{job}.*")]


def begun_on(folder: Path, machine: str) -> set[str]:
    """Return the processes that began jobs on a machine."""
    told = (file.read_text().split() for file in folder.iterdir())
    return {process for at, process in told if at == machine}


def kill(*processes: str) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore")  # those of Ray
def test_a_ray_cluster_loses_nothing_when_a_machine_is_killed(tmp_path: Path):
    """Two machines, as Ray makes them of processes, of which one goes while it is at a job."""
    pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        _, second = (cluster.add_node(num_cpus=1) for _ in range(2))
        machine = str(second.all_processes["raylet"][0].process.pid)
        jobs, found = tuple(range(14)), {}
        work = Fragile(tmp_path, 3, seconds=1.5)  # a process is killed as well
        for number, value in Ray(address=cluster.address).run(work, jobs):
            found[number] = value
            if second is not None and machine in begun_by(tmp_path, number):
                time.sleep(0.5)  # it has begun another job
                kill(machine, *begun_on(tmp_path, machine))
                cluster.remove_node(second, allow_graceful=False)
                second = None
        assert second is None
        assert found == {n: n * n for n in jobs}
        again = [n for n in jobs if len(begun_by(tmp_path, n)) > 1]
        assert len(again) == 2
        assert 3 in again
        with pytest.raises(UsageError, match="there is no 3"):
            dict(Ray(address=cluster.address).run(refusing, jobs))
    finally:
        cluster.shutdown()


# ------------------------------------------------------------------ searches


class Elsewhere:
    """Runs jobs as other processes would get them, and the last first."""

    name, alone = "elsewhere", True

    def __init__(self) -> None:
        self.runs: list[int] = []

    def run(self, work: Any, jobs: Sequence[Any]) -> Any:
        self.runs.append(len(jobs))
        sent = pickle.loads(pickle.dumps(work))
        for number in reversed(range(len(jobs))):
            yield number, sent(pickle.loads(pickle.dumps(jobs[number])))


def test_a_generation_is_tried_where_the_executor_runs_jobs():
    program = settled()
    asked: dict[str, Any] = {"macs": 0.6, "data": [images(32, 1), images(32, 2)]}
    asked["allocator"] = "reward{population=2, generations=1}"
    elsewhere = Elsewhere()
    plan = narrows.plan(program, **asked, executor=elsewhere)
    assert plan == narrows.plan(program, **asked)
    assert len(elsewhere.runs) == 2 * 3  # at first and a generation, in three rounds
    assert max(elsewhere.runs) > 1
    for options, message in (
        ({"macs": 0.6}, "executor has no effect with the allocator 'global'"),
        ({"ratio": 0.6}, "executor has no effect without a budget"),
        ({"macs": 0.6, "jobs": 0}, "jobs is a whole number of at least 1, got 0"),
        ({"macs": 0.6, "executor": "there"}, "there is no executor 'there'"),
    ):
        with pytest.raises(UsageError, match=message):
            narrows.plan(program, **{"executor": None if "jobs" in options else "here", **options})
