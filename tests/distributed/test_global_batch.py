"""True steps of 4,096 sequences: two ranks with 32 accumulation steps each equal one process with one pass."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from tests.conftest import WORDS
from tests.distributed.pretraining import train
from tests.paths import ROOT
from train.loop.metrics import read_rows

STEPS = 3


@pytest.fixture(scope="module")
def settings(tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Shards of 12,288 windows and more, and a teacher without dropout, whose random numbers would depend on how the
    batch is cut."""
    folder = tmp_path_factory.mktemp("batch")
    rng = random.Random(1)
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(20, 120))) for _ in range(1500)]
    (folder / "documents.txt").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "data_prep/write_shards.py", str(folder / "documents.txt")]
    command += ["--txt-documents", "line", "--tokenizer", tokenizer_folder, "--out", str(folder / "shards")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    # Soft targets not too near the student's: a divergence of next to 0 is made of what is rounded away.
    config = BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=16, initializer_range=0.06, **sizes, **dropout
    )
    BertForMaskedLM(config).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    return [
        f"--data.shards={folder / 'shards'}",
        f"--model.teacher={folder / 'teacher'}",
        "--model.layer_map=every_other",
        "--data.sequence_length=8",
        # Six of eight positions: windows with a separator have fewer that can be asked for.
        "--masking.probability=0.75",
        "--training.global_batch_size=4096",
        f"--training.max_steps={STEPS}",
        "--schedule.warmup_steps=1",
        "--optimizer.lr=0.01",
        "--run.log_every_steps=1",
    ]


def test_two_ranks_equal_one_process_doing_the_whole_batch(settings: list[str], tmp_path: Path) -> None:
    for name, ranks, micro in (("two", 2, 64), ("one", 1, 4096)):
        # 4,096 sequences in one pass: sums in one part would lose digits that the bounds below ask for.
        words = [*settings, f"--training.micro_batch_size={micro}"]
        train(words, tmp_path / name, ranks=ranks, threads=2 // ranks)
    one, two = ([row for row in read_rows(tmp_path / name) if "loss" in row] for name in ("one", "two"))
    assert [row["tokens"] for row in two] == [step * 4096 * 8 for step in range(1, STEPS + 1)]
    for key in ("loss", "loss_kd", "loss_mlm", "loss_cos", "grad_norm", "trust_ratio_median"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-5), key
    whole, shared = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for name, expected in whole.items():
        torch.testing.assert_close(shared[name], expected, rtol=0, atol=1e-6, msg=name)
