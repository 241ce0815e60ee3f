"""Generated networks with masks of every kind, through all of narrows, against two references.

Start at `narrows`' own claim in `benchmarks.fuzz.judge`; `python -m benchmarks.fuzz` runs it.
"""
