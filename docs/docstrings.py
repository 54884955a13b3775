"""An extension of griffe: the house's docstrings as Markdown shows them best.

An example that begins with `>>>` becomes a block of code, and a section of one line, such as
`Returns: the sum`, a paragraph of its own.
"""

import re

import griffe

_SECTION = re.compile(r"^([A-Z][a-z]+): (?=\S)")
_POWER = re.compile(r"(?<=[\w)])\*\*(?=[\w(-])")  # not bold
_BOLD = {"Args", "Returns", "Raises", "Gradient", "Fields", "Attributes", "Example", "Examples"}


class HouseStyle(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        if not obj.is_alias and obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """The text of a docstring with its examples fenced and its one-line sections set apart."""
    shown: list[str] = []
    indent: str | None = None  # of the example that a line is in
    for line in text.splitlines():
        bare = line.lstrip()
        if indent is None and len(line) - len(bare) < 4:  # further in, it is code
            line = _POWER.sub(r"\*\*", line)
        if indent is None and bare.startswith(">>>"):
            indent = line[: len(line) - len(bare)]
            shown += ["", f"{indent}```pycon"]
        elif indent is not None and not bare:
            shown += [f"{indent}```"]
            indent = None
        found = _SECTION.match(line)
        if found and found[1] in _BOLD:
            line = f"\n**{found[1]}:** {line[found.end() :]}"
        shown.append(line)
    if indent is not None:
        shown.append(f"{indent}```")
    return "\n".join(shown)
