"""What is replayed: requests by arrival, from files of several kinds or drawn by a generator."""

from cmjax.serving.traces.generate import generate
from cmjax.serving.traces.read import read_trace
from cmjax.serving.traces.trace import Trace

__all__ = ["Trace", "generate", "read_trace"]
