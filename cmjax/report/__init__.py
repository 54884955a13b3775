"""What people look at: tables for a terminal, figures, and pages to pass on.

What is where stands in `__init__.pyi`: matplotlib is imported with the first picture.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
