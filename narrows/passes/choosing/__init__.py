"""Choosing what to keep: criteria, what is measured on data, a descent to a budget, and repair."""
