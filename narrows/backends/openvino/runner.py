"""Runs a model in a process of its own: ``python -m narrows.backends.openvino.runner JOB MODEL``.

``JOB`` is what `narrows.backends.apart` makes; ``MODEL`` is an ONNX file.
"""

from __future__ import annotations

import sys
from pathlib import Path

from narrows.backends.apart import serve, without_torch


def main(job: Path, model: Path) -> None:
    """Run the model on all inputs of a job, on one thread."""
    without_torch()
    from narrows.backends.openvino.session import OpenvinoSession

    serve(job, OpenvinoSession(model, threads=1).run)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
