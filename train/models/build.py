"""Teachers and student, as the configuration asks for them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from data_prep.shard_format.manifest import TOKENIZER_FOLDER, Manifest, without_scheme
from data_prep.shard_format.tokenizer_info import TokenizerInfo
from data_prep.shard_format.tokenizer_record import check_record
from train.config import Config
from train.errors import UserError, one_line
from train.models.encoder_config import read_config, read_tokenizer
from train.models.families import family_of_type, has_head, max_positions
from train.models.loading import NO_HEAD_REMEDY, load_encoder, load_masked_lm, with_new_head
from train.models.pooling import sentence_pooling
from train.models.students import Measured, make_student
from train.models.teacher import Teacher, running_copy
from train.models.tokenizer_checks import check_vocabulary, folder_fingerprint, special_ids

TEACHER_DTYPES = {"auto": None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class TeacherFolder:
    """One teacher, or the model that is trained on, as it lies in its folder or on the hub; each part is read once,
    when it is first asked for."""

    name: str
    needs_head: bool = True
    """Whether it is to predict tokens."""
    key: str = "model.teacher"
    """That names it."""

    @cached_property
    def is_on_hub(self) -> bool:
        """Whether there is no folder of its name; later there may be."""
        return not Path(self.name).is_dir()

    @cached_property
    def config(self) -> Any:
        """Its Hugging Face config."""
        return teacher_config(self.name, self.key)

    @cached_property
    def fingerprint(self) -> str | None:
        """Of the tokenizer beside it; None where there is none that can be compared."""
        return folder_fingerprint(self.name)

    @cached_property
    def pooling(self) -> str:
        """Of its sentence vectors, by sentence-transformers' files beside it."""
        return sentence_pooling(self.name)

    @cached_property
    def model(self) -> PreTrainedModel:
        """Its weights: fp32, on the CPU."""
        if not self.needs_head:
            return load_encoder(self.name, self.config)
        is_teacher = self.key == "model.teacher"
        remedy = NO_HEAD_REMEDY if is_teacher else "give --model.new_head=true to put a new one on it"
        return load_masked_lm(self.name, self.config, remedy)


def open_teachers(config: Config, tokenizer: TokenizerInfo) -> list[TeacherFolder]:
    """`teacher_folders`, their vocabularies compared with the shards'; no weights are read yet."""
    folders = teacher_folders(config)
    for folder in folders:
        check_vocabulary(folder.name, folder.config, folder.fingerprint, tokenizer, folder.key)
    _pooling(config, folders)
    return folders


def build_teacher(config: Config, device: str, folders: Sequence[TeacherFolder] = ()) -> Teacher:
    """The frozen teacher (or ensemble) on a device.

    Args:
        folders: of `open_teachers`, where they have been opened before.
    Raises:
        UserError: fp16 on a CPU.
    """
    if config.model.teacher_dtype == "fp16" and torch.device(device).type == "cpu":
        raise UserError(
            "model.teacher_dtype='fp16': CPUs run float16 at a fraction of fp32's rate; give bf16, fp32 or auto"
        )
    folders = folders or teacher_folders(config)
    teacher = Teacher(
        [running_copy(each.model, device, TEACHER_DTYPES[config.model.teacher_dtype]) for each in folders],
        config.model.teacher_weights,
        names=[each.name for each in folders],
        fingerprints=[each.fingerprint for each in folders],
        output_hidden_states=config.objective.layer_cosine_weight > 0,
        relation_layers=_relation_layers(config, folders),
        relations_alone=config.objective.relation_weight > 0 and not config.objective.needs_teacher_output,
        pooling=_pooling(config, folders),
    )
    teacher.check_sequence_length(config.data.sequence_length)
    return teacher


def _pooling(config: Config, folders: Sequence[TeacherFolder]) -> str | None:
    """Of the teacher's sentence vectors; None where none are learnt. UserError where its files do not say."""
    return folders[0].pooling if config.objective.embedding_weight > 0 else None


def _relation_layers(config: Config, folders: Sequence[TeacherFolder]) -> list[int] | None:
    """The teachers' layers whose relations are learnt, counted from 1; None where none are."""
    objective = config.objective
    if objective.relation_weight == 0:
        return None
    families = [family_of_type(folder.config.model_type) for folder in folders]
    num_layers = [
        int(getattr(folder.config, family.num_layers_field))
        for folder, family in zip(folders, families, strict=True)
    ]
    return [theirs for _, theirs in objective.relation_pairs(0, num_layers)]


def teacher_names(config: Config) -> list[str]:
    """Folders or hub names of the teachers; empty without one."""
    teacher = config.model.teacher
    return [teacher] if isinstance(teacher, str) else list(teacher or [])


