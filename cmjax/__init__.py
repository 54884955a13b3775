"""cmjax: a differentiable performance-and-accuracy model of the CloudMatrix384 supernode.

>>> import cmjax
>>> prediction = cmjax.predict("tiny", "cloudmatrix384", phase="decode", npus=8)
>>> print(f"{prediction.requests.batch:g} requests per NPU")
96 requests per NPU
"""

import lazy_loader

# What there is, and where it is from, stands in __init__.pyi; nothing is imported before its use.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
