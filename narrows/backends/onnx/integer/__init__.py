"""Integer programs in ONNX, built node by node, in three forms.

* ``qdq``: floating-point operators between DequantizeLinear and QuantizeLinear, which ONNX Runtime
  fuses to its fastest integer kernels, and which every other runtime can read (`qdq`);
* ``qlinear``: the integer operators themselves, some of them ONNX Runtime's own (`qlinear`);
* ``integer``: int32 and int64 arithmetic alone, slow and plain, to check by (`portable`).

Codes are uint8 between operators in all three, and operators that only move them work on them
directly (`moves`). `lower` drives; `check` compares with the program, bit for bit.
"""
