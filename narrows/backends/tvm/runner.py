"""Runs an artifact in a process of its own: ``python -m narrows.backends.tvm.runner JOB FOLDER``.

``JOB`` holds ``manifest.json`` and ``inputs.npz``, and gets ``outputs.npz``; ``FOLDER`` holds the
library.
"""

from __future__ import annotations

import sys
from pathlib import Path

from narrows.backends.apart import serve, without_torch


def main(job: Path, folder: Path) -> None:
    """Run the artifact on all inputs of a job."""
    without_torch()
    from narrows.backends.store import read_manifest
    from narrows.backends.tvm.session import open_session

    session = open_session(folder, read_manifest(job), None)
    serve(job, session.run_all)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
