"""The optimizer, its learning rate, and how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.config_sections.checks import refuse, require_at_most, require_not_negative, require_positive
from train.errors import UserError

MAX_GLOBAL_BATCH_SIZE = 2**24
MAX_STEPS = 99_999_999
"""What step-NNNNNNNN can name."""
LAMB_OPTIONS = ("adapt_all", "clamp", "prenormalize")
"""Of OptimizerConfig: without effect for other optimizers."""


@dataclass(frozen=True)
class OptimizerConfig:
    """LAMB (You et al. 2020, arXiv:1904.00962), exact under ZeRO-2; or AdamW, to measure what LAMB is worth."""

    name: Literal["lamb", "adamw"] = "lamb"
    """lamb, or torch's fused AdamW under the same engine, schedule, clipping and exclusions from decay."""

    lr: float = 1.77e-3
    """Peak learning rate (You et al. 2020, table 4: 1.77e-3 at a batch of 4K). AdamW wants one of its own: 1e-3 at
    that batch in Izsak et al. 2021 (arXiv:2104.07705)."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moments (You et al. 2020)."""

    eps: float = 1e-6
    """Added to the root of the second moment (You et al. 2020)."""

    weight_decay: float = 0.01
    """Decoupled weight decay, not applied to biases and LayerNorms (You et al. 2020)."""

    adapt_all: bool = False
    """LAMB: scale biases and LayerNorms by a trust ratio as well."""

    clamp: tuple[float, float] | None = None
    """LAMB: smallest and largest trust ratio; null: not clamped."""

    prenormalize: bool = False
    """LAMB: divide the gradient by its global norm first (NVIDIA's); training.gradient_clipping must then be 0."""

    def __post_init__(self) -> None:
        require_positive(self, "optimizer", "lr", "eps")
        require_not_negative(self, "optimizer", "weight_decay")
        if not all(0 <= b < 1 for b in self.betas):
            refuse(self, "optimizer.betas", "give two numbers in [0, 1)")
        if self.clamp is not None and not 0 <= self.clamp[0] <= self.clamp[1]:
            refuse(self, "optimizer.clamp", "give two numbers, 0 <= smallest <= largest")
        if self.name == "adamw":
            for key in LAMB_OPTIONS:
                if getattr(self, key) != getattr(OptimizerConfig, key):
                    remedy = "is LAMB's and has no effect with optimizer.name=adamw; remove it"
                    refuse(self, f"optimizer.{key}", remedy)
            if self.lr == OptimizerConfig.lr:
                remedy = "give a rate for optimizer.name=adamw, for example 1e-3 at a batch of 4,096"
                refuse(self, "optimizer.lr", f"is LAMB's default; {remedy}")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate and sequence length over the steps.

    The rate warms up linearly, then decays as a polynomial that would reach 0 one step after the last."""

    warmup_steps: int | None = None
    """Steps of linear warm-up; null: 1/40 of all steps (You et al. 2020, table 4, at a batch of 4K)."""

    decay_power: float = 1.0
    """Exponent of the decay: 1 is linear (You et al. 2020), 0.5 is NVIDIA's, 0 keeps the peak."""

    short_sequence_length: int | None = None
    """Tokens in a sequence in the first part of the run, for example 128; null: data.sequence_length all along."""

    short_share: float = 0.9
    """Share of the steps that have the short length (Devlin et al. 2019, appendix A.2)."""

    def __post_init__(self) -> None:
        warmup = self.warmup_steps
        if warmup is not None and warmup < 0:
            refuse(self, "schedule.warmup_steps", "give 0 or more, or null")
        require_not_negative(self, "schedule", "decay_power")
        short = self.short_sequence_length
        if short is not None and short < 8:
            refuse(self, "schedule.short_sequence_length", "give at least 8, or null")
        if not 0 < self.short_share < 1:
            refuse(self, "schedule.short_share", "give a share between 0 and 1")
        if short is None and self.short_share != ScheduleConfig.short_share:
            remedy = "has no effect without schedule.short_sequence_length; remove it"
            refuse(self, "schedule.short_share", remedy)


DEFAULT_MICRO_BATCH_SIZE = 32


@dataclass(frozen=True)
class TrainingConfig:
    """How much, how long."""

    global_batch_size: int = 4096
    """Sequences in an optimizer step, over all ranks and accumulation steps (Sanh et al. 2019: up to 4K)."""

    micro_batch_size: int | Literal["auto"] | None = None
    """Sequences that one rank passes through the models at a time; the accumulation is derived. null: 32, or the
    largest below with which the ranks share the global batch. auto: the largest that fits into the GPU's memory,
    found at the first start. A run that goes on keeps what it had, as far as the ranks share the batch with it."""

    epochs: float | None = None
    """Passes over the corpus; null: 3, as in the original code, unless max_steps is given."""

    max_steps: int | None = None
    """Optimizer steps of the run, in place of `epochs`; 0 leaves the student as it was made, scored and exported."""

    dropout: bool = True
    """Drop out as the model's own configuration says; false: nothing while it is trained, for a student that is to
    imitate its teacher, who drops nothing. The exported model keeps its configuration."""

    gradient_clipping: float = 1.0
    """Largest global gradient norm (NVIDIA's LAMB recipe); 0: not clipped."""

    def __post_init__(self) -> None:
        require_positive(self, "training", "global_batch_size", "epochs")
        require_not_negative(self, "training", "max_steps")
        require_at_most(self, "training", MAX_GLOBAL_BATCH_SIZE, "global_batch_size")
        require_at_most(self, "training", MAX_STEPS, "max_steps", "epochs")
        if self.micro_batch_size != "auto":
            require_positive(self, "training", "micro_batch_size")
        if self.epochs is not None and self.max_steps is not None:
            remedy = f"has no effect beside training.max_steps={self.max_steps}; remove one"
            refuse(self, "training.epochs", remedy)
        require_not_negative(self, "training", "gradient_clipping")
        if isinstance(self.micro_batch_size, int) and self.global_batch_size % self.micro_batch_size != 0:
            remedy = f"must divide training.global_batch_size={self.global_batch_size}"
            refuse(self, "training.micro_batch_size", remedy)

    @property
    def settled_micro_batch_size(self) -> int:
        """The micro batch as a number; UserError while it is still "auto". null is settled by fit_micro_batch
        (train/data/pipeline.py)."""
        if self.micro_batch_size == "auto":
            raise UserError(
                "training.micro_batch_size='auto' is found when training starts; give a number here"
            )
        assert self.micro_batch_size is not None, "the number of ranks has not been asked for it"
        return self.micro_batch_size
