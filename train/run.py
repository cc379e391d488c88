"""One run from its configuration to its run folder: join the ranks, assemble, resume, train, export."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_prep.shard_format.files import write_json
from train.build import Inputs, Parts, assemble, read_inputs
from train.checkpointing.checkpoint import Checkpointer, Retention, newest_checkpoint
from train.checkpointing.resume import (
    choose_checkpoint,
    load_checkpoint,
    needs_conversion,
    refuse_other_optimizer,
)
from train.checkpointing.state import TrainState
from train.config import Config
from train.data.corpus import without_heldout_windows
from train.data.pipeline import fit_micro_batch
from train.distributed.consistency import (
    check_same_on_all_ranks,
    from_first_rank,
    on_first_rank,
    start_up_facts,
)
from train.distributed.heartbeat import Heartbeat
from train.distributed.launcher_watch import LauncherWatch
from train.distributed.signals import STOPPED_AFTER_SAVING, StopRequest
from train.distributed.world import World, join_world
from train.errors import NonFiniteError, UserError
from train.export.hugging_face import description_folder, export_checkpoint, save_student_description
from train.loop.closing_summary import closing_lines
from train.loop.divergence import (
    DivergedError,
    Rollback,
    all_left_out,
    disable_min_scale_error,
    diverged,
    read_rollbacks,
    write_rollbacks,
)
from train.loop.final_figures import final_figures, lacks_last_scores, lost_figures
from train.loop.loss_accumulator import LossSums
from train.loop.memory_errors import explained_memory_errors
from train.loop.metrics import Events, NoEvents, RunEvents, read_rows
from train.loop.observers.checkpoints import Checkpointing, StoppedAfterSavingError
from train.loop.observers.evaluation import Evaluating
from train.loop.observers.logged_figures import Logging
from train.loop.observers.overflows import Overflows
from train.loop.profiling import profiling
from train.loop.startup_timing import StartupReport, StartupTimer
from train.loop.timing import Clock
from train.loop.trackers import require_trackers
from train.loop.trainer import Observer
from train.models.build import count_parameters, origin_of, teacher_names
from train.models.cpu.precision import precision_remark
from train.run_folder import (
    MODEL,
    STUDENT,
    SUMMARY,
    as_tree,
    changed_config,
    changed_inputs,
    final_model,
    found_before,
    hold,
    link_student,
    provenance,
    read_summary,
    refuse_changes,
    write_configs,
)


def run(config: Config, launcher: tuple[int, int] | None = None) -> int:
    """Train to the end, or until a signal; the exit code: 0 done, 75 stopped after saving.

    Args:
        launcher: `launcher_chain` of this process's start; None for a launcher that is not watched.
    """
    startup = StartupTimer()
    startup.ended("imports")
    run_dir, asked = Path(config.run.dir), config.training.micro_batch_size
    world = join_world(config.deepspeed.log_level)
    startup.ended("joining_ranks")
    on_first_rank(world, lambda: require_trackers(config.run.trackers))
    # What lies in the run folder is rank 0's word, here and below: another host may see an older state of it.
    found, changes = from_first_rank(world, lambda: _compared_with_run(run_dir, config))
    if not isinstance(asked, int):
        size = found.training.micro_batch_size
        config = replace(config, training=replace(config.training, micro_batch_size=size))
        config = fit_micro_batch(config, world.world_size)
    settled, clock = config, Clock(world.device)
    # What may end a run from outside: a rank that is lost or stuck, memory that runs out, a signal, the launcher's end.
    lost, stuck = config.run.lost_rank_timeout_s, config.run.hang_timeout_s
    with (
        Heartbeat(world, clock.where, lost_rank_timeout_s=lost, hang_timeout_s=stuck),
        explained_memory_errors(lambda: settled, world, clock.where),
        StopRequest() as stop,
        LauncherWatch(stop, launcher),
        ExitStack() as opened,
    ):
        inputs = read_inputs(config, world.device)
        changes += from_first_rank(world, lambda: changed_inputs(run_dir, inputs.as_record()))
        refuse_changes(config, changes)
        on_first_rank(world, lambda: stop.when_asked(opened.enter_context(hold(run_dir))))
        say = functools.partial(print, flush=True) if world.is_first else lambda message: None
        checkpoint = choose_checkpoint(run_dir / "checkpoints", say)
        check_same_on_all_ranks(start_up_facts(config, inputs.corpus), world)
        refuse_other_optimizer(checkpoint, config.optimizer.name)
        universal = needs_conversion(checkpoint, world.world_size)
        resumed = checkpoint is not None
        parts = assemble(
            config, inputs, world, clock=clock, startup=startup, resumed=resumed, load_universal=universal
        )
        settled = parts.config
        for remark in _remarks(parts, inputs, asked):
            say(remark)
        state = load_checkpoint(parts.trainer.engine, checkpoint, world.world_size, say)
        disable_min_scale_error(parts.trainer.engine)
        if changes and state.step:
            say("going on with a changed configuration:\n  " + "\n  ".join(changes))
        startup.ended("checkpoint")
        if state.step >= parts.trainer.total_steps and from_first_rank(
            world, lambda: read_summary(run_dir) is not None
        ):
            say(f"{run_dir} is finished: {state.step} steps; give another run.dir to start anew")
            on_first_rank(world, lambda: _say_summary(run_dir))
            return 0
        try:
            others_until = state.step if changes else -1
            trained = _train_with_rollbacks(parts, inputs, state, world, stop, startup, others_until)
        except StoppedAfterSavingError:
            return STOPPED_AFTER_SAVING
        on_first_rank(world, lambda: finish(parts, run_dir, trained))
    on_first_rank(world, lambda: _say_summary(run_dir))
    dist.destroy_process_group()
    return 0


def _compared_with_run(run_dir: Path, config: Config) -> tuple[Config, list[str]]:
    """With the micro batch that an earlier start found; and what is otherwise than then, UserError where it may not."""
    config = found_before(run_dir, config)
    changes = changed_config(run_dir, config)
    refuse_changes(config, changes)
    return config, changes


def _remarks(parts: Parts, inputs: Inputs, asked: int | str | None) -> Iterator[str]:
    """What a user should know before the money is spent; `asked`: training.micro_batch_size as it was given."""
    config = parts.config
    nothing_held_out = without_heldout_windows(
        config.data.shards, inputs.manifest, config.data.sequence_length
    )
    if nothing_held_out is not None:
        yield f"warning: {nothing_held_out}"
    if not isinstance(asked, int):
        yield f"training.micro_batch_size: {config.training.micro_batch_size} sequences fit"
    if parts.frozen:
        yield (
            f"no term of the objective trains {len(parts.frozen)} of the student's parameters, from "
            f"{parts.frozen[0]} on: they stay as they are"
        )
    if parts.student.device.type == "cpu":
        remark = precision_remark([parts.student, *(parts.teacher.models if parts.teacher else ())])
        if remark is not None:
            yield remark


def _train_with_rollbacks(
    parts: Parts,
    inputs: Inputs,
    state: TrainState,
    world: World,
    stop: StopRequest,
    startup: StartupTimer,
    others_until: int,
) -> TrainState:
    """Train to the end, going back after each divergence that the recipe allows; the last state.

    Args:
        others_until: checkpoints of steps up to this are of another configuration: losses of another objective or
            another batch make no mean with those to come, and no measure for their spikes.
    """
    run_dir = Path(parts.config.run.dir)

    def left_out() -> tuple[int, ...]:
        return all_left_out(from_first_rank(world, lambda: read_rollbacks(run_dir)), state.left_out)

    next_start: TrainState | None = replace(state, left_out=left_out())
    while next_start is not None:
        parts.trainer.losses = LossSums(parts.trainer.micro_batches_per_step)
        if next_start.step > others_until:
            parts.trainer.losses.restore(next_start.losses, world.device)
        else:
            next_start = replace(next_start, loss_history=())  # or every loss might be a spike
        next_start = _train_or_go_back(parts, inputs, next_start, world, stop, startup)
    return replace(state, step=max(state.step, parts.trainer.total_steps), left_out=left_out())


def _train_or_go_back(
    parts: Parts, inputs: Inputs, state: TrainState, world: World, stop: StopRequest, startup: StartupTimer
) -> TrainState | None:
    """Train to the end; or the state that a rollback goes on from, where the run diverged."""
    events = on_first_rank(world, lambda: _open_run(parts, inputs, state)) or NoEvents()
    with closing(events):
        if state.left_out:
            events.say(
                f"left out: the batches of steps {', '.join(map(str, state.left_out))} (rollbacks.json)"
            )
        try:
            _train(parts, state, events, world, stop, startup)
        except StoppedAfterSavingError as stopped:
            events.say(str(stopped))
            raise
        except DivergedError as error:
            return _go_back(parts, state, error, world, events.say)
    return None


def _go_back(
    parts: Parts, state: TrainState, error: DivergedError, world: World, say: Callable[[str], None]
) -> TrainState:
    """Load the last checkpoint again, without the bad steps; raises the error where the recipe allows no more."""
    run_dir, engine = Path(parts.config.run.dir), parts.trainer.engine
    allowed = parts.config.run.rollback_on_divergence
    before = from_first_rank(world, lambda: read_rollbacks(run_dir))
    try:
        checkpoint = choose_checkpoint(run_dir / "checkpoints", say) if len(before) < allowed else None
    except UserError:  # none of them is whole
        checkpoint = None
    if checkpoint is None:
        raise error
    engine._config.load_universal_checkpoint = needs_conversion(checkpoint, world.world_size)
    loaded = load_checkpoint(engine, checkpoint, world.world_size, say)
    disable_min_scale_error(engine)
    entry = Rollback(error.done, loaded.step, error.bad_steps, str(error))
    on_first_rank(world, lambda: write_rollbacks(run_dir, [*before, entry]))
    say(
        f"rollback {len(before) + 1} of {allowed}: {error}\ngoing on after step {loaded.step} without the batches of "
        f"steps {', '.join(map(str, error.bad_steps))}"
    )
    return replace(loaded, left_out=all_left_out([entry], state.left_out))


def _open_run(parts: Parts, inputs: Inputs, state: TrainState) -> Events:
    """Write what describes the run, and open where its rows go; rollbacks have rows of their own."""
    run_dir = Path(parts.config.run.dir)
    write_configs(run_dir, parts.config, parts.engine_config, inputs.as_record())
    (run_dir / SUMMARY).unlink(missing_ok=True)  # of a run that had ended, and now goes on with more steps
    origin = origin_of(parts.config)
    save_student_description(run_dir, parts.student, parts.tokenizer_source, origin)
    events = RunEvents(
        run_dir,
        run_dir.name,
        state.step,
        parts.trainer.total_steps,
        parts.config.run.trackers,
        as_tree(parts.config),
    )
    logged = {row.get("rollback") for row in read_rows(run_dir)}
    for number, each in enumerate(read_rollbacks(run_dir), start=1):
        if number not in logged and each.continued_from_step <= state.step:
            figures = {
                "rollback_diverged_at_step": each.diverged_after_step,
                "rollback_left_out": len(each.left_out),
            }
            events.row(each.continued_from_step, {"rollback": number, **figures})
    return events


def _train(
    parts: Parts, state: TrainState, events: Events, world: World, stop: StopRequest, startup: StartupTimer
) -> TrainState:
    config, trainer, run_dir = parts.config, parts.trainer, Path(parts.config.run.dir)
    logging = Logging(trainer, events, config, parts.cost, state)
    evaluating = Evaluating(parts.score(), trainer, events, config.evaluation.every_steps)
    evaluating.before_first_step(state)
    if from_first_rank(world, lambda: lacks_last_scores(read_rows(run_dir), state, trainer.total_steps)):
        evaluating.after_step(state)
    if parts.heldout is not None:
        startup.ended("evaluation")
    checkpointer = Checkpointer(
        trainer.engine,
        run_dir / "checkpoints",
        Retention(config.checkpoint.keep_last, config.checkpoint.milestone_every_steps),
        description_folder(run_dir),
    )
    checkpointing = Checkpointing(
        checkpointer,
        trainer,
        config.checkpoint,
        events=events,
        stop=stop,
        spikes=logging.spikes,
        # Where no term predicts tokens, their loss does not say which checkpoint is the best.
        heldout_loss=evaluating.loss_at if config.objective.needs_masks else lambda step: None,
        first_step=state.step,
    )
    if config.run.rollback_on_divergence or trainer.total_steps == 0:
        checkpointing.before_first_step(state)
    overflows = Overflows(trainer.engine, config.run.stop_after_non_finite)
    profiled = profiling(run_dir / "profile", dist.get_rank(), config.run.profile_steps, events)
    with profiled as profilers:
        observers: list[Observer] = [
            StartupReport(startup, events),
            overflows,
            logging,
            evaluating,
            checkpointing,
        ]
        try:
            return trainer.train(state, [*observers, *profilers])
        except NonFiniteError as error:
            raise diverged(
                error, trainer, overflows.steps, checkpointing.newest_step, trainer.done
            ) from error


def finish(parts: Parts, run_dir: Path, state: TrainState) -> None:
    """Leave RUN/model/, after a distillation RUN/student, and RUN/summary.json; rank 0 alone calls this."""
    summary = summarise(parts, run_dir, state)
    if (lost := lost_figures(summary)) is not None:
        print(f"{run_dir}: {lost}", flush=True)
    checkpoint = newest_checkpoint(run_dir / "checkpoints", print)
    assert checkpoint is not None
    export_checkpoint(checkpoint, run_dir / MODEL, summary)
    if teacher_names(parts.config) or (run_dir / STUDENT).exists():
        link_student(run_dir)
    write_json(run_dir / SUMMARY, summary)


def _say_summary(run_dir: Path) -> None:
    summary = read_summary(run_dir)
    assert summary is not None
    print("\n".join(closing_lines(run_dir, final_model(run_dir), summary)), flush=True)


def summarise(parts: Parts, run_dir: Path, state: TrainState) -> dict[str, Any]:
    """The final figures of a run, and what it was made with."""
    data, every = parts.trainer.data, parts.config.run.log_every_steps
    figures = {
        **final_figures(read_rows(run_dir), state, data.tokens_before(state.step, state.left_out), every),
        "parameters": {"student": count_parameters(parts.student)},
        "device": parts.student.device.type,
        "model_flops_per_token": parts.cost.flops_per_token,
        "matrix_flops_per_s_of_a_rank": parts.cost.matrix_rate,
        "teacher": parts.config.model.teacher,
        "start_from": parts.config.model.start_from,
        "hub_names": parts.hub_names,
        "versions": provenance(),
    }
    if parts.teacher is not None:
        figures["parameters"]["teacher"] = sum(count_parameters(model) for model in parts.teacher.models)
    return json.loads(json.dumps(figures))
