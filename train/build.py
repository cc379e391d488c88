"""From a configuration to a trainer: every part is built here, cheap checks first, models last."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from data_prep.shard_format.manifest import Manifest
from train.config import Config
from train.data.corpus import corpus_digests, num_heldout_windows
from train.data.loader import heldout_windows
from train.data.order import check_fit
from train.data.pipeline import RunData, build_run_data, build_schedule, fit_micro_batch
from train.distributed.device import engine_arguments
from train.distributed.world import World, import_deepspeed
from train.engine_check import check_engine_config
from train.engine_config import (
    default_engine_config,
    engine_settings,
    read_engine_config,
    resolve_engine_config,
)
from train.errors import UserError, one_line
from train.evaluation.heldout import HeldoutEvaluation
from train.evaluation.importance import importance_from_first_rank
from train.evaluation.teacher_precision import check_teacher_precision
from train.loop.micro_batch import find_micro_batch_size
from train.loop.observers.logged_figures import ComputeCost
from train.loop.startup_timing import StartupTimer
from train.loop.timing import Clock
from train.loop.trainer import DistillationModule, Trainer
from train.models.build import (
    TeacherFolder,
    build_student,
    build_teacher,
    check_sequence_length,
    check_tokenizer_beside,
    open_teachers,
    tokenizer_source,
)
from train.models.compilation import compile_layers, require_compiler
from train.models.cpu.attention import with_cpu_attention
from train.models.cpu.dropout import with_fast_dropout
from train.models.flops import measured_matrix_rate, shape_of, training_flops_per_token
from train.models.teacher import Teacher
from train.objective.build import build_objective, relation_layers
from train.objective.untrained import freeze_untrained
from train.optimizer import begin_with_weights, bind_optimizer, build_optimizer


@dataclass(frozen=True)
class Inputs:
    """What a configuration names, read once: what RUN/inputs.json records is what is used."""

    engine: dict[str, Any]
    """DeepSpeed's JSON as it was given."""
    found: Manifest | UserError | OSError
    """The shards' manifest, or why it cannot be read: raised only when all ranks have been compared."""
    corpus: dict[str, str]
    """Digests of the manifest and of the token histogram, by name."""

    @property
    def manifest(self) -> Manifest:
        if not isinstance(self.found, Manifest):
            raise self.found
        return self.found

    def as_record(self) -> dict[str, Any]:
        """What a run is known by. Without the corpus where its manifest is refused: by name, a little later."""
        corpus = self.corpus if isinstance(self.found, Manifest) else {}
        return {**corpus, "deepspeed.config": self.engine}


def read_inputs(config: Config, device: str) -> Inputs:
    """Read the shards' manifest and DeepSpeed's JSON; UserError where the JSON cannot be read."""
    try:
        found: Manifest | UserError | OSError = load_manifest(config.data.shards)
    except (UserError, OSError) as error:
        found = error
    return Inputs(engine_template(config, device), found, corpus_digests(config.data.shards, found))


@dataclass
class Parts:
    """What a run trains and scores."""

    config: Config
    """With the micro batch that was found in place of "auto"."""
    trainer: Trainer
    heldout: HeldoutEvaluation | None
    """None where the corpus has no held-out windows."""
    student: PreTrainedModel
    teacher: Teacher | None
    engine_config: dict[str, Any]
    tokenizer_source: str
    """Folder or hub name of the tokenizer that goes with the student."""
    hub_names: list[str]
    """Which of the teachers, or the model begun from, came from the hub."""
    cost: ComputeCost
    frozen: list[str]
    """Parameters of the student that no term of the objective trains: they stay as they are."""

    def score(self) -> Callable[[], dict[str, Any]] | None:
        """A function that scores the student as it is, and its teacher; None without held-out windows."""
        heldout, student, teacher = self.heldout, self.student, self.teacher
        objective, batch_done = self.trainer.engine.module.objective, self.trainer.clock.part_done
        return None if heldout is None else lambda: heldout(student, teacher, objective, batch_done)


