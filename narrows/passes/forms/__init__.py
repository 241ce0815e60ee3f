"""Exact forms of a pruned program, weighed by a target's costs, and orders of channels."""
