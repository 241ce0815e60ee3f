"""Compensations: what becomes of a layer's weights when some of its inputs are gone; one a file."""
