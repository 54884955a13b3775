"""Placement while serving: moves between plans and what they cost."""
