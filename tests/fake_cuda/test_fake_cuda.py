"""Training on GPUs, as far as it shows without one: devices, dtypes, shapes, and what the host waits for.

Numbers, streams, NCCL, flash kernels and Triton's code are not shown here; docs/BENCHMARKS.md says what is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.fake_cuda.library import build
from tests.paths import ROOT

RELATION_ALONE = {"kd_weight": 0, "mlm_weight": 0, "cosine_weight": 0, "relation_weight": 1}
ON_BERT = {"what": "pass", "family": "bert", "teacher": "fp16", "student": "fp16"}
PASSES: dict[str, dict[str, Any]] = {
    "BERT": ON_BERT,
    "RoBERTa": {**ON_BERT, "family": "roberta"},
    "ModernBERT": {**ON_BERT, "family": "modernbert", "student": "bf16"},
    "student in bf16": {**ON_BERT, "student": "bf16"},
    "teacher in bf16": {**ON_BERT, "teacher": "bf16"},
    "all in fp32": {**ON_BERT, "teacher": "fp32", "student": "fp32"},
    "soft targets at masked positions": {**ON_BERT, "objective": {"kd_positions": "masked"}},
    "relations": {**ON_BERT, "objective": RELATION_ALONE},
    "relations of ModernBERT, in bf16": {
        **ON_BERT,
        "family": "modernbert",
        "student": "bf16",
        "objective": RELATION_ALONE,
    },
    "squared logits": {**ON_BERT, "objective": {"mse_weight": 1}},
    "layers, projected": {
        **ON_BERT,
        "objective": {"layer_cosine_weight": 1, "layer_pairs": [(1, 2), (3, 6)], "projection": True},
    },
    "masked language modelling alone": {**ON_BERT, "objective": {"kd_weight": 0, "cosine_weight": 0}},
    "ensemble": {**ON_BERT, "members": 2},
    "whole words, smoothed": {**ON_BERT, "masking": "whole words, smoothed"},
    "evaluation": {"what": "evaluation", "family": "bert", "teacher": "fp16", "student": "fp16"},
    "evaluation of an ensemble": {
        "what": "evaluation",
        "family": "modernbert",
        "teacher": "fp16",
        "student": "bf16",
        "members": 2,
    },
    "LAMB in torch operations": {"what": "lamb"},
}

BF16 = "--deepspeed.config=ds_configs/bf16.json"
RUNS = {
    "fp16": [],
    "bf16, relations": [BF16, *(f"--objective.{name}={value}" for name, value in RELATION_ALONE.items())],
    "masked, AdamW": [
        "--objective.kd_positions=masked",
        "--optimizer.name=adamw",
        "--optimizer.lr=0.001",
        "--training.micro_batch_size=auto",
    ],
}
STEPS = 3
WAITS_OF_LAMB = {
    # the event of the step before, which has passed by the time that DeepSpeed has read the norm
    ("train/lamb/rank_errors.py:raise_deferred", "event.synchronize"): 1
}
FIRST = {
    ("train/data/masking.py:<dictcomp>", "copy to the GPU"),
    ("train/lamb/triton_kernels.py:_describe", "copy to the GPU"),
}
"""Tables that are copied once."""


def waits_of_deepspeed(accumulation: int, groups: int) -> dict[tuple[str, str], int]:
    """In each step, whatever this project does."""
    return {
        # With overlap_comm at the end of each backward pass, for the stream on which gradients are reduced.
        ("deepspeed/cuda_accelerator.py:synchronize", "synchronize"): accumulation,
        ("deepspeed/stage_1_and_2.py:has_overflow", "item"): 1,
        ("deepspeed/utils.py:is_invalid_grad_norm", "item"): 1 + groups,
        # Its -1 for a norm that is no number, copied from the host.
        ("deepspeed/utils.py:mask_nan_or_inf_with_val_inplace", "copy to the GPU"): groups,
    }


@pytest.fixture(scope="module")
def results(
    shards_folder: str, teacher_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What each case gave, by its name, of the first steps of runs and of passes: from one process."""
    folder = tmp_path_factory.mktemp("fake_cuda")
    common = [
        f"--data.shards={shards_folder}",
        f"--model.teacher={teacher_folder}",
        "--model.layer_map=every_other",
        "--data.sequence_length=32",
        "--training.global_batch_size=64",
        "--training.micro_batch_size=8",
        f"--training.max_steps={STEPS}",
        f"--run.log_every_steps={STEPS}",
        f"--evaluation.every_steps={STEPS}",
        "--evaluation.max_windows=8",
    ]
    cases = {"first_steps": {name: [*common, *own] for name, own in RUNS.items()}, "passes": PASSES}
    given, found = folder / "cases.json", folder / "results.json"
    given.write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, "-m", "tests.fake_cuda", build(folder), given, found],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads(found.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_has_its_devices_and_dtypes_and_waits_for_nothing(results: dict[str, Any], name: str) -> None:
    found = results["passes"][name]
    assert found == {"waits": [], "wrong": []}, found.get("error")


@pytest.mark.parametrize("name", RUNS)
def test_the_first_steps_of_a_run(results: dict[str, Any], name: str) -> None:
    """The engine's waits are known, and the project adds none outside of logging and evaluation."""
    found = results["first_steps"][name]
    assert "error" not in found, found["error"]
    fp16, lamb = BF16 not in RUNS[name], "--optimizer.name=adamw" not in RUNS[name]
    assert found["devices"] == ["cuda:1"]
    student = "torch.float16" if fp16 else "torch.bfloat16"
    assert found["dtypes"] == {
        "student": [student],
        "teacher": ["torch.float16"],
        "master": ["torch.float32"],
    }
    assert found["skipped_steps"] == 0
    # What the trials held is no longer in the way of NCCL's, and their peak is not the run's.
    is_auto = "--training.micro_batch_size=auto" in RUNS[name]
    assert found["search"] == (["empty_cache", "reset_peak_memory_stats"] if is_auto else [])
    relations_alone = "--objective.kd_weight=0" in RUNS[name]
    kernels = [] if relations_alone else ["_rows_kernel"] * found["accumulation"]  # in one chunk each
    kernels += ["_first_kernel", "_sum_kernel", "_second_kernel"] if lamb else []
    assert found["launches"] == kernels * STEPS
    of_deepspeed = waits_of_deepspeed(found["accumulation"], found["groups"])
    first, *later = ({(where, kind): count for where, kind, count in step} for step in found["updates"])
    assert {what: count for what, count in first.items() if what not in FIRST} == of_deepspeed
    for step in later:
        assert step == of_deepspeed | (WAITS_OF_LAMB if lamb else {})
