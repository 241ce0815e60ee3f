"""What a test needs to run."""

from __future__ import annotations

import pytest

from narrows.backends.tvm.versions import problem

PROBLEM = problem()
NEEDS_TVM = pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM or "tvm is there")
