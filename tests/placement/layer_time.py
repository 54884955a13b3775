"""A layer's price that is simple enough to be checked by hand."""


def slowest(tokens):
    """Ten microseconds, and ten nanoseconds for each token of the slowest rank."""
    return 1e-5 + 1e-8 * tokens.max(-1)
