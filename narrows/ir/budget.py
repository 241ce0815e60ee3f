"""How a budget of time is written."""

from __future__ import annotations

import re

UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds_of(text: str) -> float | None:
    """Return the seconds of ``600s``, ``10m`` or ``2h``; ``None`` for what is no time."""
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)([{''.join(UNITS)}])", text)
    return float(match[1]) * UNITS[match[2]] if match else None
