"""`QuantReport`: the figures of a quantization as text, as data and as a page."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from narrows.errors import ArtifactError
from narrows.files.writing import write_text
from narrows.passes.quant.figures import Figures
from narrows.passes.quant.page import page


@dataclass(frozen=True)
class QuantReport(Figures):
    """What quantization did to a program; ``str(report)`` is a table."""

    def save(self, folder: str | os.PathLike[str], *, artifact: str = "") -> Path:
        """Write ``report.txt``, ``report.json`` and ``report.html`` and return the folder.

        The page needs nothing but itself. `ArtifactError` if a file cannot be written.

        Args:
            folder: Where they go.
            artifact: The identity of the artifact that the report is about.
        """
        path = Path(folder)
        files = {
            "report.txt": str(self) + (f"\nartifact {artifact}\n" if artifact else ""),
            "report.json": json.dumps({"artifact": artifact, **self.to_json()}, indent=1) + "\n",
            "report.html": page(self, artifact),
        }
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"cannot write the report {path}", why=str(error.strerror)) from (
                error
            )
        for name, text in files.items():
            write_text(text, path / name)
        return path
