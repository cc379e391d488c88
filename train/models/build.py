"""Teacher, student and objective, as the configuration asks for them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from data_prep.shard_format.manifest import Manifest, TokenizerInfo, without_scheme
from train.config import OBJECTIVE_WEIGHTS, Config
from train.distributed.world import World
from train.errors import UserError, one_line
from train.evaluation.teacher_precision import check_teacher_precision
from train.models.families import family_of
from train.models.loading import load_masked_lm
from train.models.students import make_student
from train.models.teacher import Teacher, load_teacher
from train.objective.compatibility import check_models, projection_widths
from train.objective.distillation import DistillationLoss

TEACHER_DTYPES = {"auto": None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def needs_teacher(config: Config) -> bool:
    """Whether any term of the objective that is on reads a teacher's output."""
    return any(getattr(config.objective, name) > 0 for name in OBJECTIVE_WEIGHTS if name != "mlm_weight")


def build_teacher(config: Config, world: World) -> Teacher:
    """The frozen teacher (or ensemble) on this rank's device, its number format checked on one batch."""
    teacher = load_teacher(
        teacher_names(config),
        device=world.device,
        dtype=TEACHER_DTYPES[config.model.teacher_dtype],
        compile=config.model.teacher_compile,
        weights=config.model.teacher_weights,
        output_hidden_states=config.objective.layer_cosine_weight > 0,
    )
    teacher.check_sequence_length(config.data.sequence_length)
    generator = torch.Generator().manual_seed(0)
    shape = (2, config.data.sequence_length)
    check_teacher_precision(
        teacher, torch.randint(0, teacher.vocab_size, shape, generator=generator).to(world.device)
    )
    return teacher


def teacher_names(config: Config) -> list[str]:
    """Folders or hub names of the teachers; empty without one."""
    teacher = config.model.teacher
    return [teacher] if isinstance(teacher, str) else list(teacher or [])


def teacher_config(name: str) -> Any:
    """The Hugging Face config of a teacher; ValueError naming model.teacher where there is none to be had."""
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.teacher={name!r}: no Hugging Face folder of that name here, and none from the hub ({reason}); give "
            "the folder of a masked language model, or the name of one on the hub"
        ) from None


def build_objective(config: Config, student: PreTrainedModel, teacher: Teacher | None) -> DistillationLoss:
    """The objective of the recipe, checked against the models that it compares."""
    settings = asdict(config.objective)
    widths = (
        projection_widths(student, teacher) if settings.pop("projection") and teacher is not None else None
    )
    objective = DistillationLoss(**settings, projection_widths=widths)
    check_models(objective, student, teacher)
    return objective


def build_student(config: Config, manifest: Manifest) -> PreTrainedModel:
    """The model that is trained: made from the teacher's layers, or from `model.scratch`. fp32, on the CPU."""
    model = config.model
    if model.teacher is None:
        return _from_scratch(model.scratch or {}, manifest.tokenizer, config.data.seed)
    return make_student(
        load_masked_lm(teacher_names(config)[0]),
        model.student_layers,
        model.layer_map,
        width=model.student_width,
        seed=config.data.seed,
    )


def _from_scratch(settings: dict[str, Any], tokenizer: TokenizerInfo, seed: int) -> PreTrainedModel:
    own = {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_id}
    model_type = settings["model_type"]
    try:
        known = AutoConfig.for_model(model_type).to_dict()
    except ValueError:
        raise UserError(
            f"model.scratch: unknown model_type {model_type!r}; for example bert or roberta"
        ) from None
    for key in settings:
        if key in own:
            raise UserError(
                f"model.scratch: {key} comes from the shards' tokenizer ({own[key]}); leave it out"
            )
        if key not in known:
            raise UserError(f"model.scratch: {model_type} has no {key!r}; it has {', '.join(sorted(known))}")
    try:
        hf_config = AutoConfig.for_model(**{**settings, **own})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForMaskedLM.from_config(hf_config, attn_implementation="sdpa").float().train()
    # A word for a number, a width that no head count divides: many kinds of errors come of it.
    except Exception as error:
        raise UserError(
            f"model.scratch: no {model_type} can be made of {settings} ({one_line(error, 200)})"
        ) from None


def check_sequence_length(student: PreTrainedModel, sequence_length: int) -> None:
    """UserError where the model has no position for a token of the sequence."""
    longest = family_of(student).max_sequence_length(student)
    if sequence_length > longest:
        raise UserError(
            f"data.sequence_length={sequence_length}: the model has positions for {longest} tokens; give that or less"
        )


def tokenizer_source(config: Config) -> str:
    """Where the tokenizer that goes with the student is: beside the shards, else with the teacher."""
    beside_shards = Path(without_scheme(config.data.shards), "tokenizer")
    names = teacher_names(config)
    return str(beside_shards) if beside_shards.is_dir() or not names else names[0]


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
