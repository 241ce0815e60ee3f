"""Where jobs run: in this process, in several, or on a Ray cluster; a package may add another.

A long command cuts what it does into jobs, small values, and hands them to an *executor* together
with the *work*: what is done with each. Start at `narrows.executors.base`.
"""
