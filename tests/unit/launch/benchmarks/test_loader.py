"""launch/benchmark.py loader runs, and prints the figures that it writes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from data_prep.shard_format.manifest import Manifest
from launch.benchmarks import loader as benchmark
from tests.tiny_shards import SEP, TOKENIZER, write_tiny_shards
from train.data.shard_checks import check_shards
from train.data.shards import read_histogram


def test_it_measures_and_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_shards(tmp_path / "shards")
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    arguments = ["--shards", str(tmp_path / "shards"), "--json", str(tmp_path / "figures.json")]
    arguments += ["--sequence-length", "16", "--global-batch-size", "32", "--micro-batch-size", "2"]
    assert benchmark.main(parser.parse_args([*arguments, "--rounds", "1", "--seconds", "0.05"])) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    printed = capsys.readouterr().out
    for name, rate in figures["tokens_per_s"].items():
        assert f"{name:<42}{rate / 1e6:>18.2f}" in printed
    assert set(figures["first_batch"]) == {f"1 of {w} ranks, step {s}" for w in (1, 8) for s in (0, 10_000)}
    assert figures["readings_per_shard_and_epoch"] == 1


def test_the_stock_pipelines_do_the_same_packing(tmp_path: Path) -> None:
    manifest = write_tiny_shards(tmp_path, shards=2)
    urls = [str(tmp_path / shard.name) for shard in manifest.splits["train"]]
    per_document = benchmark._one_document_per_sample(str(tmp_path), manifest, tmp_path)
    total = sum(shard.tokens for shard in manifest.splits["train"])
    for tars, separator in ((urls, SEP), ([per_document], None)):
        batches = benchmark.stock(tars, TOKENIZER, 16, 8, separator)
        rows = torch.cat([next(batches) for _ in range(total // 14 // 8)])
        assert (rows.shape[1], rows.dtype) == (16, torch.int32)
        assert set(rows[:, 0].tolist()) == {TOKENIZER.cls_id}
        assert set(rows[:, -1].tolist()) == {SEP}
        assert len(set(map(tuple, rows.tolist()))) == len(rows)


def test_random_shards_are_whole_ones(tmp_path: Path) -> None:
    """What is read where no --shards are given."""
    folder = benchmark.random_shards(tmp_path / "shards", TOKENIZER, shards=2, tokens=50_000)
    manifest = Manifest.load(folder)
    check_shards(folder, manifest, verify="full")
    assert 90_000 < sum(shard.tokens for shard in manifest.splits["train"]) <= 100_000
    assert read_histogram(folder, manifest).shape == (manifest.tokenizer.vocab_size,)
