"""Text from a model on a mesh of ranks."""
