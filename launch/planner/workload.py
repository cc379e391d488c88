"""What a configuration comes to, as far as memory and cost depend on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.planner.memory import Step
from launch.planner.models import PlannedModel, describe, models_of
from train.config import Config
from train.config_sections.objective import ObjectiveConfig
from train.data.order import DataOrder, windows_per_shard
from train.data.pipeline import phase_stops, planned_phases, total_steps
from train.engine_config import EngineSettings
from train.models.build import check_sequence_length
from train.models.flops import FlopsPerToken, training_flops_per_token
from train.objective.build import relation_layers


@dataclass(frozen=True)
class Recipe:
    """What a configuration comes to, as far as cost depends on it."""

    student: PlannedModel
    teachers: tuple[PlannedModel, ...]
    objective: ObjectiveConfig
    masking_probability: float
    engine: EngineSettings
    teacher_bytes_per_element: int
    sequence_length: int
    global_batch_size: int
    micro_batch_size: int
    lanes: int
    phases: tuple[tuple[int, int], ...]
    """(steps, sequence length) of each phase of the run."""

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return sum(steps for steps, _ in self.phases)

    @property
    def tokens(self) -> int:
        """That pass through the models in the whole run."""
        return sum(steps * self.global_batch_size * length for steps, length in self.phases)

    @property
    def total_flops(self) -> float:
        """Of the whole run."""
        return sum(
            steps * self.global_batch_size * length * self.flops_at(length).total
            for steps, length in self.phases
        )

    @property
    def flops(self) -> FlopsPerToken:
        """Per token at the full sequence length."""
        return self.flops_at(self.sequence_length)

    def flops_at(self, sequence_length: int) -> FlopsPerToken:
        teachers = [teacher.shape for teacher in self.teachers]
        masked, soft = self._num_masked(sequence_length), self.objective.soft_targets
        layers = [teacher.layers for teacher in self.teachers]
        relations = relation_layers(self.objective, self.student.layers, layers)
        return training_flops_per_token(
            self.student.shape, teachers, sequence_length, masked, soft, relations
        )

    def step_on(self, world_size: int, micro_batch_size: int, accumulation: int) -> Step:
        """What one of `world_size` GPUs holds in memory, at the full sequence length."""
        return Step(
            student=self.student,
            teachers=self.teachers,
            objective=self.objective,
            num_masked=self._num_masked(self.sequence_length),
            engine=self.engine,
            teacher_bytes_per_element=self.teacher_bytes_per_element,
            world_size=world_size,
            micro_batch_size=micro_batch_size,
            sequence_length=self.sequence_length,
            accumulation=accumulation,
        )

    def _num_masked(self, sequence_length: int) -> int:
        return round(self.masking_probability * sequence_length) if self.objective.needs_masks else 0


def read_recipe(
    config: Config,
    engine: EngineSettings,
    shard_tokens: Sequence[int],
    vocabulary: int | None = None,
    *,
    micro_batch_size: int,
) -> Recipe:
    """The recipe of a configuration.

    Args:
        shard_tokens: tokens of every training shard.
        vocabulary: of the shards' tokenizer, where there are shards.
        micro_batch_size: what training.micro_batch_size says, or stands for "auto".
    Raises:
        UserError: a model whose shape is not known, a vocabulary that does not fit, too small a corpus.
    """
    student, teachers = models_of(config, vocabulary)
    length, batch = config.data.sequence_length, config.training.global_batch_size
    for model in (student, *teachers):
        check_sequence_length(model, length)
    lengths, shares = planned_phases(config)
    per_epoch = [
        DataOrder(windows_per_shard(shard_tokens, each), batch, 0, config.data.lanes).steps_per_epoch
        for each in (lengths if config.training.max_steps is None else [])
    ]
    stops = phase_stops(total_steps(config, per_epoch, shares), shares)
    return Recipe(
        student=describe(student),
        teachers=tuple(map(describe, teachers)),
        objective=config.objective,
        masking_probability=config.masking.probability,
        engine=engine,
        teacher_bytes_per_element=4 if config.model.teacher_dtype == "fp32" else 2,
        sequence_length=length,
        global_batch_size=batch,
        micro_batch_size=micro_batch_size,
        lanes=config.data.lanes,
        phases=tuple(
            (stop - first, each) for first, stop, each in zip([0, *stops], stops, lengths, strict=False)
        ),
    )
