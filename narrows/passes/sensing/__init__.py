"""Sensitivity: what a network's outputs lose to one change at a time.

Start at `narrows.passes.sensing.run`. A change is a job (`jobs`), which is measured (`trial`) by
whatever executor, kept in a folder (`store`), and becomes a row of a table (`table`).
"""
