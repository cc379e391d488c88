"""One forward and backward pass, one evaluation, or one LAMB step, of models of the published sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from data_prep.shard_format.tokenizer_info import TokenizerInfo
from tests.fake_cuda.gpu import WORLD
from tests.fake_cuda.host_waits import FakeGpu, HostWaits
from train.config_sections.objective import ObjectiveConfig
from train.data.masking import Masker
from train.evaluation.scores import heldout_statistics
from train.lamb import Lamb
from train.loop.loss_accumulator import LossSums
from train.loop.trainer import DistillationModule
from train.models.families import family_of_type
from train.models.students import make_student
from train.models.teacher import Teacher
from train.objective import fused_loss
from train.objective.build import build_objective
from train.objective.chunk_terms import chunk_terms
from train.objective.untrained import freeze_untrained

BATCH, LENGTH, VOCABULARY, LAYERS = 8, 512, 30_522, 6
ACCUMULATION, LOSS_SCALE = 16, 2.0**16
TOKENIZER = TokenizerInfo("0" * 64, VOCABULARY, 0, 100, 101, 102, 103, (0, 100, 101, 102, 103))
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def run(case: dict[str, Any], waits: HostWaits) -> dict[str, Any]:
    """Returns what is wrong, {"waits": [[function, kind], ...], "wrong": [...]}; both are to be empty."""
    of: dict[str, Callable[..., list[str]]] = {
        "pass": forward_and_backward,
        "evaluation": evaluation,
        "lamb": lamb_step,
    }
    # Torch operations, as without Triton; first_steps.py has the kernel.
    with FakeGpu(waits), patch.object(fused_loss, "fastest_terms", lambda device, dtype: chunk_terms):
        wrong = of[case.pop("what")](waits=waits, **case)
    return {"waits": [(wait.stack[0], wait.kind) for wait in waits.taken()], "wrong": wrong}


def forward_and_backward(
    waits: HostWaits,
    family: str,
    teacher: str,
    student: str,
    objective: dict[str, Any] | None = None,
    masking: str = "plain",
    members: int = 1,
) -> list[str]:
    """As the step loop makes them: masking, teacher, student with its losses, backward under a loss scale.

    Args:
        family: a `model_type`; its config's defaults are a base model's width.
        teacher, student: their number formats.
        members: teachers of the ensemble.
    """
    settings = ObjectiveConfig(**(objective or {}))
    frozen, learner = models(family, teacher, student, settings, members)
    loss = build_objective(settings, learner, frozen)
    if not settings.needs_masks:
        freeze_untrained(loss, learner, frozen, WORLD.device)
    module = DistillationModule(learner, loss).to(WORLD.device, DTYPES[student])
    masker, (input_ids, window_ids) = make_masker(masking), batch()
    masker._on(input_ids.device)  # its tables are copied in the first step
    losses = LossSums(ACCUMULATION)
    waits.taken()
    masked = masker(input_ids, window_ids, 0)
    taught = frozen(masked.input_ids)
    terms = module(masked, taught, masked.valid.sum() / 1)
    (terms["loss"] / ACCUMULATION * LOSS_SCALE).backward()
    losses.add(0, terms)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return [
        *(f"{name} has no gradient" for name, p in trained.items() if p.grad is None),
        *(
            f"the gradient of {name} is {p.grad.dtype} on {p.grad.device}"
            for name, p in trained.items()
            if p.grad is not None and (p.grad.dtype, p.grad.device) != (p.dtype, p.device)
        ),
        *(f"{name} is {term.dtype}" for name, term in terms.items() if term.dtype != torch.float32),
    ]


def evaluation(waits: HostWaits, family: str, teacher: str, student: str, members: int = 1) -> list[str]:
    """The sums over one held-out batch."""
    frozen, learner = models(family, teacher, student, ObjectiveConfig(), members)
    masker, (input_ids, window_ids) = make_masker("plain"), batch()
    masker._on(input_ids.device)
    waits.taken()
    masked = masker(input_ids, window_ids, -1)
    sums = heldout_statistics(learner.eval(), masked, frozen(masked.input_ids))
    return [] if sums.dtype == torch.float64 else [f"the sums are {sums.dtype}"]


def lamb_step(waits: HostWaits) -> list[str]:
    """One step of fp32 weights outside of an engine, by the operations that need no Triton, with all that it can do."""
    _, learner = models("bert", "fp16", "fp32", ObjectiveConfig(), 1)
    optimizer = Lamb(learner.named_parameters(), lr=0.001, fused=False, prenormalize=True, clamp=(0.1, 10.0))
    for parameter in learner.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the state
    waits.taken()
    optimizer.step()
    ratios = optimizer.trust_ratios
    return (
        [] if (ratios.dtype, ratios.device) == (torch.float32, torch.device(WORLD.device)) else [str(ratios)]
    )


def models(
    family: str, teacher: str, student: str, settings: ObjectiveConfig, members: int
) -> tuple[Teacher, PreTrainedModel]:
    """On the GPU, without ever having been anywhere else."""
    special = {"cls_token_id": 101, "bos_token_id": 101, "sep_token_id": 102, "eos_token_id": 102}
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS, "max_position_embeddings": 514}
    config = AutoConfig.for_model(family, pad_token_id=0, **sizes, **special)
    attention = family_of_type(family).attention
    with torch.device("meta"):
        originals = [
            AutoModelForMaskedLM.from_config(config, attn_implementation=attention) for _ in range(members)
        ]
        learner = make_student(originals[0], layer_map="random")
    layers = [family_of_type(family).num_layers(each) for each in originals]
    frozen = Teacher(
        [each.to_empty(device=WORLD.device).to(DTYPES[teacher]) for each in originals],
        output_hidden_states=settings.needs_layers,
        relation_layers=layers if settings.relation_weight > 0 else None,
    )
    return frozen, learner.to_empty(device=WORLD.device).to(DTYPES[student])  # type: ignore[arg-type]


def make_masker(kind: str) -> Masker:
    tables = {"whole_word": np.arange(VOCABULARY) > 20_000, "histogram": np.ones(VOCABULARY, dtype=np.int64)}
    return Masker(TOKENIZER, LENGTH, seed=1, **({} if kind == "plain" else tables))  # type: ignore[arg-type]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """(BATCH, LENGTH) int32 tokens and (BATCH,) int64 window ids on the GPU, by way of page-locked memory."""
    host = torch.zeros(BATCH, LENGTH, dtype=torch.int32), torch.zeros(BATCH, dtype=torch.int64)
    input_ids, window_ids = (each.pin_memory().to(WORLD.device, non_blocking=True) for each in host)
    return input_ids, window_ids
