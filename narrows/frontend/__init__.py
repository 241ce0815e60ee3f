"""The frontend: a model in, a `Program` out."""

from narrows.frontend.export import capture

__all__ = ["capture"]
