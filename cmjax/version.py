"""The version that is installed, and those of what it computes with.

`importlib.metadata` takes longer to load than the list of commands to show: it is loaded late.
"""

import platform

__version__: str
_BENEATH = ("jax", "jaxlib", "flax", "numpy")


def __getattr__(name: str) -> str:
    if name == "__version__":
        return _installed("cmjax")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def about() -> str:
    """One line for a report: cmjax, what lies beneath it, Python and the platform."""
    beneath = ", ".join(f"{package} {_installed(package)}" for package in _BENEATH)
    python = f"Python {platform.python_version()}, {platform.platform()}"
    return f"cmjax {_installed('cmjax')} ({beneath}, {python})"


def _installed(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:  # a checkout on the path
        return "unknown"
