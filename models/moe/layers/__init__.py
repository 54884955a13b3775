"""The layers of a mixture-of-experts transformer, as one rank holds them."""
