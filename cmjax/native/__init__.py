"""Optional C++ kernels for CPU devices, behind the primitives that have them."""

from cmjax.native.library import Status, call, function, status

__all__ = ["Status", "call", "function", "status"]
