"""What operators of integer programs cost in ONNX Runtime: the table, and how it is measured.

The works are those of the program in floats, before it is quantized, because that is when reads and
widths are chosen. A time is that of what the integer program's file says in an operator's place: a
convolution of bytes; DequantizeLinear, Sigmoid, Mul and QuantizeLinear for a SiLU; some twenty
nodes for a layer norm.
"""