def teacher_folders(config: Config) -> list[TeacherFolder]:
    """The teachers of a recipe, or the model that it trains on; nothing is read yet."""
    start = config.model.start_from
    if start is not None:
        return [TeacherFolder(start, not config.model.new_head, "model.start_from")]
    return [TeacherFolder(name, config.objective.needs_masks) for name in teacher_names(config)]


def teacher_config(name: str, key: str = "model.teacher") -> Any:
    """The Hugging Face config of a teacher; UserError naming the key where there is none to be had."""
    try:
        return read_config(name)
    except UserError as error:
        if Path(name, "config.json").is_file():
            raise UserError(f"{key}: {error}") from None
        raise UserError(
            f"{key}={name!r}: no Hugging Face folder of that name here, and none from the hub ({error}); give "
            "the folder of a masked language model, or the name of one on the hub"
        ) from None


def build_student(
    config: Config,
    manifest: Manifest,
    folders: Sequence[TeacherFolder] = (),
    measured: Measured | None = None,
) -> PreTrainedModel:
    """The model that is trained: made from the first teacher's layers, `model.start_from` itself, or `model.scratch`.
    fp32, on the CPU.

    Args:
        folders: of `open_teachers`, where they have been opened before.
        measured: see make_student; None where a narrower student's shapes alone count.
    """
    model, seed = config.model, config.data.seed
    if model.scratch is not None:
        made = _from_scratch(model.scratch, manifest.tokenizer, seed)
    elif model.start_from is not None:
        made = _trained_on((folders or teacher_folders(config))[0], model.new_head, seed)
    else:
        made = student_of((folders or teacher_folders(config))[0].model, config, measured)
    return made.train(config.training.dropout)


def student_of(teacher: PreTrainedModel, config: Config, measured: Measured | None = None) -> PreTrainedModel:
    """The student that a recipe makes of its first teacher, on whatever device the teacher is."""
    model = config.model
    return make_student(
        teacher,
        model.student_layers,
        model.layer_map,
        width=model.student_width,
        heads=model.student_heads,
        feed_forward=model.student_feed_forward,
        measured=measured,
        seed=config.data.seed,
    )


def _trained_on(folder: TeacherFolder, new_head: bool, seed: int) -> PreTrainedModel:
    if not new_head:
        return copy.deepcopy(folder.model)  # what is trained is moved and rounded
    if has_head(folder.model):
        raise UserError(
            f"model.new_head=True: {folder.name} has an MLM head already; leave it out to train that one on"
        )
    return with_new_head(folder.model, seed)


def _from_scratch(settings: dict[str, Any], tokenizer: TokenizerInfo, seed: int) -> PreTrainedModel:
    model_type = settings["model_type"]
    try:
        known = AutoConfig.for_model(model_type).to_dict()
    except (ValueError, TypeError):
        raise UserError(
            f"model.scratch: unknown model_type {model_type!r}; for example bert or roberta"
        ) from None
    family = family_of_type(model_type)
    # The defaults are the ids of the tokenizer that this kind of model was published with.
    own = {field: at for field, at in special_ids(tokenizer).items() if known.get(field) is not None}
    own |= {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_id}
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
            return AutoModelForMaskedLM.from_config(
                hf_config, attn_implementation=family.attention, trust_remote_code=False
            ).float()
    # A word for a number, a width that no head count divides: many kinds of errors come of it.
    except Exception as error:
        raise UserError(
            f"model.scratch: no {model_type} can be made of {settings} ({one_line(error, 200)})"
        ) from None


def check_sequence_length(student: PreTrainedModel, sequence_length: int) -> None:
    """UserError where the model has no position for a token of the sequence."""
    longest = max_positions(student.config)
    if longest is not None and sequence_length > longest:
        raise UserError(
            f"data.sequence_length={sequence_length}: the model has positions for {longest} tokens; give that or less"
        )


def tokenizer_beside(shards: str) -> Path:
    """Where the shards' tokenizer lies, if they are a local folder that has it."""
    return Path(without_scheme(shards), TOKENIZER_FOLDER)


def check_tokenizer_beside(shards: str, recorded: TokenizerInfo) -> None:
    """UserError where the manifest's record is not that of the tokenizer beside it; nothing where there is none."""
    if (folder := tokenizer_beside(shards)).is_dir():
        check_record(folder, read_tokenizer(folder), recorded)


def origin_of(config: Config) -> str | None:
    """Folder or hub name of what the student's weights (or, at random, its shape) come from; None from scratch."""
    return next(iter(teacher_names(config)), config.model.start_from)


def tokenizer_source(config: Config) -> str:
    """Where the tokenizer that goes with the student is: beside the shards, else with the teacher."""
    beside_shards, origin = tokenizer_beside(config.data.shards), origin_of(config)
    return str(beside_shards) if beside_shards.is_dir() or origin is None else origin


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
