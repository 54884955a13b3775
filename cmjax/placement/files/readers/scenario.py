"""What a file of recordings holds: one or more named workloads, each as counts or as routes."""

from collections.abc import Mapping

from cmjax.placement.loads import Loads
from cmjax.placement.routes import Routes

COUNT_KEYS = ("counts", "loads", "expert_popularity", "weight", "logical_count")
"""Names under which recorders store counts; the last is SGLang's."""

Scenarios = Mapping[str, Loads | Routes]
"""Workloads by domain; a file that names none has the one domain ""."""


class NoRecordingError(ValueError):
    """A sound file that holds something else: a list of documents, say, or a licence."""
