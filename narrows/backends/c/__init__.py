"""Standalone C: an integer program as one ``model.c`` for machines without anything else."""

from narrows.backends.c.target import CTarget

__all__ = ["CTarget"]
