"""Latency of one set of masks in every exact form, and beside Torch-Pruning at equal MACs.

    python -m benchmarks.reorder --cache /tmp/reorder --json r.json --markdown r.md

`case` says which model and which masks; `forms` makes what narrows makes of them, `peers` what the
others make; `prepare` writes a form down and checks it; `timing` runs all of them in turns;
`report` has the tables and the goals. `dense_blocks` is the scaling of the compile time.
"""
