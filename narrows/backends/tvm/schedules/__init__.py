"""How kernels run fast: per kind of kernel the choices there are, and a schedule for a choice.

`choices` lists them for one kernel, the most promising first; `scheduled` applies one.
"""

from narrows.backends.tvm.schedules.apply import Choice, choices, scheduled
from narrows.backends.tvm.schedules.dots import DOTS

__all__ = ["DOTS", "Choice", "choices", "scheduled"]