def assemble(
    config: Config,
    inputs: Inputs,
    world: World,
    *,
    clock: Clock,
    startup: StartupTimer,
    resumed: bool = False,
    load_universal: bool = False,
) -> Parts:
    """Build everything, cheap checks first. The teachers' folders are read once, here.

    Args:
        startup: notes the end of each stage.
        resumed: a checkpoint's weights are to replace the student's, of which the shapes alone count.
        load_universal: the engine is to read a universal checkpoint (train/checkpointing/resume.py).
    Raises:
        UserError: what is wrong with the configuration, the shards or the teacher.
    """
    for option in ("teacher_compile", "student_compile"):
        if getattr(config.model, option):
            require_compiler(f"model.{option}", world.device)
    manifest = inputs.manifest
    folders = open_teachers(config, manifest.tokenizer)
    hub_names = [folder.name for folder in folders if folder.is_on_hub]
    if config.training.micro_batch_size == "auto":
        config = _with_micro_batch_that_fits(config, inputs, world, folders)
    engine_config = engine_config_for(config, inputs.engine, world.world_size)
    on_gpu = world.device.startswith("cuda")
    data = build_run_data(config, manifest, rank=world.rank, world_size=world.world_size, pin_memory=on_gpu)
    schedule = build_schedule(config, data.total_steps)
    startup.ended("data")
    teacher = _checked_teacher(config, world.device, folders) if config.objective.needs_teacher else None
    startup.ended("teacher")
    measured = None if resumed else functools.partial(importance_from_first_rank, config, manifest, world)
    student = build_student(config, manifest, folders, measured)
    objective = build_objective(config.objective, student, teacher, config.data.seed)
    check_sequence_length(student, config.data.sequence_length)
    if world.device == "cpu":
        with_fast_dropout(with_cpu_attention(student))
    startup.ended("student")
    frozen = freeze_untrained(objective, student, teacher, world.device)
    # After that pass of 8 tokens, for which code would be made that never runs again.
    for model in (
        *([student] if config.model.student_compile else ()),
        *(teacher.models if teacher is not None and config.model.teacher_compile else ()),
    ):
        compile_layers(model)
    at_start = {**engine_config, "checkpoint": {"load_universal": True}} if load_universal else engine_config
    engine = start_engine(config, DistillationModule(student, objective), at_start, world.device)
    cost = _compute_cost(config, data, student, teacher, world.device)
    startup.ended("engine")
    parts = Parts(
        config=config,
        trainer=Trainer(
            engine, teacher, data, schedule, dropout_seed=config.data.seed, rank=world.rank, clock=clock
        ),
        heldout=build_heldout(config, manifest, world),
        student=student,
        teacher=teacher,
        engine_config=engine_config,
        tokenizer_source=tokenizer_source(config),
        hub_names=hub_names,
        cost=cost,
        frozen=frozen,
    )
    startup.ended("data")
    return parts


def _with_micro_batch_that_fits(
    config: Config, inputs: Inputs, world: World, folders: list[TeacherFolder]
) -> Config:
    any_size = replace(config, training=replace(config.training, micro_batch_size=1))
    engine_config_for(any_size, inputs.engine, world.world_size)  # refused before models are made to measure
    return find_micro_batch_size(config, inputs.manifest, world, inputs.engine, folders)


def _checked_teacher(config: Config, device: str, folders: list[TeacherFolder]) -> Teacher:
    """The teacher on this rank's device, its number format checked on one batch."""
    teacher = build_teacher(config, device, folders)
    generator = torch.Generator().manual_seed(0)
    shape = (2, config.data.sequence_length)
    input_ids = torch.randint(0, teacher.vocab_size, shape, generator=generator).to(device)
    check_teacher_precision(teacher, [folder.model for folder in folders], input_ids)
    return teacher


def _compute_cost(
    config: Config, data: RunData, student: PreTrainedModel, teacher: Teacher | None, device: str
) -> ComputeCost:
    """With the student in the engine's number format, in which the matrix rate is measured."""
    shape = shape_of(student)
    teachers = [shape_of(model) for model in teacher.models] if teacher is not None else []
    relations = relation_layers(config.objective, shape.layers, [each.layers for each in teachers])
    flops = {
        phase.sequence_length: training_flops_per_token(
            shape,
            teachers,
            phase.sequence_length,
            phase.masker.num_masked,
            config.objective.soft_targets,
            relations,
        ).total
        for phase in data.phases
    }
    return ComputeCost(flops, measured_matrix_rate(device, next(student.parameters()).dtype))


