"""The OpenVINO backend: the file of the ONNX backend, checked and run in OpenVINO."""

from narrows.backends.openvino.target import OpenvinoTarget

__all__ = ["OpenvinoTarget"]
