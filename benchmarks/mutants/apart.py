"""A test run in a process of its own, forked from one that has torch and its like loaded already.

narrows itself is not loaded here: each process imports it from the tree it is given.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOADED = (
    "torch", "torch.export", "torch.onnx", "torch.utils.flop_counter", "onnx", "onnxruntime",
    "onnxscript", "onnx_ir", "onnxsim", "sympy", "networkx", "msgspec", "safetensors.torch",
    "pytest", "_pytest.assertion.rewrite", "coverage",
)  # fmt: skip
MEMORY = 8 << 30  # bytes a process may hold, so that a mutant cannot take the machine
POLL = 0.02  # seconds
INSIDE = 70  # the code of a process that failed outside pytest

PASSED, FAILED, TIMEOUT, CRASH, BROKEN = "passed", "failed", "timeout", "crash", "broken"


@dataclass(frozen=True)
class Ran:
    """How a test run went.

    Attributes:
        how: ``passed``; ``failed``: a test did; ``timeout``; ``crash``: a signal ended it;
            ``broken``: pytest ended with another code than 0 and 1.
        test: The test that failed or was the last to begin.
        text: What it said, or the code.
        seconds: The time it took.
    """

    how: str
    test: str = ""
    text: str = ""
    seconds: float = 0.0


def load() -> None:
    """Import what every process would."""
    for name in LOADED:
        importlib.import_module(name)


def run(
    tree: Path,
    files: Sequence[str],
    plugins: Callable[[Path], Sequence[Any]],
    limit: float,
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    stop: bool = True,
) -> Ran:
    """Run test files of a tree in a process of its own, with plugins that get a report's path."""
    report, output = tree.parent / "report.jsonl", tree.parent / "output.txt"
    report.unlink(missing_ok=True)
    start = time.monotonic()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        _inside(tree, files, plugins(report), output, around, stop)
    try:
        status = _waited(child, start + limit)
    except BaseException:
        _end(child)
        raise
    seconds = time.monotonic() - start
    last = _last(report)
    if status is None:
        return Ran(TIMEOUT, last.get("test", ""), f"more than {limit:.0f} s", seconds)
    if os.WIFSIGNALED(status):
        return Ran(CRASH, last.get("test", ""), f"signal {os.WTERMSIG(status)}", seconds)
    code = os.WEXITSTATUS(status)
    if code == 0:
        return Ran(PASSED, seconds=seconds)
    if code == INSIDE:
        raise RuntimeError(f"the tests cannot be started: {output.read_text(encoding='utf-8')}")
    failed = _last(report, "failed")
    if code != 1 or not failed:
        tail = output.read_text(encoding="utf-8", errors="replace")[-1500:]
        return Ran(BROKEN, text=f"pytest ended with {code}: {tail}", seconds=seconds)
    how = TIMEOUT if "Failed: Timeout" in failed["text"] else FAILED
    return Ran(how, failed["test"], failed["text"], seconds)


def _inside(
    tree: Path,
    files: Sequence[str],
    plugins: Sequence[Any],
    output: Path,
    around: Callable[[], contextlib.AbstractContextManager[Any]],
    stop: bool,
) -> None:
    code = INSIDE
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        os.environ["PYTHONPATH"], os.environ["TMPDIR"] = str(tree), str(tree.parent / "tmp")
        for name in [n for n in sys.modules if n.partition(".")[0] in ("benchmarks", "tests")]:
            del sys.modules[name]
        import pytest

        args = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", *files]
        with around():
            code = int(pytest.main([*args, "-x"] if stop else args, plugins=list(plugins)))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _waited(child: int, until: float) -> int | None:
    """Return the status of a process, or ``None`` after ending one that takes too long.

    One that takes too much memory is ended by a signal. (A limit of the address space would stop
    the sanitizers that some tests compile with.)
    """
    held = Path(f"/proc/{child}/statm")
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what it started and left behind
            return status
        with contextlib.suppress(OSError, IndexError):
            if int(held.read_text().split()[1]) * resource.getpagesize() > MEMORY:
                os.killpg(child, signal.SIGKILL)
        time.sleep(POLL)
    _end(child)
    return None


def _end(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _last(report: Path, how: str = "") -> dict[str, Any]:
    if not report.exists():
        return {}
    lines = [json.loads(s) for s in report.read_text(encoding="utf-8").splitlines()]
    return next((line for line in reversed(lines) if not how or line["how"] == how), {})
