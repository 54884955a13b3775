"""One self-contained HTML page of text, tables and figures, for any screen, light or dark.

Everything is inline; the page asks the network for nothing and runs no script.
"""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cmjax.files import check_writable, replace_text

_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
_NUMBER = re.compile(r"[+−-]?[\d,]+(\.\d+)?(e[+-]?\d+)?( ?[%×]| ?(ms|µs|s|GB|GB/s|TFLOPS))?")
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --faint: #5f5f5f; --paper: #fff; --line: #ddd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --faint: #a5a5a5; --paper: #17191c; --line: #3a3d42; }
}
body { margin: 0 auto; max-width: 52rem; padding: 1rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; }
th { color: var(--faint); font-weight: 600; }
.n { text-align: right; white-space: nowrap; }
"""


@dataclass(frozen=True)
class Section:
    """One part of a page; what is empty is left out.

    Attributes:
      heading: plain text.
      prose: plain text; a blank line starts a new paragraph.
      columns: heads of the table's columns.
      rows: the table's cells, as text; columns of numbers are aligned to the right.
      image: a .png or .svg file to embed.
      alt: what the image shows, in words; the heading if empty.
    Raises: ValueError if a row has not one cell per column, or the image is of another kind.
    """

    heading: str
    prose: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    image: Path | None = None
    alt: str = ""

    def __post_init__(self):
        width = len(self.columns) or len(self.rows[0] if self.rows else ())
        for row in self.rows:
            if len(row) != width:
                raise ValueError(
                    f"Section {self.heading!r}: expected rows of {width} cells, got {len(row)}"
                )
        if self.image is not None and Path(self.image).suffix.lower() not in _TYPES:
            raise ValueError(
                f"Section {self.heading!r}: expected a .png or .svg image, got {self.image}"
            )


def write_page(path: str | Path, title: str, sections: Sequence[Section]) -> None:
    """Write the page.

    Raises: ValueError if `path` does not end in .html, its folder does not exist, or an image
      cannot be read.
    """
    check_page(path)
    body = "\n".join(_section(section) for section in sections)
    name = html.escape(title)
    replace_text(
        path,
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{name}</h1>\n{body}\n</main>\n</body>\n</html>\n",
    )


def check_page(path: str | Path) -> None:
    """Before long work: can a page be written there? Raises ValueError as `write_page` does."""
    path = Path(path)
    if path.suffix.lower() != ".html":
        raise ValueError(f"{path}: pages are written as .html, got {path.suffix or 'no suffix'}")
    check_writable(path)


def _section(section: Section) -> str:
    paragraphs = [p.strip() for p in section.prose.split("\n\n") if p.strip()]
    parts = [f"<h2>{html.escape(section.heading)}</h2>"]
    parts += [f"<p>{html.escape(p)}</p>" for p in paragraphs]
    if section.image is not None:
        alt = html.escape(section.alt or section.heading)
        source = _embedded(Path(section.image))
        parts.append(f'<figure><img src="{source}" alt="{alt}"></figure>')
    if section.rows:
        parts.append(_table(section))
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _table(section: Section) -> str:
    columns = zip(*section.rows, strict=True)
    numeric = [all(_NUMBER.fullmatch(cell.strip()) for cell in column) for column in columns]

    def line(cells: Sequence[str], tag: str) -> str:
        marked = (
            f'<{tag} class="n">{html.escape(cell)}</{tag}>'
            if number
            else f"<{tag}>{html.escape(cell)}</{tag}>"
            for cell, number in zip(cells, numeric, strict=True)
        )
        return f"<tr>{''.join(marked)}</tr>"

    head = f"<thead>{line(section.columns, 'th')}</thead>\n" if section.columns else ""
    body = "\n".join(line(row, "td") for row in section.rows)
    return f'<div class="table"><table>\n{head}<tbody>\n{body}\n</tbody>\n</table></div>'


def _embedded(image: Path) -> str:
    """The file as a data URI; as an image, an SVG's ids and styles stay its own."""
    try:
        data = base64.b64encode(image.read_bytes()).decode()
    except OSError as error:
        raise ValueError(f"{image}: the image cannot be read: {error.strerror}") from None
    return f"data:{_TYPES[image.suffix.lower()]};base64,{data}"
