"""What values have methods for although the code is written above them.

A `Program` becomes text, a module, its couplings, itself in another precision; a plan shrinks and
restores checkpoints. So that they need not know of that code, their packages (`narrows.ir`,
`narrows.passes.plans`) put it here when they are imported, under the methods' names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

VIEWS: dict[str, Callable[..., Any]] = {}
