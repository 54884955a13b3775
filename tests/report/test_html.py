"""Pages: self-contained, escaped, and refused when they could not be read."""

import base64
from html.parser import HTMLParser

import numpy as np
import pytest

from cmjax.report import Section, plot_load_curve, write_page


class Page(HTMLParser):
    """Collects tags, attributes and text; complains of tags closed out of order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def written(path, title="Title", *sections):
    write_page(path, title, sections)
    text = path.read_text()
    return text, Page(text)


def test_all_text_is_escaped(tmp_path):
    nasty = '<script>alert("x")</script> & more'
    section = Section(nasty, prose=nasty, columns=(nasty,), rows=((nasty,),))
    text, page = written(tmp_path / "page.html", nasty, section)
    assert "script" not in page.tags
    assert page.text.count(nasty) == 6  # title, h1, h2, paragraph, head and cell
    assert "<script" not in text


@pytest.mark.parametrize("suffix, kind", [(".png", "image/png"), (".svg", "image/svg+xml")])
def test_images_are_embedded_whole(suffix, kind, tmp_path):
    image = tmp_path / f"figure{suffix}"
    plot_load_curve(np.array([[1.0, 2, 3]]), image)
    section = Section("Loads", image=image, alt='"quoted"')
    text, page = written(tmp_path / "page.html", "Title", section)
    found = dict(page.attributes)
    head, data = found["src"].split(",")
    assert head == f"data:{kind};base64"
    assert base64.b64decode(data) == image.read_bytes()
    assert found["alt"] == '"quoted"'
    assert "http:" not in text and "https:" not in text and "<link" not in text


def test_prose_becomes_paragraphs_and_numbers_align_right(tmp_path):
    section = Section(
        "Blocks",
        prose="First.\n\nSecond,\nsame paragraph.\n\n",
        columns=("block", "ms", "share"),
        rows=(("attention", "71.9", "−5.7 %"), ("experts", "1,029.1 ms", "+3.0%")),
    )
    _, page = written(tmp_path / "page.html", "Title", section)
    assert page.tags.count("p") == 2
    assert page.attributes.count(("class", "n")) == 2 * 3  # two columns, head and two rows
    assert page.tags.count("tr") == 3


def test_what_is_empty_is_left_out(tmp_path):
    _, page = written(tmp_path / "page.html", "Title", Section("Only a heading"))
    assert not {"p", "table", "img"} & set(page.tags)


def test_a_page_is_made_for_the_dark_and_for_phones(tmp_path):
    text, page = written(tmp_path / "page.html")
    assert "prefers-color-scheme: dark" in text
    assert ("name", "viewport") in page.attributes


@pytest.mark.parametrize(
    "file, message",
    [
        ("page.txt", r"written as \.html, got \.txt"),
        ("page", r"written as \.html, got no suffix"),
        ("missing/page.html", "missing does not exist"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused(file, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_page(tmp_path / file, "Title", [])


def test_an_image_that_is_missing_is_refused_and_nothing_is_written(tmp_path):
    section = Section("Loads", image=tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"none\.png: the image cannot be read"):
        write_page(tmp_path / "page.html", "Title", [section])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"columns": ("a", "b"), "rows": (("1",),)}, "expected rows of 2 cells, got 1"),
        ({"rows": (("1", "2"), ("3",))}, "expected rows of 2 cells, got 1"),
        ({"image": "figure.pdf"}, r"expected a \.png or \.svg image, got figure\.pdf"),
    ],
)
def test_a_section_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Section("Heading", **arguments)
