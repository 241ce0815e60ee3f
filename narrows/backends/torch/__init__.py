"""The torch backend: the program as a ``.pt2`` file that torch itself loads."""

from narrows.backends.torch.target import TorchTarget

__all__ = ["TorchTarget"]
