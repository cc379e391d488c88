"""The FLOP count, by hand and against torch's own counter."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMaskedLM

from train.models.flops import ModelShape, forward_flops_per_token, measured_matrix_rate, shape_of


def test_one_layer_by_hand() -> None:
    shape = ModelShape(layers=1, width=4, feed_forward=16, vocabulary=10)
    encoder = 8 * 16 + 4 * 4 * 16 + 4 * 5 * 4
    assert forward_flops_per_token(shape, sequence_length=5, decoded_share=0.0) == encoder
    assert forward_flops_per_token(shape, 5, 0.5) == encoder + 0.5 * (2 * 16 + 2 * 4 * 10)


def test_equals_torchs_count(teacher_folder: str) -> None:
    model = AutoModelForMaskedLM.from_pretrained(teacher_folder, attn_implementation="eager").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 60, (3, 16)))
    ours = 3 * 16 * forward_flops_per_token(shape_of(model), sequence_length=16, decoded_share=1.0)
    assert counter.get_total_flops() == ours


def test_matrix_rate_is_plausible() -> None:
    assert 1e8 < measured_matrix_rate("cpu", torch.float32, size=128) < 1e14


def test_shape_of_distilbert(teacher_folder: str) -> None:
    from train.models.students import make_student

    teacher = AutoModelForMaskedLM.from_pretrained(teacher_folder)
    teacher_shape, student_shape = shape_of(teacher), shape_of(make_student(teacher))
    assert student_shape == ModelShape(2, 32, 64, teacher_shape.vocabulary)
