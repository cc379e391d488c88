"""cluster.env: what users may write, and the messages otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.environment_file import load_environment_file, parse_environment
from train.errors import UserError


def test_comments_quotes_and_export_are_fine() -> None:
    text = "# don't\n\n  A=1\nexport B='x y=z'  # why\nC=\nD='~a#b$A'\nE = 2\nF=\"~\"\n"
    assert parse_environment(text) == {"A": "1", "B": "x y=z", "C": "", "D": "~a#b$A", "E": "2", "F": "~"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("A=1 B=2", "cluster.env, line 2: 'A=1 B=2' is not NAME=value; quote a value with blanks"),
        ('A=x"y z"', "line 2: 'A=x\"y z\"' is not NAME=value"),
        ("A='1", 'line 2: "A=\'1" is not NAME=value'),
        ("export A", "line 2: 'export A' is not NAME=value"),
        ("2A=1", "line 2: '2A=1' is not NAME=value"),
        ("RANK=0", "RANK is the launcher's to set"),
        (
            "export HF_HOME=$HOME/hf",
            "HF_HOME=$HOME/hf': nothing is expanded here; write the value out, or put",
        ),
        ('A="${B}"', "nothing is expanded here"),
        ("A=~/x", "nothing is expanded here"),
        ("MALLOC_ARENA_MAX=2", "MALLOC_ARENA_MAX has no effect here"),
        ("LD_LIBRARY_PATH=/x", "LD_LIBRARY_PATH has no effect here"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_environment(f"# first\n{line}\n")
    assert message in str(refused.value)


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "cluster.env").write_bytes("A=1\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"/cluster\.env is not UTF-8 \(byte 0xff at offset 0\); save it as"):
        load_environment_file({}, tmp_path)
    (tmp_path / "cluster.env").write_text("\ufeff")
    with pytest.raises(UserError, match=r"/cluster\.env begins with a byte order mark; save it without"):
        load_environment_file({}, tmp_path)
    (tmp_path / "cluster.env").unlink()
    (tmp_path / "cluster.env").mkdir()
    with pytest.raises(
        UserError, match=r"/cluster\.env is a folder; rename it: ranks read a file of NAME=value"
    ):
        load_environment_file({}, tmp_path)


def test_what_is_set_already_stays(tmp_path: Path) -> None:
    environment = {"A": "shell"}
    load_environment_file(environment, tmp_path)
    assert environment == {"A": "shell"}
    (tmp_path / "cluster.env").write_text("A=file\nB=file\n")
    load_environment_file(environment, tmp_path)
    assert environment == {"A": "shell", "B": "file"}
