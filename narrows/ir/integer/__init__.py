"""Quantized values, the operators on them, and their one meaning: integers, in torch on the CPU.

A quantized tensor holds *codes* (uint8). Its `narrows.ir.integer.grid.Grid` says what they stand
for: ``value = (code - zero) * 2**-exponent``. `narrows.ir.integer.library` defines the operators in
the namespace ``torch.ops.narrows``; a program made of them *is* the reference that every backend
has to equal bit for bit.
"""
