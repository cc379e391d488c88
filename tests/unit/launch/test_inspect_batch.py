"""launch/inspect_batch.py as its users call it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.shard_format.manifest import Manifest
from data_prep.shard_format.tokenizer_info import tokenizer_info
from launch import inspect_batch
from tests.tiny_shards import with_histogram, write_tiny_shards
from train.data.loader import BatchLoader
from train.data.masking import MaskedBatch, Masker

SMALL = ["--sequence-length", "16", "--global-batch-size", "32"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> str:
    """Tiny shards whose ids are those of the shared tokenizer, which lies beside them."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("inspected")
    manifest = write_tiny_shards(folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    info = tokenizer_info(tokenizer)
    assert (info.cls_id, info.sep_id, info.mask_id) == (2, 3, 4)  # as write_tiny_shards has it
    with_histogram(folder, replace(manifest, tokenizer=info), np.ones(info.vocab_size, dtype=np.int64))
    tokenizer.save_pretrained(folder / "tokenizer")
    return str(folder)


def digest_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert inspect_batch.main(arguments) == 0
    found = re.findall(r"^digest: ([0-9a-f]{64})$", capsys.readouterr().out, re.MULTILINE)
    assert len(found) == 1
    return found[0]


def test_the_digest_is_the_batchs_alone(shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--shards", shards, "--step", "100", *SMALL]
    expected = digest_of(capsys, *base)
    for same in (
        ["--world-size", "8"],
        ["--world-size", "2", "--micro-batch-size", "4"],
        ["--show", "0"],
        ["--training.micro_batch_size=8"],
    ):
        assert digest_of(capsys, *base, *same) == expected
    for other in (
        ["--seed", "1"],
        ["--masking.probability=0.3"],
        ["--masking.smoothing=0.2", "--masking.whole_word=true"],
        ["--step", "101"],
        ["--data.lanes=8"],
    ):
        assert digest_of(capsys, *base, *other) != expected


def test_the_digest_is_of_what_training_sees(shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Manifest.load(shards)
    loader = BatchLoader(
        shards, manifest, sequence_length=16, global_batch_size=32, micro_batch_size=8, seed=0, lanes=64
    )
    masker = Masker(manifest.tokenizer, 16, 0, histogram=np.ones(manifest.tokenizer.vocab_size))
    masked = [masker(b.input_ids, b.window_ids, b.epoch) for b in loader.batches(7, 8)]
    content = b"".join(
        torch.cat([getattr(m, name) for m in masked]).numpy().astype("<i4").tobytes()
        for name in ("input_ids", "positions", "targets")
    )
    assert digest_of(capsys, "--shards", shards, "--step", "7", *SMALL) == hashlib.sha256(content).hexdigest()


def test_it_shows_text_with_its_masks(shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_batch.main(["--shards", shards, "--step", "3", "--show", "5", "--world-size", "8", *SMALL])
    output = capsys.readouterr().out
    assert re.search(r"^step 3: epoch 0, step 3 of its \d+$", output, re.MULTILINE)
    assert re.search(r"32 sequences of 16 tokens, 2 masked in each: \d+\.\d% hidden", output)
    assert re.findall(r"^row (\d): rank (\d), micro step 0, window \d+$", output, re.MULTILINE) == [
        ("0", "0"), ("1", "0"), ("2", "0"), ("3", "0"), ("4", "1")
    ]  # fmt: skip
    texts = output.split("\n\n")[1:-1]
    assert all("[CLS]" in text and "[SEP]" in text for text in texts)
    assert all(len(re.findall(r"\[[a-z]+(?:->(?:MASK|[a-z]+))?\]", text)) == 2 for text in texts)


def test_a_micro_batch_of_one_is_told_from_none(shards: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("training:\n  micro_batch_size: 1\n")
    base = ["--shards", shards, "--step", "3", *SMALL]
    for given, micro_steps in (
        ([], {0}),
        (["--micro-batch-size", "1"], set(range(16))),
        (["--training.micro_batch_size=1"], set(range(16))),
        (["--config", str(recipe)], set(range(16))),
        (["--config", str(recipe), "--micro-batch-size", "8"], {0, 1}),
    ):
        options, config = inspect_batch.parse_arguments([*base, *given])
        batch = inspect_batch.rebuild(config, 3, 2, options.micro_batch_size)
        assert {row.micro_step for row in batch.rows} == micro_steps


def test_odd_pieces_are_shown_harmless(tokenizer_folder: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.convert_ids_to_tokens = {7: "##\x1b[2J", 8: "\x1b[2J", 9: None}.get
    assert inspect_batch._piece(tokenizer, 7) == (True, "\N{REPLACEMENT CHARACTER}[2J")
    assert inspect_batch._piece(tokenizer, 8) == (False, "\N{REPLACEMENT CHARACTER}[2J")
    assert inspect_batch._piece(tokenizer, 9) == (False, "9")


def test_the_three_kinds_of_masks_read_as_the_legend_says(tokenizer_folder: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = tokenizer.convert_tokens_to_ids
    shown = ids(["[CLS]", "[MASK]", "##a", "slow", "shard", "##b", "[SEP]"])
    targets = ids(["model", "fast", "##b"])
    masked = MaskedBatch(
        torch.tensor([shown]),
        torch.tensor([[1, 3, 5]]),
        torch.tensor([targets]),
        torch.tensor([[True, True, True]]),
    )
    assert inspect_batch.readable(masked, tokenizer, 4) == "[CLS] [model->MASK]a [fast->slow] shard[b] [SEP]"
    partly = replace(masked, valid=torch.tensor([[True, False, False]]))
    assert inspect_batch.readable(partly, tokenizer, 4) == "[CLS] [model->MASK]a slow shardb [SEP]"
    assert inspect_batch.readable(masked, None, 4).split()[1] == f"[{targets[0]}->MASK]"


def test_without_a_tokenizer_ids_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_shards(tmp_path)
    arguments = ["--shards", str(tmp_path), "--step", "0", "--model.teacher", str(tmp_path / "none"), *SMALL]
    assert inspect_batch.main(arguments) == 0
    assert re.search(r"^2 [\d ]*\[\d+->MASK\][^a-z]* 3$", capsys.readouterr().out, re.MULTILINE)


def test_bad_usage_is_told(shards: str) -> None:
    base = ["--shards", shards, "--step", "0", *SMALL]
    for extra, message in (
        (["--shards", "nowhere"], "data.shards='nowhere' holds no manifest.json"),
        (["--step", "-1"], "--step=-1: give at least 0"),
        (["--step", str(10**30)], f"step is {10**30}: steps count from 0, and end below 2**63"),
        (["--world-size", "0"], "--world-size=0: give at least 1"),
        (["--world-size", "3"], "micro_batch_size 1 and 32 lanes: use a world size of 1, 2, 4, 8, 16, 32"),
        (["--world-size", "8", "--micro-batch-size", "8"], "use a world size of 1, 2, 4"),
        (["--data.sequencelength=3"], "sequencelength"),
        (["--micro-batch-size", "5"], "training.micro_batch_size=5: must divide"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
            inspect_batch.main([*base, *extra])
