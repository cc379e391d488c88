"""One run from its configuration to its run folder: join the ranks, assemble, resume, train, export."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist

from train.assembly import Parts, assemble
from train.checkpoint import TrainState, load_checkpoint, newest_checkpoint
from train.config import Config
from train.export import export_checkpoint, save_student_description
from train.metrics import Events, NoEvents, RunEvents, read_rows
from train.observers import (
    Checkpointing,
    Evaluating,
    Logging,
    Overflows,
    StoppedAfterSavingError,
)
from train.run_folder import hold, provenance, read_summary, refuse_changed_config, write_configs, write_json
from train.signals import STOPPED_AFTER_SAVING, StopRequest
from train.trainer import Observer
from train.world import World, join_world


def run(config: Config) -> int:
    """Train to the end, or until a signal.

    Returns:
        The exit code: 0 done, 75 stopped after saving.
    """
    run_dir = Path(config.run.dir)
    if not config.checkpoint.allow_changed_config:
        refuse_changed_config(run_dir, config)
    world = join_world(config.deepspeed.log_level)
    with StopRequest() as stop, ExitStack() as opened:
        if world.is_first:
            opened.enter_context(hold(run_dir))
        parts = assemble(config, world)
        state = _resume(parts, run_dir, world)
        total_steps = parts.trainer.schedule["total_steps"]
        if state.step >= total_steps and read_summary(run_dir) is not None:
            _say_on_first(
                world, f"{run_dir} is finished: {state.step} steps; give another run.dir to start anew"
            )
            return 0
        events: Events = NoEvents()
        if world.is_first:
            write_configs(run_dir, config, parts.engine_config)
            save_student_description(run_dir, parts.student, parts.tokenizer_source)
            events = RunEvents(run_dir, run_dir.name, state.step, total_steps)
        opened.callback(events.close)
        try:
            _train(config, parts, state, events, world, stop)
        except StoppedAfterSavingError as stopped:
            events.say(str(stopped))
            return STOPPED_AFTER_SAVING
    if world.is_first:
        finish(config, parts, run_dir)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _train(
    config: Config, parts: Parts, state: TrainState, events: Events, world: World, stop: StopRequest
) -> TrainState:
    trainer, total_steps = parts.trainer, parts.trainer.schedule["total_steps"]
    training = config.training
    observers: list[Observer] = [
        Overflows(trainer.engine, config.run.stop_after_non_finite),
        Logging(
            trainer,
            events,
            world,
            every_steps=config.run.log_every_steps,
            tokens_per_step=training.global_batch_size * config.data.sequence_length,
            flops_per_token=parts.flops_per_token,
            matrix_rate=parts.matrix_rate,
            first_step=state.step,
        ),
    ]
    if parts.heldout is not None:
        heldout, student, teacher = parts.heldout, parts.student, parts.teacher
        evaluating = Evaluating(
            lambda: heldout(student, teacher),
            events,
            trainer.clock,
            every_steps=config.evaluation.every_steps,
            total_steps=total_steps,
        )
        evaluating.before_first_step(state)
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
            keep_last=config.checkpoint.keep_last,
            total_steps=total_steps,
        )
    )
    return trainer.train(state, observers)


def _resume(parts: Parts, run_dir: Path, world: World) -> TrainState:
    """The state to start from; the engine is loaded from the newest complete checkpoint if there is one."""
    say: Callable[[str], None] = lambda message: _say_on_first(world, message)  # noqa: E731
    found = [newest_checkpoint(run_dir / "checkpoints", say) if world.is_first else None]
    if world.world_size > 1:
        dist.broadcast_object_list(found)  # ranks must not choose by what each of them sees
    if found[0] is None:
        return TrainState()
    say(f"continuing from {found[0]}")
    return load_checkpoint(parts.trainer.engine, found[0], world.world_size)


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


def count_parameters(model: Any) -> int:
    """Parameters of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _say_on_first(world: World, message: str) -> None:
    if world.is_first:
        print(message, flush=True)
