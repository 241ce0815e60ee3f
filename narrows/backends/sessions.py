"""`Runtime`: how the artifacts of one target are opened; found by the target's name.

A package adds one through an entry point, beside that of its target (`narrows.backends.base`)::

    [project.entry-points."narrows.sessions"]
    json = "mypackage.session:RUNTIME"

It stands apart from the target, so that a machine that only runs artifacts needs nothing of what
makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from narrows.errors import ArtifactError
from narrows.registry import Registry

SESSIONS = Registry(
    "runtime of the target",
    "narrows.sessions",
    {
        "c": "narrows.backends.c.session:RUNTIME",
        "onnx": "narrows.backends.onnx.session:RUNTIME",
        "openvino": "narrows.backends.openvino.session:RUNTIME",
        "torch": "narrows.backends.torch.session:RUNTIME",
        "tvm": "narrows.backends.tvm.session:RUNTIME",
    },
    ArtifactError,
)


class Session(Protocol):
    """A loaded model of some target."""

    def run(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the output arrays for input arrays by name."""
        ...


# Opens a folder: its path, the manifest, how many threads run one operator (``None`` leaves it to
# the runtime), and whether the runtime may rewrite the graph.
Opener = Callable[[Path, Mapping[str, Any], int | None, bool], Session]


@dataclass(frozen=True)
class Runtime:
    """How artifacts of one target are opened.

    Attributes:
        open: Returns the session of an artifact's folder.
        code: Why such artifacts are code, so that they run only for whoever trusts their maker;
            empty where they are data to their runtime.
    """

    open: Opener
    code: str


def runtime_of(target: str) -> Runtime:
    """Return the runtime of a target's artifacts; `ArtifactError` if there is none here."""
    known = SESSIONS.providers()
    if target not in known:
        raise ArtifactError(
            f"cannot run an artifact of the target {target!r}",
            why=f"this narrows runs: {', '.join(known)}",
        )
    found = SESSIONS.load(target)
    if not isinstance(found, Runtime):
        raise ArtifactError(
            f"the runtime of the target {target!r} of {known[target]} is no Runtime",
            why=f"it is of the type {type(found).__name__}",
        )
    return found
