"""The ONNX backend: ``model.onnx``, checked in ONNX Runtime."""

from narrows.backends.onnx.target import OnnxTarget

__all__ = ["OnnxTarget"]
