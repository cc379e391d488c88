"""One run from its configuration to its run folder: join the ranks, assemble, resume, train, export."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_prep.shard_format.files import write_json
from train.build import Parts, assemble, engine_template, load_manifest
from train.checkpointing.checkpoint import Retention, TrainState, newest_checkpoint
from train.checkpointing.resume import agree_on_checkpoint, load_checkpoint, needs_conversion
from train.config import Config
from train.distributed.consistency import (
    as_on_first_rank,
    check_same_on_all_ranks,
    manifest_digest,
    on_first_rank,
    start_up_facts,
)
from train.distributed.heartbeat import Heartbeat
from train.distributed.launcher_watch import LauncherWatch
from train.distributed.signals import STOPPED_AFTER_SAVING, StopRequest
from train.distributed.world import World, join_world
from train.export.hugging_face import description_folder, export_checkpoint, save_student_description
from train.loop.communication import timed_collectives
from train.loop.loss_spikes import SpikeDetector
from train.loop.metrics import Events, NoEvents, RunEvents, read_rows
from train.loop.micro_batch import find_micro_batch_size
from train.loop.observers import (
    Checkpointing,
    Evaluating,
    Logging,
    Overflows,
    StoppedAfterSavingError,
)
from train.loop.profiling import profiling
from train.loop.startup_timing import StartUp, StartUpReport
from train.loop.timing import Clock
from train.loop.trainer import Observer
from train.models.build import count_parameters
from train.run_folder import (
    changed_config,
    changed_inputs,
    found_before,
    hold,
    provenance,
    read_summary,
    refuse_changes,
    write_configs,
)


def run(config: Config) -> int:
    """Train to the end, or until a signal.

    Returns:
        The exit code: 0 done, 75 stopped after saving.
    """
    start_up = StartUp()
    start_up.ended("imports")
    run_dir = Path(config.run.dir)
    config = found_before(run_dir, config)
    changes = changed_config(run_dir, config)
    may_change = config.checkpoint.allow_changed_config
    refuse_changes(run_dir, [] if may_change else changes)
    world = join_world(config.deepspeed.log_level)
    start_up.ended("joining_ranks")
    clock = Clock(world.device)
    with (
        Heartbeat(
            world,
            clock.where,
            lost_rank_timeout_s=config.run.lost_rank_timeout_s,
            hang_timeout_s=config.run.hang_timeout_s,
        ),
        StopRequest() as stop,
        LauncherWatch(stop),
        ExitStack() as opened,
    ):
        inputs: dict[str, Any] = {
            "data.shards": manifest_digest(config.data.shards),
            "deepspeed.config": engine_template(config, world),
        }
        changes += changed_inputs(run_dir, inputs)
        refuse_changes(run_dir, [] if may_change else changes)
        on_first_rank(world, lambda: stop.when_asked(opened.enter_context(hold(run_dir))))
        say = print_on_first(world)
        checkpoint = agree_on_checkpoint(run_dir / "checkpoints", say)
        check_same_on_all_ranks(start_up_facts(config, inputs["data.shards"]), world)
        config = _with_micro_batch_size(config, world, inputs["deepspeed.config"], say)
        universal = needs_conversion(checkpoint, world.world_size)
        parts = assemble(config, world, clock, start_up, load_universal=universal)
        state = load_checkpoint(parts.trainer.engine, checkpoint, world.world_size, say)
        if as_on_first_rank(changes) and state.step:
            say("going on with a changed configuration:\n  " + "\n  ".join(changes))
        else:  # losses of another objective or another batch make no mean with those to come
            parts.trainer.losses.restore(state.losses, world.rank, world.world_size, world.device)
        start_up.ended("checkpoint")
        total_steps = parts.trainer.schedule["total_steps"]
        # Decided by rank 0: another host may see an older state of a shared folder.
        if as_on_first_rank(state.step >= total_steps and read_summary(run_dir) is not None):
            say(f"{run_dir} is finished: {state.step} steps; give another run.dir to start anew")
            return 0
        events = on_first_rank(world, lambda: _open_run(config, parts, inputs, state)) or NoEvents()
        opened.callback(events.close)
        try:
            _train(config, parts, state, events, world, stop, start_up)
        except StoppedAfterSavingError as stopped:
            events.say(str(stopped))
            return STOPPED_AFTER_SAVING
        on_first_rank(world, lambda: finish(config, parts, run_dir))
    dist.destroy_process_group()
    return 0


def _with_micro_batch_size(
    config: Config, world: World, template: dict[str, Any], say: Callable[[str], None]
) -> Config:
    """`config`, in which "auto" is replaced by what fits."""
    if config.training.micro_batch_size != "auto":
        return config
    config = find_micro_batch_size(config, load_manifest(config.data.shards), world, template)
    say(f"training.micro_batch_size: {config.training.micro_batch_size} sequences fit")
    return config


def _open_run(config: Config, parts: Parts, inputs: Mapping[str, Any], state: TrainState) -> Events:
    """Write what describes the run, and open where its rows go."""
    run_dir = Path(config.run.dir)
    write_configs(run_dir, config, parts.engine_config, inputs)
    save_student_description(run_dir, parts.student, parts.tokenizer_source)
    return RunEvents(run_dir, run_dir.name, state.step, parts.trainer.schedule["total_steps"])


def _train(
    config: Config,
    parts: Parts,
    state: TrainState,
    events: Events,
    world: World,
    stop: StopRequest,
    start_up: StartUp,
) -> TrainState:
    trainer, total_steps = parts.trainer, parts.trainer.schedule["total_steps"]
    spikes = SpikeDetector(config.run.spike_deviations, state.loss_history)
    observers: list[Observer] = [
        Overflows(trainer.engine, config.run.stop_after_non_finite),
        Logging(
            trainer,
            events,
            world,
            every_steps=config.run.log_every_steps,
            flops_per_token=parts.flops_per_token,
            matrix_rate=parts.matrix_rate,
            term_weights=config.objective.term_weights(),
            spikes=spikes,
            first_step=state.step,
        ),
    ]
    evaluating = _evaluating(config, parts, events, total_steps)
    if evaluating is not None:
        evaluating.before_first_step(state)
        start_up.ended("evaluation")
        observers.append(evaluating)
    observers.append(
        Checkpointing(
            trainer.engine,
            Path(config.run.dir, "checkpoints"),
            events,
            trainer.clock,
            world,
            stop,
            every_steps=config.checkpoint.every_steps,
            retention=Retention(config.checkpoint.keep_last, config.checkpoint.milestone_every_steps),
            stop_after_failures=config.checkpoint.stop_after_failures,
            total_steps=total_steps,
            heldout=evaluating.loss_at if evaluating is not None else lambda step: None,
            description=description_folder(Path(config.run.dir)),
            losses=trainer.losses,
            spikes=spikes,
        )
    )
    profile_dir = Path(config.run.dir, "profile")
    with (
        timed_collectives(trainer.clock),
        profiling(profile_dir, world.rank, config.run.profile_steps, events) as profilers,
    ):
        return trainer.train(state, [StartUpReport(start_up, events), *observers, *profilers])


def _evaluating(config: Config, parts: Parts, events: Events, total_steps: int) -> Evaluating | None:
    if parts.heldout is None:
        return None
    heldout, student, teacher = parts.heldout, parts.student, parts.teacher
    return Evaluating(
        lambda: heldout(student, teacher),
        events,
        parts.trainer.clock,
        every_steps=config.evaluation.every_steps,
        total_steps=total_steps,
    )


def finish(config: Config, parts: Parts, run_dir: Path) -> None:
    """Leave RUN/student/ and RUN/summary.json; rank 0 alone calls this."""
    summary = summarise(config, parts, run_dir)
    checkpoint = newest_checkpoint(run_dir / "checkpoints", print)
    assert checkpoint is not None
    export_checkpoint(checkpoint, run_dir / "student", summary)
    write_json(run_dir / "summary.json", summary)


def summarise(config: Config, parts: Parts, run_dir: Path) -> dict[str, Any]:
    """The final figures of a run, from its own metrics.jsonl."""
    rows = read_rows(run_dir)
    heldout = [row for row in rows if "heldout_mlm_loss" in row]
    logged = [row for row in rows if "tokens_per_s" in row]
    figures = {
        "steps": rows[-1]["step"],
        "tokens": logged[-1]["tokens"],
        "loss": logged[-1]["loss"],
        "tokens_per_s": sorted(row["tokens_per_s"] for row in logged)[len(logged) // 2],
        "parameters": {"student": count_parameters(parts.student)},
        "device": parts.student.device.type,
        "model_flops_per_token": parts.flops_per_token,
        "matrix_flops_per_s_of_a_rank": parts.matrix_rate,
        "heldout_before": {key: value for key, value in heldout[0].items() if key != "step"}
        if heldout
        else {},
        "heldout": {key: value for key, value in heldout[-1].items() if key != "step"} if heldout else {},
        "teacher": config.model.teacher,
        "versions": provenance(),
    }
    if parts.teacher is not None:
        figures["parameters"]["teacher"] = sum(count_parameters(model) for model in parts.teacher.models)
    return json.loads(json.dumps(figures))


def print_on_first(world: World) -> Callable[[str], None]:
    """Print on rank 0; nothing elsewhere."""
    return (lambda message: print(message, flush=True)) if world.is_first else (lambda message: None)
