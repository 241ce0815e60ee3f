"""Cost tables that were measured: grids of times, what lies between them, and their files.

`CostTable` knows of no layout. What a runtime does with layouts and spellings is in its own package
(`narrows.backends.onnx.staircase`, `narrows.backends.torch.eager`).
"""
