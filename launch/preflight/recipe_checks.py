"""What launch/doctor.py checks once, where it runs: batch, tokenizer, teacher, and whether launch/pretrain.py would
refuse the recipe or the run folder. Nothing is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import constants, file_exists, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError

from launch.planner.models import models_of
from launch.preflight.checks import Finding
from train.build import engine_config_for, engine_template, load_manifest
from train.checkpointing.checkpoint import newest_checkpoint
from train.checkpointing.integrity import read_facts
from train.config import Config
from train.data.corpus import num_heldout_windows, read_corpus_digests, without_heldout_windows
from train.data.order import check_fit
from train.data.pipeline import build_run_data, build_schedule, fit_micro_batch
from train.distributed.device import kind_here
from train.engine_config import default_engine_config, engine_settings
from train.errors import UserError, one_line
from train.evaluation.teacher_precision import check_teacher_precision
from train.models.build import (
    TEACHER_DTYPES,
    TeacherFolder,
    build_student,
    build_teacher,
    check_sequence_length,
    count_parameters,
    open_teachers,
    teacher_folders,
    teacher_names,
)
from train.models.families import family_of
from train.models.teacher import Teacher, running_copy
from train.objective.build import build_objective
from train.run_folder import changed_config, changed_inputs, found_before, read_summary, refused_changes

OPTIMIZER_BYTES_PER_PARAMETER = 3 * 4
"""fp32 master and two moments, all ranks' partitions together."""
MIN_DISK_GIB = 1.0
CPU_TOKENS = 16  # half-precision products have no fast path on a CPU


def check_here(config: Config, world_size: int) -> list[Finding]:
    """Everything that is the same for every host."""
    findings = [check_batch(config, world_size), check_tokenizer(config), *check_teacher(config)]
    if all(finding.ok for finding in findings):  # else the same faults would show again
        findings += check_recipe(config, world_size)
    return [*findings, check_run(config)]


def needed_disk_gib(config: Config) -> float:
    """What the kept checkpoints, one in the making and the exported student come to; at least 1. Milestones count where
    training.max_steps says how many there will be."""
    try:
        parameters = count_parameters(models_of(config)[0])
        engine = engine_settings(engine_template(config, kind_here()))
    except UserError:  # other checks report it
        return MIN_DISK_GIB
    # The best by held-out loss stays beside the last ones.
    copies = config.checkpoint.keep_last + config.objective.needs_masks + 1
    if every := config.checkpoint.milestone_every_steps:
        copies += (config.training.max_steps or 0) // every
    checkpoint = OPTIMIZER_BYTES_PER_PARAMETER + engine.bytes_per_element
    return max(MIN_DISK_GIB, parameters * (copies * checkpoint + 4) / 2**30)


def finding_of(check: str, question: Callable[[], str | Finding], remedy: str) -> Finding:
    """A finding from a function that returns what is well or raises what is not, whose text may end with a remedy."""
    try:
        answer = question()
    except (ValueError, OSError) as error:  # of a library too: whatever is damaged, the other checks go on
        text = " ".join(str(error).split())
        what, separator, own = text.rpartition("; ")
        return Finding(check, False, what, own) if separator else Finding(check, False, text, remedy)
    return answer if isinstance(answer, Finding) else Finding(check, True, answer)


def check_batch(config: Config, world_size: int) -> Finding:
    """Does the number of ranks fit the recipe's batch?"""
    if config.training.micro_batch_size is None:
        config = fit_micro_batch(config, world_size)
    batch, micro = config.training.global_batch_size, config.training.micro_batch_size
    try:
        accumulation = check_fit(batch, config.data.lanes, world_size, micro if isinstance(micro, int) else 1)
    except UserError as error:
        what, _, remedy = str(error).partition(": ")
        return Finding("batch arithmetic", False, what, remedy)
    return Finding("batch arithmetic", True, f"{batch} = {micro} x {accumulation} x {world_size} ranks")


def check_tokenizer(config: Config) -> Finding:
    """Shards, the tokenizer beside them, and every teacher: do their ids mean the same?"""

    def question() -> str:
        tokenizer = load_manifest(config.data.shards).tokenizer
        for folder in teacher_folders(config):
            ask_hub(folder)
        open_teachers(config, tokenizer)
        return f"{tokenizer.vocab_size} entries, fingerprint {tokenizer.fingerprint[:12]}"

    return finding_of("tokenizer and shards", question, "write the shards with --tokenizer TEACHER")


def ask_hub(folder: TeacherFolder) -> None:
    """One question to the hub for a model that is neither a folder nor in its cache.

    Loading asks again and again, for 23 s, where nothing answers.

    Raises:
        UserError: the hub does not answer, or has no such model.
    """
    name = folder.name
    try:
        if Path(name).is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        found = file_exists(name, "config.json")
    except HFValidationError:  # a path: loading says that there is no such folder
        return
    except Exception as error:  # of whichever HTTP library the hub's client uses
        reason = one_line(error, 200)
        raise UserError(
            f"{folder.key}={name!r}: no folder of that name here, not in the hub's cache, and {constants.ENDPOINT} "
            f"cannot be asked ({reason}); give a folder, or download it where there is internet: hf download {name}"
        ) from None
    if not found:
        raise UserError(
            f"{folder.key}={name!r}: no folder of that name here, and no model at {constants.ENDPOINT} (or "
            "HF_TOKEN may not see it); give the folder of a masked language model, or the name of one on the hub"
        )


