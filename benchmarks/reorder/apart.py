"""Runs a function in a process of its own, with a limit of wall seconds."""

from __future__ import annotations

import logging
import multiprocessing
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.reorder.prepare import in_a_line

TIME_OUT = "time-out"


def apart(function: Callable[..., Any], *args: Any, limit: float) -> Any:
    """Return what the function returns, or ``{"failure": line}``."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(function, args, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit):
            return {"failure": f"{TIME_OUT} after {limit:g} s"}
        return ours.recv()
    except EOFError:
        process.join()
        return {"failure": f"the process ended with code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _serve(function: Callable[..., Any], args: tuple[Any, ...], pipe: Connection) -> None:
    import torch

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    try:
        pipe.send(function(*args))
    except KeyboardInterrupt:
        sys.exit(1)
    except Exception as error:
        pipe.send({"failure": in_a_line(error)})
