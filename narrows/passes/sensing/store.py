"""`Store`: what was measured, one file a job, so that a run that was cut off goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrows.errors import UsageError
from narrows.files.reading import fit, read_json
from narrows.files.writing import write_text
from narrows.passes.sensing.trial import Found

FORMAT = "narrows-sense-1"


@dataclass(frozen=True)
class Store:
    """A folder of results by the keys of their jobs; nothing is kept without one.

    Runs may share a folder, at the same time too: every file is whole, and a key says all that its
    numbers hang on.

    Attributes:
        folder: The folder; ``None`` keeps nothing.
    """

    folder: Path | None

    def known(self, keys: Iterable[str]) -> dict[str, Found]:
        """Return what is kept of some jobs.

        Raises:
            UsageError: A file is damaged, or none of these.
        """
        if self.folder is None:
            return {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = error.strerror or str(error)
            raise UsageError(f"{self.folder} cannot keep results", why=why) from error
        places = ((key, self._place(key)) for key in keys)
        return {key: _read(place) for key, place in places if place.exists()}

    def keep(self, key: str, found: Found) -> None:
        """Keep what was measured of a job."""
        if self.folder is not None:
            data = {"format": FORMAT, **dataclasses.asdict(found)}
            write_text(json.dumps(data) + "\n", self._place(key), UsageError)

    def _place(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.json"


def _read(place: Path) -> Found:
    try:
        data: Any = read_json(place)
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        return fit(data, Found)
    except (OSError, ValueError) as error:
        raise UsageError(
            "a kept result cannot be read", where=str(place), why=str(error), hint="delete the file"
        ) from error


__all__ = ["Store"]
