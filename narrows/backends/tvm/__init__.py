"""The TVM backend: kernels of our own through TensorIR, as a shared library or as object files."""

from narrows.backends.tvm.target import TvmTarget

__all__ = ["TvmTarget"]
