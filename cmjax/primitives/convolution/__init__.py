"""Convolutions with few multiplications, and the quantization they are trained with (RSQ)."""
