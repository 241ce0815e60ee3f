"""The steps that bring a lifted graph into the dialect, in their order."""

from __future__ import annotations

from narrows.frontend.composites import expand_composites
from narrows.frontend.constants import fold_constants
from narrows.frontend.decomposed import recompose
from narrows.frontend.draft import Draft
from narrows.frontend.functional import functionalise
from narrows.frontend.norms import recognise_norms
from narrows.frontend.refuse import check_draft
from narrows.frontend.simplify import (
    drop_empty,
    drop_no_ops,
    drop_unread,
    inline_contexts,
    unify_sizes,
)


def normalise(draft: Draft) -> bool:
    """Bring the draft into the dialect; ``False`` if torch must functionalise the graph first.

    Constants are folded before writes are replaced, so that a mask that is written slice by slice
    is run and not rewritten, and again after it: literals that data is written into.
    On ``False`` the draft is half done and must be dropped.
    """
    drop_unread(draft)
    inline_contexts(draft)
    fold_constants(draft)
    unify_sizes(draft)
    if not functionalise(draft):
        return False
    fold_constants(draft)
    recompose(draft)
    expand_composites(draft)
    unify_sizes(draft)
    recompose(draft)
    drop_empty(draft)
    drop_no_ops(draft)
    drop_unread(draft)
    recognise_norms(draft)
    check_draft(draft)
    return True
