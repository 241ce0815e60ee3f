"""Runs an artifact in a process of its own: ``python -m narrows.backends.tvm.runner JOB FOLDER``.

``JOB`` holds ``manifest.json`` and ``inputs.npz``, and gets ``outputs.npz``; ``FOLDER`` holds the
library.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(job: Path, folder: Path) -> None:
    """Run the artifact on all inputs of a job."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    import numpy as np

    from narrows.backends.store import read_manifest
    from narrows.backends.tvm.session import open_session

    manifest = read_manifest(job)
    session = open_session(folder, manifest, None)
    with np.load(job / "inputs.npz") as stored:
        trials: list[dict[str, np.ndarray]] = [{} for _ in range(int(stored["count"]))]
        for key in stored.files:
            number, space, name = key.partition(" ")
            if space:
                trials[int(number)][name] = stored[key]
    results = {}
    for number, arrays in enumerate(trials):
        for i, result in enumerate(session.run_all(arrays)):
            results[f"{number} {i}"] = result
    np.savez(job / "outputs.npz", **results)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
