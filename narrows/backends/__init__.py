"""The backends: a `Program` in, an `Artifact` out.

Nothing here imports torch or a target's packages before they are used.
"""

from narrows.backends.base import (
    Target,
    Variant,
    costs_of,
    lower,
    make_target,
    target_names,
    target_type,
)

__all__ = ["Target", "Variant", "costs_of", "lower", "make_target", "target_names", "target_type"]
