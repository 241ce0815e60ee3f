"""Times programs in OpenVINO before any of them is lowered, in one process of its own.

It is started once and told what to load and how often to run it, line by line:
``python -m narrows.backends.openvino.track FOLDER``. A model is ``FOLDER/1.onnx``, its inputs are
``FOLDER/1.npz``. ``load 1`` is answered by ``ok``, ``time 1 20`` by the seconds that one of twenty
runs takes on the processor, and what fails by ``no`` and why.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from narrows.backends.apart import child_environment, describe_end, without_torch
from narrows.errors import LowerError, NarrowsError
from narrows.files.folders import temporary

if TYPE_CHECKING:
    from narrows.backends.base import Track
    from narrows.backends.timing import Trial
    from narrows.ir.program import Program

MODULE = "narrows.backends.openvino.track"

Draft = Callable[["Program", int], tuple[bytes, dict[str, np.ndarray]]]


@contextlib.contextmanager
def track(draft: Draft) -> Iterator[Track]:
    """Yield what makes a program ready and returns its trial, for as long as the process lives.

    Args:
        draft: Returns the file of a program, which holds its weights, and inputs by name.
    """
    with temporary() as folder:
        child = subprocess.Popen(
            [sys.executable, "-m", MODULE, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=child_environment(),
        )  # fmt: skip
        count = iter(range(1, sys.maxsize))

        def trial(program: Program, batch: int) -> Trial:
            model, arrays = draft(program, batch)
            number = next(count)
            (folder / f"{number}.onnx").write_bytes(model)
            np.savez(folder / f"{number}.npz", **arrays)  # type: ignore[arg-type]
            _ask(child, f"load {number}")
            return lambda times: float(_ask(child, f"time {number} {times}"))

        try:
            yield trial
        finally:
            child.kill()
            child.communicate()


def _ask(child: subprocess.Popen[str], words: str) -> str:
    """Return what the process answers; `LowerError` if it fails, or has ended."""
    assert child.stdin is not None
    assert child.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(words + "\n")
        child.stdin.flush()
    answer = child.stdout.readline().rstrip("\n")
    if not answer:
        end = describe_end(child.wait())
        raise LowerError(f"OpenVINO does not run here ({end})")
    if answer.startswith("no "):
        raise LowerError(answer.removeprefix("no "))
    return answer


# ---------------------------------------------------------------------- in that process


def main(folder: Path) -> None:
    """Answer line by line, until there are no more."""
    without_torch()
    from narrows.backends.openvino.session import OpenvinoSession

    known: dict[str, tuple[OpenvinoSession, dict[str, np.ndarray]]] = {}
    for line in sys.stdin:
        word, number, *times = line.split()
        try:
            if word == "load":
                with np.load(folder / f"{number}.npz") as stored:
                    arrays = {name: stored[name] for name in stored.files}
                known[number] = OpenvinoSession(folder / f"{number}.onnx", threads=1), arrays
                answer = "ok"
            else:
                session, arrays = known[number]
                answer = repr(_timed(session, arrays, int(times[0])))
        except NarrowsError as error:
            answer = f"no {error.what}: {error.why}".replace("\n", " ")
        print(answer, flush=True)


def _timed(session: Any, arrays: dict[str, np.ndarray], count: int) -> float:
    """Return the seconds of one of several runs; OpenVINO computes on a thread of its own."""
    start = time.process_time()
    for _ in range(count):
        session.run(arrays)
    return (time.process_time() - start) / count


if __name__ == "__main__":
    main(Path(sys.argv[1]))
