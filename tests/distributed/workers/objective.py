"""What each rank of tests/distributed/test_objective.py does."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from train.config_sections.objective import ObjectiveConfig
from train.data.masking import MaskedBatch
from train.distributed.world import import_deepspeed
from train.models.students import make_student
from train.models.teacher import Teacher, TeacherOutput
from train.objective.distillation import DistillationLoss

LR, STEPS, ACCUMULATION, MICRO, LENGTH, MASKED, VOCABULARY = 0.05, 3, 2, 2, 12, 4, 50
SHARES = (1.0, 2.0)


def make_models() -> tuple[list[PreTrainedModel], PreTrainedModel]:
    """Two rough teachers and a student, the same on every rank; no dropout, so that results can be compared."""
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    teachers = [BertForMaskedLM(config) for _ in SHARES]
    return teachers, make_student(teachers[0])


def make_batch(step: int, world_size: int) -> tuple[MaskedBatch, torch.Tensor]:
    """The global batch of a step with its padding mask: windows of unequal lengths and counts."""
    generator = torch.Generator().manual_seed(step)
    size = world_size * ACCUMULATION * MICRO
    draw = lambda *shape: torch.randint(VOCABULARY, shape, generator=generator)  # noqa: E731
    lengths = torch.randint(4, LENGTH + 1, (size, 1), generator=generator)
    positions = torch.rand(size, LENGTH, generator=generator).argsort(-1)[:, :MASKED].sort(-1).values
    valid = (torch.rand(size, MASKED, generator=generator) < 0.7) & (positions < lengths)
    mask = (torch.arange(LENGTH) < lengths).long()
    return MaskedBatch(draw(size, LENGTH), positions, draw(size, MASKED), valid), mask


class Module(nn.Module):
    def __init__(self, student: PreTrainedModel, objective: DistillationLoss) -> None:
        super().__init__()
        self.student, self.objective = student, objective

    def forward(
        self, masked: MaskedBatch, taught: TeacherOutput, mask: torch.Tensor, counts: Any
    ) -> dict[str, torch.Tensor]:
        terms: dict[str, torch.Tensor] = self.objective(
            self.student,
            masked,
            taught,
            attention_mask=mask,
            num_tokens=counts[0],
            num_masked_tokens=counts[1],
        )
        return terms


EMBEDDINGS = ObjectiveConfig(kd_weight=0, mlm_weight=0, cosine_weight=0, embedding_weight=1)


def train(objective: ObjectiveConfig | None = None, **settings: Any) -> dict[str, Any]:
    """STEPS steps of SGD under ZeRO-2; parameters (fp32 masters) after each, and the global mean of the loss."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import safe_get_full_fp32_param

    deepspeed = import_deepspeed()
    get_accelerator().is_fp16_supported = lambda: True
    rank, world_size = dist.get_rank(), dist.get_world_size()
    teachers, student = make_models()
    teacher = Teacher(teachers, SHARES)
    pooling = "mean" if objective is not None else None
    module = Module(
        student, DistillationLoss(objective or ObjectiveConfig(), pooling=pooling, chunk_tokens=5)
    )
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.SGD(module.parameters(), LR),
        config={
            "train_micro_batch_size_per_gpu": MICRO,
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_clipping": 0.0,  # DeepSpeed clips at 1 if not told
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 2000, "allgather_bucket_size": 2000},
            "data_types": {"grad_accum_dtype": "fp32"},
            "steps_per_print": 1000,
            **settings,
        },
    )
    history: list[dict[str, Any]] = []
    for step in range(STEPS):
        batch, mask = make_batch(step, world_size)
        counts = mask.sum() / (world_size * ACCUMULATION), batch.valid.sum() / (world_size * ACCUMULATION)
        total = torch.zeros(())
        for index in range(ACCUMULATION):
            first = (rank * ACCUMULATION + index) * MICRO
            rows = slice(first, first + MICRO)
            micro = MaskedBatch(
                batch.input_ids[rows], batch.positions[rows], batch.targets[rows], batch.valid[rows]
            )
            taught = teacher(micro.input_ids, mask[rows])
            loss = engine(micro, taught, mask[rows], counts)["loss"]
            total += loss.detach()
            engine.backward(loss)
            engine.step()
        dist.all_reduce(total)
        parameters = {
            name: safe_get_full_fp32_param(parameter).clone()
            for name, parameter in engine.module.student.named_parameters()
        }
        history.append(
            {
                "parameters": parameters,
                "loss": float(total) / (world_size * ACCUMULATION),
                "skipped": engine.skipped_steps,
            }
        )
    engine.destroy()
    return {"history": history}


def scenarios() -> dict[str, Any]:
    """All of them in one launch, because importing DeepSpeed takes longer than running them."""
    fp16 = {"enabled": True, "initial_scale_power": 12, "hysteresis": 1}
    return {
        "fp32": train(),
        "embeddings": train(EMBEDDINGS),
        "fp16": train(fp16=fp16),
        "overflow": train(fp16={**fp16, "initial_scale_power": 31}),
    }
