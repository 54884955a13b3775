"""Options of a program, read into its dataclass; what is wrong with them is one line."""

import contextlib
import io
import re
from collections.abc import Callable, Sequence

import tyro

from cmjax.console import exit_code

_CLOSEST = 3  # names shown where one is unknown
_PLAINLY = (
    (r"Error parsing (\S+): no type matching (.+) could be instantiated from \[(.*)\]",
     r"\1 takes \2, got \3"),
    (r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)",
     r"\1 takes INT, got \2"),
    (r"Error parsing (\S+): could not convert string to float: (.*)", r"\1 takes FLOAT, got \2"),
    (r"Error parsing (\S+): ", r"\1: "),
    (r"[Ii]nvalid choice (.+) for argument '(?:\w+\.)*(\S+)'\. Expected one of \((.+?),?\)",
     r"\2 takes one of \3, got \1"),
)  # fmt: skip
"""How tyro says what is wrong with a value, and the same in fewer words."""


def parsed[Options](
    kind: Callable[..., Options],
    arguments: Sequence[str] | None = None,
    *,
    description: str | None = None,
    prog: str | None = None,
) -> Options:
    """What `arguments` (default: those of the process) say of the fields of `kind`.

    Raises:
      ValueError: an option is unknown, lacks its value, or has one that it cannot have.
      SystemExit: help was asked for, and printed.

    >>> import dataclasses
    >>> @dataclasses.dataclass(frozen=True)
    ... class Options:
    ...     ranks: int = 8
    >>> parsed(Options, ["--ranks", "16"], prog="it")
    Options(ranks=16)
    >>> parsed(Options, ["--rank", "16"], prog="it")
    Traceback (most recent call last):
    ValueError: unrecognized options: --rank, 16; perhaps --ranks? (it --help)
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind,
                args=arguments,
                prog=prog,
                description=description,
                config=(tyro.conf.DisallowNone,),
            )
    except SystemExit as left:
        if not left.code:
            raise
    raise ValueError(_one_line(said.getvalue()))


def run_program[Options](
    run: Callable[[Options], object],
    kind: Callable[..., Options],
    description: str | None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Read the options of a program, run it with them, and say how it went.

    Returns: its exit code, as `cmjax.console.exit_code` has them.
    """

    def program() -> None:
        run(parsed(kind, arguments, description=description))

    return exit_code(program)


def _one_line(box: str) -> str:
    """tyro frames what is wrong, then what may have been meant, then where to find help."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    parts = re.split(r"\n?^[─-]{3,}$\n?", "\n".join(lines), flags=re.MULTILINE)
    wrong, *more = parts if "╭" in box else parts[1:]  # a terminal without corners has a title
    wrong = " ".join(wrong.partition("Got errors:")[0].split()).strip(" .")
    for pattern, plainly in _PLAINLY:
        wrong = re.sub(pattern, plainly, wrong)
    said = wrong[:1].lower() + wrong[1:]
    meant = re.findall(r"^--[\w-]+", "\n".join(more), re.MULTILINE) if "erhaps" in box else []
    if meant:
        said += f"; perhaps {' or '.join(dict.fromkeys(meant[:_CLOSEST]))}?"
    helped = re.search(r"(\S[^\n]* --help)", "\n".join(more))
    if helped:
        program = re.sub(r"^For full helptext,? (run:?|see) *", "", helped[1].strip())
        said += f" ({program})"
    return said