def check_teacher(config: Config) -> list[Finding]:
    """Every teacher loads, with its head where one is needed, and in its running precision still is what it is in
    fp32."""
    if not teacher_names(config):
        return [Finding("teacher", True, "none: masked-language modelling alone")]
    remedy = "give a Hugging Face folder of a masked language model, or the name of one on the hub"
    return [
        finding_of("teacher", lambda folder=folder: _compare(config, folder), remedy)  # type: ignore[misc]
        for folder in teacher_folders(config)
    ]


def _compare(config: Config, folder: TeacherFolder) -> str:
    device = kind_here()
    # fp16 also where only a CPU is at hand: it is what the GPUs of the run will compute in.
    dtype = TEACHER_DTYPES[config.model.teacher_dtype] or torch.float16
    ask_hub(folder)
    original = folder.model
    teacher = Teacher([running_copy(original, device, dtype)], names=[folder.name])
    length = config.data.sequence_length
    teacher.check_sequence_length(length)
    shape = (2, length) if device == "cuda" else (1, min(CPU_TOKENS, length))
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, teacher.vocab_size, shape, generator=generator).to(device)
    (report,) = check_teacher_precision(teacher, [original], input_ids)
    return str(report)


def check_recipe(config: Config, world_size: int) -> list[Finding]:
    """The engine's JSON, the shards against the batch, the student against its teacher.

    The shards, the teachers and the number of ranks have been found well before.
    """
    if config.training.micro_batch_size is None:
        config = fit_micro_batch(config, world_size)
    elif config.training.micro_batch_size == "auto":  # found on the GPUs; any number does here
        config = replace(config, training=replace(config.training, micro_batch_size=1))
    keys = "see model.* and objective.* in `launch/pretrain.py --help`"
    return [
        finding_of("engine", lambda: _engine(config, world_size), "see ds_configs/ for JSONs that work"),
        finding_of("steps", lambda: _steps(config, world_size), "make more shards, or give a smaller batch"),
        finding_of("held-out text", lambda: _heldout(config), "make the shards again"),
        finding_of("student", lambda: _student(config), keys),
    ]


def _engine(config: Config, world_size: int) -> str:
    device = kind_here()
    settings = engine_settings(engine_config_for(config, engine_template(config, device), world_size))
    source = config.deepspeed.config or f"ds_configs/{default_engine_config(device).name} (the default here)"
    return f"{source}: ZeRO stage {settings.stage}, {settings.precision}"


def _steps(config: Config, world_size: int) -> str:
    by_size = replace(config, data=replace(config.data, verify="size"))
    data = build_run_data(by_size, load_manifest(config.data.shards), world_size=world_size)
    schedule = build_schedule(config, data.total_steps)
    passes = data.epochs_before(data.total_steps)
    return f"{data.total_steps:,}, {passes:.2f} passes over the shards; warm-up {schedule['warmup_steps']:,} of them"


def _heldout(config: Config) -> str | Finding:
    manifest, length = load_manifest(config.data.shards), config.data.sequence_length
    missing = without_heldout_windows(config.data.shards, manifest, length)
    if missing is None:
        return f"{num_heldout_windows(manifest, length):,} windows of {length} tokens"
    what, _, remedy = missing.partition("; ")
    return Finding("held-out text", True, what, remedy)


def _student(config: Config) -> str:
    student = build_student(config, load_manifest(config.data.shards))
    teacher = None
    if config.objective.needs_teacher:
        # Compared by shape alone.
        small = replace(config, model=replace(config.model, teacher_dtype="bf16"))
        teacher = build_teacher(small, "cpu")
    build_objective(config.objective, student, teacher)
    check_sequence_length(student, config.data.sequence_length)
    family = family_of(student)
    return (
        f"{family.model_type}, {family.num_layers(student)} layers of width {family.width(student)}, "
        f"{count_parameters(student):,} parameters"
    )


def check_run(config: Config) -> Finding:
    """Is the run folder new, or one that this configuration goes on with?"""
    return finding_of("run", lambda: _run(config), "give another run.dir")


def _run(config: Config) -> str | Finding:
    folder = Path(config.run.dir)
    if not (folder / "config.yaml").exists():
        return f"{folder} is new"
    config = found_before(folder, config)
    changes = changed_config(folder, config)
    # The shipped JSON depends on whether there are GPUs, which this machine may lack.
    device = kind_here()
    inputs = {"deepspeed.config": engine_template(config, device)} if config.deepspeed.config else {}
    changes += changed_inputs(folder, {**read_corpus_digests(config.data.shards), **inputs})
    if (refused := refused_changes(config, changes)) is not None:
        return Finding("run", False, *refused)
    if read_summary(folder) is not None and not changes:
        return Finding("run", True, f"{folder} is finished", "nothing would be trained: give another run.dir")
    passed_over: list[str] = []
    found = newest_checkpoint(folder / "checkpoints", passed_over.append)
    if passed_over and found is None:
        remedy = f"restore one, or remove them all from {folder}/checkpoints to start again at step 0"
        return Finding("run", False, "\n".join(passed_over), remedy)
    goes_on = f"{folder} goes on from step {read_facts(found).step if found else 0}"
    if changes:
        goes_on += ", with another configuration:\n" + "\n".join(changes)
    return Finding("run", True, goes_on, "\n".join(passed_over))
