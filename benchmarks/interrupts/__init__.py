"""Commands that are cut off at random moments; run it with ``python -m benchmarks.interrupts``."""
