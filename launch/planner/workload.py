"""What a configuration comes to, as far as memory and cost depend on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.planner.memory import EngineSettings, Objective
from launch.planner.shapes import PlannedModel, model_from_config, named_model, student_of
from train.config import Config
from train.data.order import DataOrder, windows_per_shard
from train.data.pipeline import phase_stops, planned_phases, total_steps
from train.errors import UserError
from train.models.build import teacher_names
from train.models.flops import FlopsPerToken, training_flops_per_token


@dataclass(frozen=True)
class Recipe:
    """What a configuration comes to, as far as cost depends on it."""

    student: PlannedModel
    teachers: tuple[PlannedModel, ...]
    objective: Objective
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
        masked = round(self.masking_probability * sequence_length)
        teachers = [teacher.shape for teacher in self.teachers]
        soft = self.objective.soft_targets
        return training_flops_per_token(self.student.shape, teachers, sequence_length, masked, soft)


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
    student, teachers = _models(config, vocabulary)
    length, batch = config.data.sequence_length, config.training.global_batch_size
    for model in (student, *teachers):
        longest = model.positions - (2 if "roberta" in model.model_type else 0)
        if length > longest:
            raise UserError(
                f"data.sequence_length={length}: the model has positions for {longest} tokens; give that or less"
            )
    lengths, shares = planned_phases(config)
    per_epoch = [
        DataOrder(windows_per_shard(shard_tokens, each), batch, 0, config.data.lanes).steps_per_epoch
        for each in (lengths if config.training.max_steps is None else [])
    ]
    stops = phase_stops(total_steps(config, per_epoch, shares), shares)
    return Recipe(
        student=student,
        teachers=teachers,
        objective=_objective(config),
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


def _models(config: Config, vocabulary: int | None) -> tuple[PlannedModel, tuple[PlannedModel, ...]]:
    if config.model.teacher is None:
        from transformers import AutoConfig

        scratch = dict(config.model.scratch or {})
        kind = scratch.pop("model_type")
        try:
            settings = AutoConfig.for_model(kind, **scratch).to_dict()
        except ValueError:
            raise UserError(
                f"model.scratch: unknown model_type {kind!r}; for example bert or roberta"
            ) from None
        if vocabulary is not None:
            settings["vocab_size"] = vocabulary
        return model_from_config("model.scratch", settings), ()
    named = tuple(named_model(name) for name in teacher_names(config))
    for name, model in zip(teacher_names(config), named, strict=True):
        if vocabulary is not None and model.vocabulary < vocabulary:
            raise UserError(
                f"model.teacher={name!r} has a vocabulary of {model.vocabulary} tokens, the shards' tokenizer one of "
                f"{vocabulary}: write the shards with --tokenizer {name}"
            )
    return planned_student(config, named[0]), named if config.objective.needs_teacher else ()


def planned_student(config: Config, teacher: PlannedModel) -> PlannedModel:
    """The student that a recipe makes of its (first) teacher."""
    layers, chosen = config.model.student_layers, config.model.layer_map
    if layers is None and isinstance(chosen, list):
        layers = len(chosen)
    return student_of(teacher, layers, config.model.student_width)


def _objective(config: Config) -> Objective:
    objective = config.objective
    return Objective(
        soft_targets=objective.soft_targets,
        num_masked=round(config.masking.probability * config.data.sequence_length),
        mlm=objective.mlm_weight > 0,
        cosine=objective.cosine_weight > 0,
        mse=objective.mse_weight > 0,
    )
