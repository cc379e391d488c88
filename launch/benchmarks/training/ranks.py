"""One rank of a measured run: started by the launcher, with a JSON file that says what to measure.

It joins the other ranks and assembles trainers as train/run.py does. Rank 0 leaves the figures beside that file.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import torch.distributed as dist

from data_prep.shard_format.files import write_json
from launch.benchmarks.floor import BestTimes, Product, measured_bandwidth
from launch.benchmarks.lamb import LAMB_BYTES
from launch.benchmarks.options import Shape
from launch.benchmarks.products import products_of
from launch.benchmarks.training.checkpoint import measured_checkpoint
from launch.benchmarks.training.clock import NestedClock, collectives_counted, divide
from launch.benchmarks.training.plain import make_plain
from launch.common.cli import parse_config
from train.build import Parts, assemble, read_inputs
from train.checkpointing.state import TrainState
from train.data.pipeline import fit_micro_batch
from train.distributed.launcher_watch import LauncherWatch, launcher_chain
from train.distributed.signals import StopRequest
from train.distributed.world import World, join_world
from train.loop.metrics import Events, NoEvents, RunEvents
from train.loop.observers.logged_figures import Logging
from train.loop.observers.overflows import Overflows
from train.loop.profiling import SKIPPED_STEPS, profiling
from train.loop.startup_timing import StartupTimer
from train.loop.trainer import Observer
from train.models.build import count_parameters
from train.models.flops import shape_of
from train.objective.build import relation_layers

ROUND_S = 1.0
"""Steps are made for so long, before others have their turn."""
TRACED_STEPS = 3


class _EndOfRound(Exception):
    pass


class _EndsAtOnce(StopRequest):
    """There is nothing to save where the launcher has been killed."""

    def ask(self) -> None:
        os._exit(1)


class _Stops:
    """Ends a round after some steps."""

    def __init__(self) -> None:
        self.left, self.state = 0, TrainState()

    def after_step(self, state: TrainState) -> None:
        self.state, self.left = state, self.left - 1
        if self.left <= 0:
            raise _EndOfRound


class Contender:
    """A trainer with its observers, which makes some steps at a time."""

    def __init__(self, settings: Sequence[str], world: World, folder: Path, plain: bool) -> None:
        config = fit_micro_batch(parse_config(settings, ""), world.world_size)
        self.clock = NestedClock(world.device)
        inputs = read_inputs(config, world.device)
        self.parts = assemble(config, inputs, world, clock=self.clock, startup=StartupTimer())
        trainer = self.parts.trainer
        if plain:
            make_plain(self.parts)
        endless = trainer.data.batches(0, trainer.total_steps)
        trainer.data.batches = lambda start_step, stop_step: endless  # type: ignore[method-assign]
        divide(trainer, self.clock)
        folder.mkdir(parents=True, exist_ok=True)
        self.events: Events = (
            RunEvents(folder, folder.name, 0, trainer.total_steps) if world.is_first else NoEvents()
        )
        logging = Logging(trainer, self.events, config, self.parts.cost, TrainState())
        logging.after_step = self.clock.timed("metrics", logging.after_step)  # type: ignore[method-assign]
        self._observers: list[Observer] = [
            Overflows(trainer.engine, config.run.stop_after_non_finite),
            logging,
        ]
        self._stops, self._counts = _Stops(), world.device == "cpu" and world.world_size > 1
        self.seconds: list[float] = []
        self.shares: list[dict[str, float]] = []

    def round(self, steps: int, more: Sequence[Observer] = ()) -> float:
        """Make some steps; seconds of one of them."""
        dist.barrier()
        self.clock.begin()
        self._stops.left, start = steps, time.perf_counter()
        counted = collectives_counted(self.clock) if self._counts else nullcontext()
        try:
            with counted:
                self.parts.trainer.train(self._stops.state, [*self._observers, *more, self._stops])
        except _EndOfRound:
            pass
        self.clock.read()  # waits for a GPU
        took = (time.perf_counter() - start) / steps
        self.seconds.append(took)
        parts = {name: seconds / steps / took for name, seconds in self.clock.totals.items()}
        self.shares.append({**parts, "rest": 1 - sum(parts.values())})
        return took


def step_products(parts: Parts, shape: Shape, num_masked: int) -> list[Product]:
    """Of one micro batch."""
    settings, student = parts.config.objective, shape_of(parts.student)
    teachers = [shape_of(model) for model in parts.teacher.models] if parts.teacher else []
    return products_of(
        student,
        teachers,
        shape,
        attention_heads=parts.student.config.num_attention_heads,
        decoded=shape.length if settings.soft_targets == "all" else num_masked,
        relations=relation_layers(settings, student.layers, [each.layers for each in teachers]),
    )


def unavoidable_bytes(parameters: int, ranks: int) -> float:
    """Memory traffic of one rank: LAMB over its partition, and what of gradients and weights crosses between ranks."""
    return LAMB_BYTES * parameters / ranks + 2 * 4 * parameters * (ranks - 1) / ranks


def measured_steps(spec: dict[str, Any], world: World, folder: Path) -> dict[str, Any]:
    """Contenders in turns, the floor's products and the bandwidth between their rounds."""
    contenders = {
        name: Contender(settings, world, folder / name, name == "plain")
        for name, settings in spec["contenders"].items()
    }
    ours, shape = contenders["ours"], Shape(*spec["shape"])
    phase = ours.parts.trainer.data.phases[0]
    accumulation = ours.parts.trainer.engine.gradient_accumulation_steps()
    products = step_products(ours.parts, shape, phase.masker.num_masked)
    best, bandwidth = BestTimes(world.device, next(ours.parts.student.parameters()).dtype), 0.0
    steps = {name: _agreed(math.ceil(ROUND_S / _warmed_up(each))) for name, each in contenders.items()}
    for _ in range(spec["rounds"]):
        dist.barrier()
        best.measure(products)
        bandwidth = max(bandwidth, measured_bandwidth(world.device))
        for name, contender in contenders.items():
            contender.round(steps[name])
    parameters = count_parameters(ours.parts.student)
    floor_s = {
        "products": accumulation * best.floor(products),
        "bytes": unavoidable_bytes(parameters, world.world_size) / bandwidth,
    }
    floors: list[Any] = [None] * world.world_size
    dist.all_gather_object(floors, floor_s)
    found = min(floors, key=lambda each: sum(each.values()))
    if spec["profile"]:
        with profiling(Path(spec["profile"]), world.rank, TRACED_STEPS, ours.events) as observers:
            ours.round(SKIPPED_STEPS + TRACED_STEPS + 1, observers)
        ours.seconds.pop()
        ours.shares.pop()
    tokens = shape.batch * shape.length * accumulation * world.world_size
    rows = {name: _row(each, tokens) for name, each in contenders.items()}
    others = [row["step_s"] for name, row in rows.items() if name != "ours"]
    return {
        "runs": rows,
        "threads": torch.get_num_threads(),
        "gflop": accumulation * sum(product.flops for product in products) / 1e9,
        "bandwidth_gb_per_s": bandwidth / 1e9,
        "floor_s": found,
        "share_of_floor": sum(found.values()) / rows["ours"]["step_s"],
        "best_share_of_floor": sum(found.values()) / rows["ours"]["best_s"],
        "ratio": others[0] / rows["ours"]["step_s"] if others else None,
    }


