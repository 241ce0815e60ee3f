"""The steps that bring a lifted graph into the dialect, in their order."""

from __future__ import annotations

from narrows.frontend.composites import expand_composites
from narrows.frontend.constants import fold_constants
from narrows.frontend.decomposed import recompose
from narrows.frontend.functional import functionalise
from narrows.frontend.lifted import Lifted
from narrows.frontend.norms import recognise_norms
from narrows.frontend.refuse import check_draft
from narrows.frontend.simplify import (
    drop_empty,
    drop_no_ops,
    drop_unread,
    inline_contexts,
    respell_extrema,
    respell_indices,
    respell_unbound,
    unify_sizes,
)


def normalise(lifted: Lifted) -> bool:
    """Bring the graph into the dialect; ``False`` if torch must functionalise the graph first.

    Constants are folded before writes are replaced, so that a mask that is written slice by slice
    is run and not rewritten, and again after it: literals that data is written into.
    On ``False`` the graph is half done and must be dropped.
    """
    drop_unread(lifted)
    inline_contexts(lifted)
    fold_constants(lifted)
    unify_sizes(lifted)
    if not functionalise(lifted):
        return False
    fold_constants(lifted)
    recompose(lifted)
    respell_unbound(lifted)
    expand_composites(lifted)
    unify_sizes(lifted)
    recompose(lifted)
    drop_empty(lifted)
    respell_indices(lifted)
    respell_extrema(lifted)
    drop_no_ops(lifted)
    drop_unread(lifted)
    recognise_norms(lifted)
    check_draft(lifted)
    return True
