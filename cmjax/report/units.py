"""How numbers are shown to people: the unit that a result's key names, and sensible digits."""

_UNITS = {"ms": "ms", "us": "µs", "s": "s", "gb_per_s": "GB/s", "tflops": "TFLOPS", "gb": "GB"}


def unit(key: str) -> str:
    """The unit that the last words of a result's key name; empty if they name none."""
    if "tokens_per_s" in key:
        return "tokens/s per NPU" if key.endswith("per_npu") else "tokens/s"
    if key == "utilization":
        return "%"
    words = key.split("_")
    endings = ("_".join(words[start:]) for start in range(len(words)))
    return next((_UNITS[ending] for ending in endings if ending in _UNITS), "")


def number(value: float) -> str:
    """Three digits that matter, or all before the point, with thousands separated."""
    size = abs(value)
    if size == 0 or size >= 99.95:
        return f"{value:,.0f}"
    if size < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.{1 if size >= 9.995 else 2 if size >= 0.9995 else 3}f}"


def quantity(key: str, value: float) -> str:
    """`value` of the result's key as text with its unit, such as `46.6 ms`."""
    shown = unit(key)
    if shown == "%":
        return f"{value:.1%}".replace("%", " %")
    return f"{number(value)} {shown}".rstrip()


def percent(value: float, *, sign: bool = False, digits: int = 1) -> str:
    """A fraction as percent, with a true minus sign and, on request, a plus."""
    text = f"{value:{'+' if sign else ''}.{digits}%}".replace("-", "−")
    return text.replace("%", " %")
