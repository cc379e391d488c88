"""Hugging Face folders: a teacher's config, tokenizer and weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.shard_format.tokenizer_info import TokenizerInfo, tokenizer_info
from tests.fuzzing.target import Target, anything
from tests.tiny_tasks import save_encoder
from tests.unit.finetuning.squad_tokenizers import wordpiece
from train.models.build import TeacherFolder
from train.models.loading import check_encoder
from train.models.students import make_student
from train.models.tokenizer_checks import check_vocabulary, load_tokenizer

TEACHER = "teacher"
NUMPY = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}


def _tokenizer() -> TokenizerInfo:
    return tokenizer_info(wordpiece())


def _make_teacher(folder: Path) -> None:
    save_encoder(folder / TEACHER)


def _read_teacher(folder: Path) -> dict[str, torch.Tensor]:
    """What a run does with it: config, vocabulary, weights, a student of it."""
    teacher = TeacherFolder(TEACHER)
    check_vocabulary(TEACHER, teacher.config, teacher.fingerprint, _tokenizer())
    make_student(teacher.model, 1, [0])
    with torch.no_grad():
        teacher.model(torch.arange(8).reshape(1, 8))
    return {name: value.clone() for name, value in teacher.model.state_dict().items()}


def _as_the_file_holds(weights: dict[str, torch.Tensor], expected: Any, folder: Path) -> str | None:
    """Bits of the numbers themselves are guarded by nothing in this format; all else must be what the file says."""
    data = (folder / TEACHER / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for name, entry in header.items():
        if name == "__metadata__" or name not in weights:
            continue
        if entry["dtype"] not in NUMPY:
            return f"{name} is of {entry['dtype']}, and was taken for numbers"
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        found = np.frombuffer(data[start:stop], NUMPY[entry["dtype"]]).reshape(entry["shape"])
        if not np.array_equal(found.astype("<f4"), weights[name].numpy(), equal_nan=True):
            return f"{name}: other weights than in the file"
    return None


def _read_vocabulary(folder: Path) -> str | None:
    """A run compares the teacher's tokenizer with the shards'; one that cannot be read compares equal to nothing."""
    teacher = TeacherFolder(TEACHER)
    check_vocabulary(TEACHER, teacher.config, teacher.fingerprint, _tokenizer())
    return teacher.fingerprint


def _read_for_a_task(folder: Path) -> Any:
    """What fine-tuning does first: its config and its tokenizer, on a text."""
    config = check_encoder(TEACHER)
    tokenizer = load_tokenizer(TEACHER, config)
    return tokenizer("the model reads a fast shard", "and learns")["input_ids"]


TARGETS = (
    Target("teacher-config", _make_teacher, _read_teacher, anything, damaged=(f"{TEACHER}/config.json",)),
    Target(
        "teacher-weights",
        _make_teacher,
        _read_teacher,
        _as_the_file_holds,
        damaged=(f"{TEACHER}/*.safetensors",),
    ),
    Target("teacher-tokenizer", _make_teacher, _read_vocabulary, damaged=(f"{TEACHER}/token*.json",)),
    Target("task-tokenizer", _make_teacher, _read_for_a_task, anything, damaged=(f"{TEACHER}/token*.json",)),
)
