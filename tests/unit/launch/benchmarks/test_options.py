"""launch/benchmark.py refuses bad options before it measures anything."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import torch

from launch import benchmark
from launch.benchmarks.options import new_file

NO_FOLDER = "--json: '/none/figures.json': there is no folder /none; make it first"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("lamb --rounds 0", "--rounds: '0': give a whole number, at least 1"),
        ("lamb --threads 0", "--threads: '0': give a whole number, at least 1"),
        ("lamb --json /none/figures.json", NO_FOLDER),
        ("lamb --json {tmp}", "cannot be written to; give another file"),
        ("lamb --device tpu", "--device: 'tpu': give cpu or cuda"),
        ("inference --rounds -1", "--rounds: '-1': give a whole number, at least 1"),
        ("inference --json /none/figures.json", NO_FOLDER),
        ("loader --rounds x", "--rounds: 'x': give a whole number, at least 1"),
        ("loader --seconds nan", "--seconds: 'nan': give seconds, more than 0"),
        ("loader --json /none/figures.json", NO_FOLDER),
        ("objective --rounds 0", "--rounds: '0': give a whole number, at least 1"),
        ("objective --shapes 8x128,foo", "--shapes: 'foo': give BATCHxLENGTH, such as 8x128"),
        (
            "objective --formulations plain,fast",
            "--formulations: 'fast': give some of plain original, plain, fused all",
        ),
        ("objective --shapes 8x0", "--shapes: '0': give a whole number, at least 1"),
        (
            "objective --shapes 8x2",
            "--shapes: '8x2': give a length of at least 3, since [CLS] and [SEP] take two",
        ),
        ("objective --json /none/figures.json", NO_FOLDER),
        ("data --corpus /none.jsonl --tokenizer t", "--corpus: '/none.jsonl': no such file"),
        ("data --corpus {tmp}/c --tokenizer t --json /none/figures.json", NO_FOLDER),
    ],
)
def test_bad_options(words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c").touch()
    arguments = words.replace("{tmp}", str(tmp_path)).split()
    with pytest.raises(SystemExit) as ended:
        benchmark.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_tokenizer_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c").touch()
    words = ["data", "--corpus", str(tmp_path / "c"), "--tokenizer", str(tmp_path)]
    with pytest.raises(ValueError, match="no tokenizer that loads in this folder"):
        benchmark.main(words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["lamb", "inference"])
def test_a_gpu_that_is_not_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [name, "--device", "cuda"]
    with pytest.raises(SystemExit) as ended:
        benchmark.main(words)
    assert ended.value.code == 2
    assert "--device: torch sees no GPU here; give cpu" in capsys.readouterr().err


def test_figures_follow_a_link_and_take_a_plain_file_alone(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    assert new_file(str(tmp_path / "link.json")) == tmp_path / "target.json"
    os.mkfifo(tmp_path / "fifo")
    for refused in ("fifo", "."):
        with pytest.raises(argparse.ArgumentTypeError, match="cannot be written to; give another file"):
            new_file(str(tmp_path / refused))
    with pytest.raises(argparse.ArgumentTypeError, match="/dev/null' cannot be written to"):
        new_file("/dev/null")
