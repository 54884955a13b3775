"""The subcommands of `cmjax`: each a dataclass whose fields are its options, and a `run`.

What is where stands in `__init__.pyi`: a command's module is imported when it is asked for, so that
`cmjax --help` starts without JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