def _warmed_up(contender: Contender) -> float:
    contender.round(2)
    seconds = contender.round(1)
    contender.seconds, contender.shares = [], []
    return seconds


def _agreed(steps: int) -> int:
    """Rank 0's number."""
    found = [steps]
    dist.broadcast_object_list(found)
    return found[0]


def _row(contender: Contender, tokens: int) -> dict[str, Any]:
    seconds = statistics.median(contender.seconds)
    parts = {name: 0.0 for shares in contender.shares for name in shares}
    for name in parts:
        parts[name] = statistics.mean(shares.get(name, 0.0) for shares in contender.shares)
    return {
        "tokens_per_s": tokens / seconds,
        "step_s": seconds,
        "best_s": min(contender.seconds),
        "all_s": contender.seconds,
        "shares": parts,
    }


def main(spec_file: str) -> int:
    """Measure what the file says; `spec_file`.out holds the figures."""
    spec = json.loads(Path(spec_file).read_text())
    if spec.get("processor_time"):
        os.environ["OMP_NUM_THREADS"] = "1"  # join_world reads it
        time.perf_counter = time.process_time
    with LauncherWatch(_EndsAtOnce(), launcher_chain()):
        world, folder = join_world(), Path(spec["folder"])
        if spec["kind"] == "step":
            figures = measured_steps(spec, world, folder)
        else:
            contender = Contender(spec["contenders"]["ours"], world, folder / "ours", plain=False)
            contender.round(2)
            figures = measured_checkpoint(contender.parts, folder, world)
    if world.is_first:
        write_json(Path(f"{spec_file}.out"), figures)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[-1]))