def load_manifest(shards: str) -> Manifest:
    """The shards' manifest, compared with the tokenizer beside it.

    Raises:
        UserError: there is none (the message says how to make shards), or it is not what it was.
    """
    try:
        manifest = Manifest.load(shards)
        check_tokenizer_beside(shards, manifest.tokenizer)
        return manifest
    except FileNotFoundError:
        raise UserError(
            f"data.shards={shards!r} holds no manifest.json; make shards from text with\n"
            f"  python data_prep/write_shards.py CORPUS.txt --tokenizer google-bert/bert-base-uncased --out {shards}\n"
            "or try the whole system on a small corpus with `make quickstart`"
        ) from None


def engine_template(config: Config, device: str) -> dict[str, Any]:
    """DeepSpeed's JSON as the user gave it, or the shipped one for this device ("cpu", "cuda:1", ...)."""
    return read_engine_config(config.deepspeed.config or default_engine_config(device.split(":")[0]))


def engine_config_for(config: Config, template: dict[str, Any], world_size: int) -> dict[str, Any]:
    """DeepSpeed's JSON with the recipe's numbers filled in; UserError for what this trainer or DeepSpeed refuses."""
    training = config.training
    resolved = resolve_engine_config(
        template,
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.settled_micro_batch_size,
        gradient_accumulation_steps=check_fit(
            training.global_batch_size, config.data.lanes, world_size, training.settled_micro_batch_size
        ),
        gradient_clipping=training.gradient_clipping,
        source=config.deepspeed.config,
        log_level=config.deepspeed.log_level,
    )
    check_engine_config(resolved, config.deepspeed.config)
    return resolved


def build_heldout(config: Config, manifest: Manifest, world: World) -> HeldoutEvaluation | None:
    """The evaluation on fixed held-out windows; None where the corpus has none."""
    if not num_heldout_windows(manifest, config.data.sequence_length):
        return None
    input_ids, window_ids = heldout_windows(
        config.data.shards,
        manifest,
        config.data.sequence_length,
        config.evaluation.max_windows,
        cache_dir=config.data.cache_dir,
    )
    return HeldoutEvaluation(
        input_ids,
        window_ids,
        manifest.tokenizer,
        batch_size=config.training.settled_micro_batch_size,
        device=world.device,
        rank=world.rank,
        world_size=world.world_size,
    )


def heldout_scoring(config: Config, device: str) -> tuple[Manifest, HeldoutEvaluation, Teacher]:
    """What scores a model outside of a run: the recipe's shards, its held-out windows, its teacher.

    The teacher (or ensemble, with its weights) has the recipe's number format on a GPU, and fp32 on a CPU.

    Raises:
        UserError: the shards have no held-out windows of the recipe's length.
    """
    config, manifest = fit_micro_batch(config, 1), load_manifest(config.data.shards)
    here = World(rank=0, local_rank=0, world_size=1, local_size=1, device=device)
    evaluation = build_heldout(config, manifest, here)
    if evaluation is None:
        raise UserError(
            f"{config.data.shards} has no held-out windows of {config.data.sequence_length} tokens"
        )
    dtype = "auto" if device == "cpu" else config.model.teacher_dtype
    model = replace(config.model, teacher_dtype=dtype)
    return manifest, evaluation, build_teacher(replace(config, model=model), device)


def start_engine(
    config: Config, module: DistillationModule, engine_config: dict[str, Any], device: str
) -> Any:
    """DeepSpeed's engine with the recipe's optimizer bound to it.

    Args:
        device: this rank's, "cpu" or "cuda:1".
    Raises:
        UserError: what the optimizer refuses of its section or of the engine's JSON, and what DeepSpeed does, such
            as fp16 on a CPU.
    """
    optimizer = build_optimizer(config.optimizer, module.named_parameters())
    weights = {}
    if engine_settings(engine_config).precision != "fp32":
        trained = {name: each for name, each in module.named_parameters() if each.requires_grad}
        weights = {name: each.detach().to("cpu", copy=True) for name, each in trained.items()}
    deepspeed = import_deepspeed(config.deepspeed.log_level)
    try:
        engine, *_ = deepspeed.initialize(
            engine_arguments(device), model=module, optimizer=optimizer, config=engine_config
        )
    except (AssertionError, ValueError) as error:  # combinations that its configuration class lets through
        name = f"={config.deepspeed.config!r}" if config.deepspeed.config else ""
        raise UserError(f"deepspeed.config{name}: DeepSpeed refuses it: {one_line(error)}") from error
    bind_optimizer(optimizer, engine)
    begin_with_weights(module, weights)
    return engine
