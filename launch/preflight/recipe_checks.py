"""What launch/doctor.py asks of the recipe, once: would launch/pretrain.py refuse it, or go on with what it finds?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from launch.preflight.checks import Finding
from launch.preflight.local_checks import failed, told
from train.config import Config


def check_recipe(config: Config, world_size: int) -> list[Finding]:
    """The engine's JSON, the shards against the batch, the student against its teacher; nothing is trained.

    The shards, the teachers and the number of ranks have been found well before (launch/preflight/local_checks.py).
    """
    if config.training.micro_batch_size == "auto":  # found on the GPUs; any number does here
        config = replace(config, training=replace(config.training, micro_batch_size=1))
    return [
        told("engine", lambda: _engine(config, world_size), "see ds_configs/ for JSONs that work"),
        told("steps", lambda: _steps(config, world_size), "make more shards, or give a smaller batch"),
        told(
            "student", lambda: _student(config), "see model.* and objective.* in `launch/pretrain.py --help`"
        ),
    ]


def check_run(config: Config) -> Finding:
    """Is the run folder new, or one that this configuration goes on with?"""
    try:
        return _run(config)
    except (ValueError, OSError) as error:
        return failed("run", error, "give another run.dir")


def _run(config: Config) -> Finding:
    import torch

    from train.build import engine_template
    from train.checkpointing.checkpoint import newest_checkpoint, read_facts
    from train.distributed.consistency import manifest_digest
    from train.distributed.world import World
    from train.run_folder import changed_config, changed_inputs, found_before, read_summary

    folder = Path(config.run.dir)
    if not (folder / "config.yaml").exists():
        return Finding("run", True, f"{folder} is new")
    config = found_before(folder, config)
    changes = changed_config(folder, config)
    # The shipped JSON depends on whether there are GPUs, which this machine may lack.
    here = World(0, 0, 1, 1, "cuda" if torch.cuda.is_available() else "cpu")
    inputs = {"deepspeed.config": engine_template(config, here)} if config.deepspeed.config else {}
    changes += changed_inputs(folder, {"data.shards": manifest_digest(config.data.shards), **inputs})
    if changes and not config.checkpoint.allow_changed_config:
        return Finding(
            "run",
            False,
            f"{folder} holds a run that was started with another configuration:\n" + "\n".join(changes),
            "give another run.dir, restore what was, or --checkpoint.allow_changed_config=true to go on anyway",
        )
    if read_summary(folder) is not None and not changes:
        return Finding("run", True, f"{folder} is finished", "nothing would be trained: give another run.dir")
    passed_over: list[str] = []
    found = newest_checkpoint(folder / "checkpoints", passed_over.append)
    goes_on = f"{folder} goes on from step {read_facts(found)['step'] if found else 0}"
    if changes:
        goes_on += ", with another configuration:\n" + "\n".join(changes)
    return Finding("run", True, goes_on, "\n".join(passed_over))


def _engine(config: Config, world_size: int) -> str:
    import torch

    from train.build import engine_config_for
    from train.distributed.world import World
    from train.engine_config import default_engine_config, engine_settings

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = engine_settings(engine_config_for(config, World(0, 0, world_size, 1, device)))
    source = config.deepspeed.config or f"ds_configs/{default_engine_config(device).name} (the default here)"
    return f"{source}: ZeRO stage {settings.stage}, {settings.precision}"


def _steps(config: Config, world_size: int) -> str:
    from train.build import load_manifest
    from train.data.pipeline import build_run_data, build_schedule

    by_size = replace(config, data=replace(config.data, verify="size"))
    data = build_run_data(by_size, load_manifest(config.data.shards), world_size=world_size)
    schedule = build_schedule(config, data.total_steps)
    passes = data.epochs_before(data.total_steps)
    return f"{data.total_steps:,}, {passes:.2f} passes over the shards; warm-up {schedule['warmup_steps']:,} of them"


def _student(config: Config) -> str:
    import torch

    from train.build import load_manifest
    from train.models.build import (
        build_objective,
        build_student,
        check_sequence_length,
        count_parameters,
        needs_teacher,
        teacher_names,
    )
    from train.models.families import family_of
    from train.models.teacher import load_teacher

    student = build_student(config, load_manifest(config.data.shards))
    teacher = None
    if needs_teacher(config):
        teacher = load_teacher(
            teacher_names(config),
            dtype=torch.bfloat16,  # compared by shape alone
            weights=config.model.teacher_weights,
            output_hidden_states=config.objective.layer_cosine_weight > 0,
        )
    build_objective(config, student, teacher)
    check_sequence_length(student, config.data.sequence_length)
    family = family_of(student)
    return (
        f"{family.model_type}, {family.num_layers(student)} layers of width {family.width(student)}, "
        f"{count_parameters(student):,} parameters"
    )
