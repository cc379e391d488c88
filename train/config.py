"""The configuration tree: every number of a run, with its default, its unit and where it comes from.

Filled in this order: the defaults below (the published DistilBERT-base recipe, Sanh et al. 2019,
arXiv:1910.01108, with LAMB at 4,096 sequences) < `--config recipe.yaml` < `--section.key=value`. Values that
cannot work are refused here, before any model is loaded. What DeepSpeed's own JSON owns (ZeRO stage,
precision, buckets) is not repeated here: see train/engine_config.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

from train.config_sections.checks import refuse, require_sane_number
from train.config_sections.data import DataConfig, MaskingConfig
from train.config_sections.model import ModelConfig
from train.config_sections.objective import OBJECTIVE_WEIGHTS, ObjectiveConfig
from train.config_sections.running import CheckpointConfig, DeepSpeedConfig, EvaluationConfig, RunConfig
from train.config_sections.training import OptimizerConfig, ScheduleConfig, TrainingConfig
from train.errors import UserError


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
        for each in fields(self):
            section = getattr(self, each.name)
            for key, value in vars(section).items():
                for item in value if isinstance(value, (list, tuple)) else [value]:
                    # As a path it would mean the current folder.
                    if isinstance(item, str) and not item.strip():
                        refuse(section, f"{each.name}.{key}", "is empty; give a value, or leave it out")
                    require_sane_number(section, f"{each.name}.{key}", item)
        if self.optimizer.prenormalize and self.training.gradient_clipping != 0:
            remedy = "with optimizer.prenormalize=true the gradient is already of norm 1: give 0"
            refuse(self.training, "training.gradient_clipping", remedy)
        self._check_terms_of_teachers()
        if not self.objective.needs_masks and self.masking != MaskingConfig():
            raise UserError(
                f"masking={asdict(self.masking)!r}: has no effect where no term predicts tokens (objective.kd_weight, "
                "mlm_weight and mse_weight are 0); remove it"
            )
        short = self.schedule.short_sequence_length
        if short is not None and short >= self.data.sequence_length:
            remedy = f"give less than data.sequence_length={self.data.sequence_length}, or null"
            refuse(self.schedule, "schedule.short_sequence_length", remedy)
        warmup, last = self.schedule.warmup_steps, self.training.max_steps
        if warmup is not None and last is not None and warmup > last:
            remedy = f"is more than training.max_steps={last}; give fewer"
            refuse(self.schedule, "schedule.warmup_steps", remedy)

    def _check_terms_of_teachers(self) -> None:
        if self.model.teacher is None:
            for name in OBJECTIVE_WEIGHTS:
                if name != "mlm_weight" and getattr(self.objective, name) != 0:
                    remedy = "needs a model.teacher; give 0 to train without one"
                    refuse(self.objective, f"objective.{name}", remedy)
            return
        teachers = len(self.model.teacher) if isinstance(self.model.teacher, list) else 1
        if self.objective.embedding_weight != 0 and teachers != 1:
            refuse(
                self.model,
                "model.teacher",
                "vectors of several models lie in spaces of their own; give one, or objective.embedding_weight=0",
            )
        relation_layers = self.objective.relation_layers
        if relation_layers is not None and len(relation_layers) != teachers:
            remedy = f"give {teachers} pairs, one for each teacher"
            refuse(self.objective, "objective.relation_layers", remedy)
