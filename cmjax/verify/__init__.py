"""The two readings of a program held against each other and against XLA."""
