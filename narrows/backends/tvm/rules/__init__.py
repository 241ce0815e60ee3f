"""The lowering rules: per ATen overload how it is spelled in Relax and in kernels of our own.

Importing this package needs TVM and no torch; it runs in the compiler's own process.
"""

from narrows.backends.tvm.rules import (
    attention as attention,
)
from narrows.backends.tvm.rules import (
    codes as codes,
)
from narrows.backends.tvm.rules import (
    comparisons as comparisons,
)
from narrows.backends.tvm.rules import (
    contractions as contractions,
)
from narrows.backends.tvm.rules import (
    integers as integers,
)
from narrows.backends.tvm.rules import (
    layout as layout,
)
from narrows.backends.tvm.rules import (
    norms as norms,
)
from narrows.backends.tvm.rules import (
    pointwise as pointwise,
)
from narrows.backends.tvm.rules import (
    quotients as quotients,
)
from narrows.backends.tvm.rules import (
    reductions as reductions,
)
from narrows.backends.tvm.rules import (
    windows as windows,
)
from narrows.backends.tvm.rules.table import RULES

__all__ = ["RULES"]
