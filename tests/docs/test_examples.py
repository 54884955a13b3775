"""Everything that the README and the manual show runs as it is shown."""

import pytest
from markdown_examples import PAGES, ROOT, Block, blocks, commands, examples, run_page


def _name(page) -> str:
    return str(page.relative_to(ROOT))


FAST = [p for p in PAGES if any(not b.slow and b.needs is None for b in examples(p))]
SLOW = [p for p in PAGES if any(b.slow and b.needs is None for b in examples(p))]
NOT_RUN = [block for page in PAGES for block in examples(page) if block.needs is not None]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to run in, which has the manual's data as a checkout has."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", FAST, ids=_name)
def test_the_examples_of_a_page_run_as_shown(page, folder):
    run_page(page, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW, ids=_name)
def test_all_examples_of_a_page_run_as_shown(page, folder):
    run_page(page, slow=True)


@pytest.mark.parametrize("block", NOT_RUN, ids=str)
def test_an_example_that_needs_more_than_a_test_has(block):
    pytest.skip(f"needs {block.needs}")


def test_blocks_are_found_with_their_lines_and_notes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n\n<!-- slow -->\n<!-- own process -->\n```bash\ncmjax x\n```\n")
    assert blocks(page) == [Block(page, 6, "bash", "cmjax x\n", ("slow", "own process"))]


def test_a_note_holds_for_the_block_that_follows_it_only(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- slow -->\ntext\n```python\n1\n```\n<!-- needs: data -->\n```bash\n```\n")
    first, second = blocks(page)
    assert (first.notes, first.needs) == ((), None)
    assert second.needs == "data"


def test_commands_are_read_as_a_shell_reads_them():
    text = "# first\ncmjax place \\\n    'a b' --ranks 4   # last\n"
    assert commands(text) == [["cmjax", "place", "a b", "--ranks", "4"]]


def test_an_example_that_prints_other_than_it_shows_fails(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\nprint(x + 1)  # → 2\n```\n")
    monkeypatch.setattr("markdown_examples.ROOT", tmp_path)
    run_page(page, slow=False)
    page.write_text("```python\nx = 1\nprint(x + 1)  # → 3\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:2"):
        run_page(page, slow=False)


def test_a_command_that_fails_fails_the_page(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("```bash\ncmjax machines atlantis\n```\n")
    monkeypatch.setattr("markdown_examples.ROOT", tmp_path)
    with pytest.raises(AssertionError, match="returned 2"):
        run_page(page, slow=False)
