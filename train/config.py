"""The configuration tree: every number of a run, with its default, its unit and where it comes from.

Filled in this order: the defaults below (the published DistilBERT-base recipe, Sanh et al. 2019,
arXiv:1910.01108, with LAMB at 4,096 sequences) < `--config recipe.yaml` < `--section.key=value`. Values that
cannot work are refused here, before any model is loaded. What DeepSpeed's own JSON owns (ZeRO stage,
precision, buckets) is not repeated here: see train/engine_config.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

from train.config_sections.checks import require, require_sane_number
from train.config_sections.data import DataConfig, MaskingConfig
from train.config_sections.model import ModelConfig
from train.config_sections.objective import OBJECTIVE_WEIGHTS, ObjectiveConfig
from train.config_sections.running import CheckpointConfig, DeepSpeedConfig, EvaluationConfig, RunConfig
from train.config_sections.training import OptimizerConfig, ScheduleConfig, TrainingConfig


@dataclass(frozen=True)
class Config:
    """The whole tree."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    def __post_init__(self) -> None:
        for section in fields(self):
            for key, value in vars(getattr(self, section.name)).items():
                for each in value if isinstance(value, (list, tuple)) else [value]:
                    # As a path it would mean the current folder.
                    filled = not isinstance(each, str) or bool(each.strip())
                    require(filled, f"{section.name}.{key}", value, "is empty; give a value, or leave it out")
                    require_sane_number(each, f"{section.name}.{key}", value)
        if self.optimizer.prenormalize:
            require(
                self.training.gradient_clipping == 0,
                "training.gradient_clipping",
                self.training.gradient_clipping,
                "with optimizer.prenormalize=true the gradient is already of norm 1: give 0",
            )
        self._check_terms_of_teachers()
        require(
            self.objective.needs_masks or self.masking == MaskingConfig(),
            "masking",
            asdict(self.masking),
            "has no effect where no term predicts tokens (objective.kd_weight, mlm_weight and mse_weight are 0); "
            "remove it",
        )
        require(
            not (self.model.teacher_compile and self.objective.needs_layers),
            "model.teacher_compile",
            self.model.teacher_compile,
            "a compiled teacher cannot return the hidden states of its layers; turn it off, or the cosine on "
            "mapped layers (objective.layer_cosine_weight)",
        )
        short = self.schedule.short_sequence_length
        require(
            short is None or short < self.data.sequence_length,
            "schedule.short_sequence_length",
            short,
            f"give less than data.sequence_length={self.data.sequence_length}, or null",
        )
        warmup, last = self.schedule.warmup_steps, self.training.max_steps
        require(
            warmup is None or last is None or warmup <= last,
            "schedule.warmup_steps",
            warmup,
            f"is more than training.max_steps={last}; give fewer",
        )

    def _check_terms_of_teachers(self) -> None:
        if self.model.teacher is None:
            for name in OBJECTIVE_WEIGHTS:
                if name == "mlm_weight":
                    continue
                value = getattr(self.objective, name)
                require(
                    value == 0,
                    f"objective.{name}",
                    value,
                    "needs a model.teacher; give 0 to train without one",
                )
            return
        teachers = len(self.model.teacher) if isinstance(self.model.teacher, list) else 1
        require(
            self.objective.embedding_weight == 0 or teachers == 1,
            "model.teacher",
            self.model.teacher,
            "vectors of several models lie in spaces of their own; give one, or objective.embedding_weight=0",
        )
        if self.objective.relation_layers is not None:
            require(
                len(self.objective.relation_layers) == teachers,
                "objective.relation_layers",
                self.objective.relation_layers,
                f"give {teachers} pairs, one for each teacher",
            )
