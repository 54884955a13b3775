"""Attention: exact, over a latent cache, blockwise, and in half precision (PASA)."""
