"""Convolutions with few multiplications, and the quantisation they are trained with (RSQ)."""
