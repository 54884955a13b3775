"""Models to run and to price, as Flax NNX modules."""
