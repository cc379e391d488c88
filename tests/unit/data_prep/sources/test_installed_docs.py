"""Docstrings of the installed packages."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from data_prep.sources.formats import FORMATS
from data_prep.sources.installed_docs import docstrings, installed_doc_files
from data_prep.sources.records import Reading, ReadOptions


def test_docstrings_are_read_in_order_without_importing() -> None:
    long = "word " * 60
    source = f'''
"""Module {long}"""
raise SystemExit("imported!")
class A:
    """Class {long}"""
    if True:
        async def f(self):
            """Method {long}"""
    x = """Not a docstring {long}"""
def g():
    "short"
    def inner():
        \'\'\'Inner {long}\'\'\'
'''
    found = docstrings(source.encode())
    assert [text.split()[0] for text in found] == ["Module", "Class", "Method", "Inner"]


def test_unparsable_files_have_no_docstrings() -> None:
    assert docstrings(b'"""' + b"x" * 300 + b'"""\nprint "python 2"') == []
    assert docstrings(b"\x00" * 50 + b'"""' + b"x" * 300 + b'"""') == []
    assert docstrings(b'def f():\n  """\\ud800 ' + b"x" * 300 + b'"""') == []


def test_installed_docs_are_sorted_and_hold_the_topics() -> None:
    files = installed_doc_files()
    assert files == installed_doc_files()
    topics = [file for file in files if file.path.endswith("pydoc_data/topics.py")]
    assert len(topics) == 1
    read_format = FORMATS["installed-docs"].read
    assert len(list(read_format(topics[0], ReadOptions(), Reading()))) > 50
    webdataset = [file for file in files if "/webdataset/" in file.path]
    texts = [r.payload for file in webdataset for r in read_format(file, ReadOptions(), Reading())]
    assert len(texts) > 20
    assert all(len(text) >= 200 for text in texts)


def test_installed_docs_pass_over_links_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Emacs leaves them beside a file that is being edited."""
    (tmp_path / "good.py").touch()
    (tmp_path / ".#good.py").symlink_to("user@host.123")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert [file.path for file in installed_doc_files()] == [str(tmp_path / "good.py")]
