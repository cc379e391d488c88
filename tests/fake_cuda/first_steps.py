"""The first steps of a run: its parts are the real ones, up to DeepSpeed's engine and its communication."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from launch.common.cli import parse_config
from tests.fake_cuda.gpu import WORLD
from tests.fake_cuda.host_waits import FakeGpu, HostWaits
from tests.fake_cuda.triton_stand_in import import_kernels
from train import build
from train.checkpointing.state import TrainState
from train.loop.metrics import NoEvents
from train.loop.observers.evaluation import Evaluating
from train.loop.observers.logged_figures import Logging
from train.loop.observers.overflows import Overflows
from train.loop.startup_timing import StartupTimer
from train.loop.timing import Clock

LAUNCHES = import_kernels()
MICRO_BATCH_SEARCH = "train/loop/micro_batch.py:find_micro_batch_size"
BESIDE_UPDATES = {
    "train/loop/observers/logged_figures.py:after_step",
    "train/loop/observers/evaluation.py:_evaluate",
}


class Steps:
    """What the host waited for in each step's update, in what function, and how often."""

    def __init__(self, waits: HostWaits) -> None:
        self.waits = waits
        self.of_updates: list[Counter[tuple[str, str]]] = []

    def after_step(self, state: TrainState) -> None:
        found = [wait for wait in self.waits.taken() if not BESIDE_UPDATES.intersection(wait.stack)]
        self.of_updates.append(Counter((wait.stack[0], wait.kind) for wait in found))


def run(settings: Sequence[str], waits: HostWaits) -> dict[str, Any]:
    """Train to the end; no checkpoints.

    Args:
        settings: of launch/pretrain.py.
    Returns:
        updates: for each step, [function, what it waits for, how often].
        search: of a micro batch that fits: what it asks of the GPU's memory besides its trials.
        launches: names of the Triton kernels that the updates launched.
        devices: of all weights. dtypes: of the student's, of the teacher's and of the master weights.
        accumulation: micro batches in a step. groups: of the optimizer's parameters. skipped_steps: by the engine.
    """
    config = parse_config(settings, "")
    with FakeGpu(waits):
        inputs = build.read_inputs(config, WORLD.device)
        parts = build.assemble(config, inputs, WORLD, clock=Clock(WORLD.device), startup=StartupTimer())
        trainer, state, events = parts.trainer, TrainState(), NoEvents()
        engine, steps = trainer.engine, Steps(waits)
        evaluating = Evaluating(parts.score(), trainer, events, config.evaluation.every_steps)
        evaluating.before_first_step(state)
        of_search = (wait.kind for wait in waits.taken() if wait.stack[0] == MICRO_BATCH_SEARCH)
        search = [kind for kind in of_search if "cache" in kind or "memory" in kind]
        LAUNCHES.clear()
        logging = Logging(trainer, events, config, parts.cost, state)
        overflows = Overflows(engine, config.run.stop_after_non_finite)
        trainer.train(state, [steps, overflows, logging, evaluating])
    weights = {
        "student": list(engine.module.parameters()),
        "teacher": [each for model in parts.teacher.models for each in model.parameters()]
        if parts.teacher
        else [],
        "master": engine.optimizer.single_partition_of_fp32_groups,
    }
    return {
        "updates": [[(*what, count) for what, count in step.items()] for step in steps.of_updates],
        "search": search,
        "launches": list(LAUNCHES),
        "devices": sorted({str(each.device) for group in weights.values() for each in group}),
        "dtypes": {name: sorted({str(each.dtype) for each in group}) for name, group in weights.items()},
        "accumulation": engine.gradient_accumulation_steps(),
        "groups": len(engine.optimizer.param_groups),
        "skipped_steps": engine.skipped_steps,
    }
