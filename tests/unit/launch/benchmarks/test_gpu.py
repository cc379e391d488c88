"""launch/benchmark.py gpu, as far as it goes without a GPU."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig

from launch import benchmark
from launch.benchmarks import gpu
from launch.benchmarks.run_inputs import make_inputs
from launch.common.cli import parse_config
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
    text = gpu.as_text({"gpu": "H200", "tests": {"result": "17 passed"}, "runs": runs, "lamb": lamb})
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


@pytest.mark.parametrize("failing", ["", "tests/gpu", "relation-512", "lamb"])
def test_what_fails_is_said_and_the_rest_kept(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From any folder: the stages run in the project's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "hardware", lambda device: "H200")
    monkeypatch.setattr(gpu, "make_inputs", lambda folder: (folder / "teacher", folder / "shards"))
    monkeypatch.setattr(gpu, "planned_gib", lambda settings, micro: 1.0)
    monkeypatch.setattr(gpu, "recorded_config", lambda run_dir: {"training": {"micro_batch_size": 8}})
    monkeypatch.setattr(gpu, "read_rows", lambda run_dir: [{"tokens_per_s": 9.0}])

    def run(
        command: Sequence[str], cwd: Path, stdout: Any, **others: Any
    ) -> subprocess.CompletedProcess[str]:
        words = " ".join(command)
        for word in command:
            key, _, value = word.rpartition("=")
            if key in ("--run.dir", "--model.teacher", "--data.shards"):
                assert Path(value).is_absolute()
            if key == "--run.dir":
                (Path(value) / "profile").mkdir(parents=True)
                (Path(value) / "profile" / "trace-rank-0.json").write_text('{"traceEvents": []}')
        if "--json" in command:
            (cwd / command[-1]).write_text('{"rows": []}')
        fails = bool(failing) and any(
            word in (failing, f"--run.dir={tmp_path}/out/{failing}") for word in command
        )
        if fails:
            if failing == "tests/gpu":  # and nothing in its log
                raise subprocess.TimeoutExpired(words, 1)
            stdout.write("out of memory\n")
        stdout.flush()
        return subprocess.CompletedProcess(words, int(fails))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(gpu, "provenance", dict)
    monkeypatch.chdir(tmp_path)
    assert benchmark.main(["gpu", "--out", "out"]) == (1 if failing else 0)
    figures = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert figures["runs"]["triple 128"]["tokens_per_s"] == 9.0
    said, errors = capsys.readouterr()
    assert "open an issue of this project with it attached" in said
    if failing:
        name = {"relation-512": "relation 512", "lamb": "LAMB"}.get(failing, failing)
        assert f"FAILED: {name}; see" in errors
        assert (
            f"{name}: {'not done after' if failing == 'tests/gpu' else 'exit code 1: out of memory'}" in said
        )


def test_an_installed_package_has_no_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu._tests(tmp_path)["result"].startswith("not run: they are in a checkout")
