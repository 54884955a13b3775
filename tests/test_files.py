"""A file is replaced whole or not at all."""

import signal
import subprocess
import sys

import pytest

from cmjax.files import replace_text, replaced


def test_a_new_text_replaces_the_old_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "a.json"
    for text in ("old", "new µs"):
        replace_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_text(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "half" * 10_000 + "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    replace_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        replace_text(tmp_path / "none" / "a", "x")


WRITER = """
import sys
from cmjax.files import replaced
with replaced(sys.argv[1]) as file:
    file.write(b"half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    path = tmp_path / "a"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout.readline() == b"writing\n"
    killed, living = writers
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(list(tmp_path.iterdir())) == 2
    with replaced(path) as file:
        assert len(list(tmp_path.iterdir())) == 2  # the living writer's, and this one
        file.write(b"new")
    assert path.read_bytes() == b"new"
    living.communicate()
    assert living.returncode == 0 and path.read_bytes() == b"half"
    assert list(tmp_path.iterdir()) == [path]
