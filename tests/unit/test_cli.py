"""How errors reach the user, and what the small commands refuse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from launch import quickstart, report
from launch.cli import run_main
from train.errors import LostRankError


def raising(error: BaseException) -> int:
    def main(arguments: Sequence[str]) -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_main(main)
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("no such key"), 2),
        (FileNotFoundError("no such file"), 2),
        (OSError(28, "No space left on device"), 1),
        (LostRankError("rank 1 is lost"), 1),
    ],
)
def test_one_plain_message_and_the_code(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HALFLING_TRACEBACK", raising=False)
    assert raising(error) == code
    printed = capsys.readouterr()
    assert printed.err == f"error: {error}\n"
    assert printed.out == ""


def test_an_interrupt_is_one_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_report_refuses_what_is_no_run_and_names_that_clash(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent / "run").mkdir(parents=True)
        (tmp_path / parent / "run" / "metrics.jsonl").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is not a run folder: it holds no metrics\.jsonl"):
        report.main([str(tmp_path / "empty"), "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="two runs are named 'run'"):
        report.main([str(tmp_path / "a/run"), str(tmp_path / "b/run"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_quickstart_refuses_too_little_text(tmp_path: Path, tokenizer_folder: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer").symlink_to(tokenizer_folder)
    (tmp_path / "few.txt").write_text("\n\n".join(["the small model reads a large shard fast"] * 3))
    with pytest.raises(ValueError, match=r"the source has too little text: \d+ tokens were held out"):
        quickstart.make_shards(tmp_path / "few.txt", out)
    assert not (out / "shards").exists(), "shards left behind would be taken for finished ones"
