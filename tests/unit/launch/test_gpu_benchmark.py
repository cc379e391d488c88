"""launch/benchmark.py gpu, as far as it goes without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from launch import benchmark
from launch.benchmarks import gpu
from launch.benchmarks.gpu_inputs import make_inputs
from launch.cli import parse_config
from train.build import load_manifest
from train.models.build import open_teachers


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refused_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"torch sees no GPU here .*doctor.py"):
        benchmark.main(["gpu", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_every_run_is_a_recipe_for_what_it_makes(tmp_path: Path) -> None:
    small = BertConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=12, num_attention_heads=4, intermediate_size=64
    )
    teacher, shards = make_inputs(tmp_path / "inputs", small, tokens=4_000)
    runs = gpu.runs(teacher, shards)
    assert len(runs) == 7
    for settings in runs.values():
        config = parse_config(settings, "")
        assert config.training.global_batch_size * config.data.sequence_length == gpu.TOKENS_PER_STEP
        open_teachers(config, load_manifest(config.data.shards).tokenizer)
        assert gpu.planned_gib(settings, 8) < gpu.planned_gib(settings, 16) < 1


def test_waits_are_counted_for_each_step() -> None:
    """The last synchronisation of the device ends the trace."""
    events = ["cudaStreamSynchronize"] * 6 + ["cudaDeviceSynchronize"] * 4 + ["cudaLaunchKernel"] * 9
    found = gpu.waits_per_step({"traceEvents": [*({"name": name} for name in events), {"ph": "M"}]}, 3)
    assert found == {"cudaStreamSynchronize": 2, "cudaDeviceSynchronize": 1}


def test_a_run_that_fails_leaves_the_table_of_the_others() -> None:
    run = {"micro_batch_size": 64, "tokens_per_s": 612_345.6, "mfu": 0.517, "memory_gib": 31.26, "waits": 5.0}
    lamb = {"rows": [{"name": "lamb", "ms": 1.234, "share_of_copy": 0.81}]}
    runs = {"triple 128": run, "relation 512": {"error": "exit code 1: out of memory"}}
    text = gpu.as_text({"gpu": "H200", "tests": "17 passed", "runs": runs, "lamb": lamb})
    for shown in (
        "612,346",
        "52%",
        "31.3",
        "relation 512: exit code 1: out of memory",
        "17 passed",
        "1.23",
        "81%",
    ):
        assert shown in text
