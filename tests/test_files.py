"""Atomic writes of files."""

import json
import stat

import pytest

from jaxmeta.files import replacing, write_json, write_new_json, write_text


def test_a_write_replaces_the_file(tmp_path):
    path = tmp_path / "file.json"
    for content in ({"a": [1, "é"]}, {"a": []}):
        write_json(path, content)
        assert json.loads(path.read_text(encoding="utf-8")) == content
    write_text(path, "text")
    assert path.read_text(encoding="utf-8") == "text"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]
    other = tmp_path / "other"
    other.write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.npz"
    path.write_bytes(b"old")

    def fail():
        with replacing(path) as unfinished:
            assert (unfinished.parent, unfinished.suffix) == (tmp_path, ".npz")
            unfinished.write_bytes(b"new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_interfere(tmp_path):
    path = tmp_path / "file.txt"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("1")
        second.write_text("2")
    assert path.read_text() == "1"
    assert list(tmp_path.iterdir()) == [path]


def test_only_the_first_writer_creates_a_new_file(tmp_path):
    path = tmp_path / "config.json"
    write_new_json(path, {"first": 1})
    with pytest.raises(FileExistsError):
        write_new_json(path, {"second": 2})
    assert json.loads(path.read_text()) == {"first": 1}
    assert list(tmp_path.iterdir()) == [path]
