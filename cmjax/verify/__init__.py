"""The two readings of a program held against each other and against XLA."""

from cmjax.verify.run import Traffic, run_on_mesh

__all__ = ["Traffic", "run_on_mesh"]
