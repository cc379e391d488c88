"""The steps that benchmark.py objective compares: models, formulations, and their matrix products."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from launch.benchmarks.floor import Product
from launch.benchmarks.options import Shape
from launch.benchmarks.products import products_of
from train.config_sections.objective import ObjectiveConfig
from train.data.masking import MaskedBatch
from train.models.attention_vectors import AttentionVectors
from train.models.cpu.attention import with_cpu_attention
from train.models.cpu.dropout import with_fast_dropout
from train.models.families import family_of
from train.models.flops import ModelShape, RelationLayers
from train.models.students import make_student
from train.models.teacher import Teacher
from train.objective.build import MAX_RELATION_HEADS, build_objective
from train.objective.reference import original_distiller_loss, reference_cosine, reference_terms

FORMULATIONS = ("plain original", "plain", "fused all", "fused masked", "plain relation", "fused relation")
RELATIONS = ObjectiveConfig(kd_weight=0, mlm_weight=0, cosine_weight=0, relation_weight=1)
PROBABILITY = 0.15
RECIPE = ObjectiveConfig()
WIDTH, VOCABULARY, INNER = 768, 30522, 3072
TEACHER_LAYERS, STUDENT_LAYERS, ATTENTION_HEADS = 12, 6, 12


@functools.cache
def models(ours: bool) -> tuple[PreTrainedModel, PreTrainedModel]:
    torch.manual_seed(0)
    teacher = BertForMaskedLM(BertConfig())
    student = make_student(teacher).train()
    if ours:
        with_fast_dropout(with_cpu_attention(student))
    return teacher.eval().requires_grad_(False), student


def example_batch(batch: int, length: int) -> MaskedBatch:
    generator = torch.Generator().manual_seed(1)
    count = round(PROBABILITY * length)
    order = torch.rand(batch, length - 2, generator=generator).argsort(-1)[:, :count]
    return MaskedBatch(
        input_ids=torch.randint(1000, VOCABULARY, (batch, length), generator=generator),
        positions=order.sort(-1).values + 1,
        targets=torch.randint(1000, VOCABULARY, (batch, count), generator=generator),
        valid=torch.ones(batch, count, dtype=torch.bool),
    )


def stepper(formulation: str) -> Callable[[MaskedBatch], float]:
    """A function that makes one forward and backward step and returns the loss."""
    teacher, student = models(formulation.startswith("fused"))
    if formulation.startswith("fused"):
        relations = formulation == "fused relation"
        frozen = Teacher(
            [teacher], relation_layers=[TEACHER_LAYERS] if relations else None, relations_alone=relations
        )
        positions: Any = formulation.removeprefix("fused ")
        settings = RELATIONS if relations else ObjectiveConfig(kd_positions=positions)
        objective = build_objective(settings, student, frozen)

        def fused_step(masked: MaskedBatch) -> float:
            student.zero_grad(set_to_none=True)
            loss = objective(student, masked, frozen(masked.input_ids))["loss"]
            loss.backward()
            return float(loss.detach())

        return fused_step

    if formulation == "plain relation":
        vectors = [
            AttentionVectors(family_of(model), model, layers)
            for model, layers in ((student, STUDENT_LAYERS), (teacher, TEACHER_LAYERS))
        ]

        def relation_step(masked: MaskedBatch) -> float:
            student.zero_grad(set_to_none=True)
            family_of(student).encode(student, masked.input_ids)
            with torch.no_grad():
                family_of(teacher).encode(teacher, masked.input_ids)
            loss = plain_relations(vectors[0].take(), vectors[1].take(), MAX_RELATION_HEADS)
            loss.backward()
            return float(loss.detach())

        return relation_step

    def plain_step(masked: MaskedBatch) -> float:
        student.zero_grad(set_to_none=True)
        of_student = student(masked.input_ids, output_hidden_states=True)
        with torch.no_grad():
            of_teacher = teacher(masked.input_ids, output_hidden_states=True)
        if formulation == "plain original":
            loss = original_loss(of_student, of_teacher, masked)
        else:
            terms = reference_terms(
                of_student.logits, [of_teacher.logits], [1.0], masked, temperature=RECIPE.temperature
            )
            loss = RECIPE.kd_weight * terms.kd + RECIPE.mlm_weight * terms.mlm
            loss = loss + RECIPE.cosine_weight * reference_cosine(
                of_student.hidden_states[-1], of_teacher.hidden_states[-1]
            )
        loss.backward()
        return float(loss.detach())

    return plain_step


def original_loss(of_student: Any, of_teacher: Any, masked: MaskedBatch) -> torch.Tensor:
    """The original code's triple loss, of two models' outputs with their logits and hidden states."""
    labels = torch.full_like(masked.input_ids, -100).scatter_(1, masked.positions, masked.targets)
    kept = torch.ones_like(masked.input_ids, dtype=torch.bool)
    hidden = of_student.hidden_states[-1], of_teacher.hidden_states[-1]
    return original_distiller_loss(of_student.logits, of_teacher.logits, *hidden, kept, labels, RECIPE)


def plain_relations(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], heads: int
) -> torch.Tensor:
    """The relations' divergence of (B, L, width) vectors, as one would write it: whole maps, autograd."""
    total = torch.zeros(())
    for own, theirs in zip(student, teacher, strict=True):
        log_student, log_teacher = (
            torch.log_softmax(parts @ parts.transpose(-1, -2) / parts.shape[-1] ** 0.5, -1)
            for parts in (vectors.unflatten(-1, (heads, -1)).transpose(1, 2) for vectors in (own, theirs))
        )
        rows = log_student.shape[:-1].numel()
        total = total + functional.kl_div(log_student, log_teacher, log_target=True, reduction="sum") / rows
    return total


def step_products(formulation: str, batch: int, length: int) -> list[Product]:
    """The matrix products of one step, attention's included."""
    sizes = [
        ModelShape(layers, WIDTH, INNER, VOCABULARY, WIDTH) for layers in (STUDENT_LAYERS, TEACHER_LAYERS)
    ]
    ends = RelationLayers(STUDENT_LAYERS, (TEACHER_LAYERS,), student_alone=True, teachers_alone=True)
    return products_of(
        sizes[0],
        sizes[1:],
        Shape(batch, length),
        attention_heads=ATTENTION_HEADS,
        decoded=round(PROBABILITY * length) if formulation == "fused masked" else length,
        relations=ends if formulation.endswith("relation") else None,
    )
