"""Recorded loads in, plans out, in every format that recorders and engines use."""
