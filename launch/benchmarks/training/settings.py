"""The runs that are measured, as settings of launch/pretrain.py, and what they read, made here."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from transformers import BertConfig

from launch.benchmarks.options import Shape
from launch.benchmarks.run_inputs import OBJECTIVES, make_inputs
from launch.common.cli import parse_config

MLM = "mlm"
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart-teacher.yaml"
SIZES = ("bert-base", "quickstart", "quickstart-teacher")
STEPS = 100_000
"""More than are ever made."""


def size(text: str) -> str:
    """bert-base, quickstart, quickstart-teacher or LAYERSxWIDTH."""
    if text not in SIZES and not re.fullmatch(r"[1-9]\d?x[1-9]\d{1,3}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give {', '.join(SIZES)}, or layers x width, such as 6x384"
        )
    if text not in SIZES and int(text.partition("x")[2]) % 32:
        raise argparse.ArgumentTypeError(f"{text!r}: give a width that 32 divides")
    return text


def teacher_config(name: str) -> BertConfig:
    """The model that is distilled; of quickstart-teacher the model that is trained."""
    if name == "bert-base":
        return BertConfig()
    if name in SIZES:
        scratch = parse_config([f"--config={RECIPE}"], "").model.scratch or {}
        sizes = {key: value for key, value in scratch.items() if key != "model_type"}
        return BertConfig(vocab_size=8000, **sizes)  # that of launch/quickstart.py
    layers, _, width = name.partition("x")
    return BertConfig(
        hidden_size=int(width),
        num_hidden_layers=int(layers),
        num_attention_heads=max(1, int(width) // 32),
        intermediate_size=4 * int(width),
    )


def objectives_of(model: str) -> tuple[str, ...]:
    return (MLM,) if model == "quickstart-teacher" else tuple(OBJECTIVES)


def settings(
    model: str, objective: str, shape: Shape, ranks: int, accumulation: int, folder: Path
) -> list[str]:
    """Of one run; a teacher of random weights and shards of random tokens are made in `folder` where they are not."""
    config, inputs = teacher_config(model), folder / "inputs"
    if not inputs.exists():
        make_inputs(inputs, config, tokens=2_000_000)
    sequences = shape.batch * ranks * accumulation
    common = [
        f"--data.shards={inputs / 'shards'}",
        f"--data.sequence_length={shape.length}",
        f"--data.lanes={ranks}",
        f"--training.global_batch_size={sequences}",
        f"--training.micro_batch_size={shape.batch}",
        f"--training.max_steps={STEPS}",
        "--run.log_every_steps=1",
        f"--run.dir={folder / 'run'}",
    ]
    if objective == MLM:
        return [f"--config={RECIPE}", *common]
    every_other = [] if model == "bert-base" else ["--model.layer_map=every_other"]
    return [*common, f"--model.teacher={inputs / 'teacher'}", *every_other, *OBJECTIVES[objective]]


def compiled(objective: str) -> list[str]:
    """Teacher, where there is one, and student through torch.compile."""
    return ["--model.student_compile=true", *([] if objective == MLM else ["--model.teacher_compile=true"])]
