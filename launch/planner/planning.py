"""A plan of a run: from its recipe and the machines to memory, time and money. No model, no GPU is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from launch.planner.cost import (
    PUBLISHED_RUNS,
    REFERENCE_RUN,
    Machines,
    PublishedRun,
    StepTime,
    Traffic,
    step_time,
    traffic,
)
from launch.planner.memory import GIB, memory_parts
from launch.planner.workload import Recipe
from train.data.order import check_fit, num_lanes

CURVE_GPUS = tuple(2**power for power in range(11))
V100_TFLOPS = 125.0
"""Published runs are compared in hours of this."""


@dataclass(frozen=True)
class Plan:
    """One recipe on one set of machines."""

    recipe: Recipe
    machines: Machines
    accumulation: int
    memory: dict[str, int]
    """Bytes of one GPU by part."""
    sent: Traffic
    time: StepTime
    """Of a step at the full sequence length."""
    run_s: float
    """Of the whole run, seconds."""

    @property
    def memory_gib(self) -> float:
        return sum(self.memory.values()) / GIB

    @property
    def tokens_per_s(self) -> float:
        """Mean of the run."""
        return self.recipe.tokens / self.run_s

    @property
    def hours(self) -> float:
        return self.run_s / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.machines.world_size


def make_plan(recipe: Recipe, machines: Machines) -> Plan:
    """The plan for machines that the data order must fit.

    Raises:
        UserError: the number of GPUs does not fit the recipe; the message lists the numbers that do.
    """
    accumulation = check_fit(
        recipe.global_batch_size, recipe.lanes, machines.world_size, recipe.micro_batch_size
    )
    sent = traffic(recipe.student, recipe.engine, machines.world_size, accumulation)
    times = [_step_time(recipe, machines, sent, length) for _, length in recipe.phases]
    run_s = sum(steps * time.total for (steps, _), time in zip(recipe.phases, times, strict=True))
    memory = memory_parts(recipe.step_on(machines.world_size, recipe.micro_batch_size, accumulation))
    return Plan(recipe, machines, accumulation, memory, sent, times[-1], run_s)


def _step_time(recipe: Recipe, machines: Machines, sent: Traffic, sequence_length: int) -> StepTime:
    return step_time(
        recipe.flops_at(sequence_length),
        sent,
        machines,
        recipe.engine,
        tokens_per_gpu=recipe.global_batch_size * sequence_length / machines.world_size,
        num_buckets=-(-recipe.student.parameters // recipe.engine.reduce_bucket_size),
    )


def fitting_micro_batch(recipe: Recipe, world_size: int, memory_gib: float) -> int | None:
    """The largest micro batch with which this number of GPUs fits both the recipe and a GPU's memory."""
    share = recipe.global_batch_size // world_size
    for micro in range(min(share, 1024), 0, -1):
        if share % micro == 0:
            needed = sum(memory_parts(recipe.step_on(world_size, micro, share // micro)).values())
            if needed <= memory_gib * GIB:
                return micro
    return None


def scaling_curve(recipe: Recipe, machines: Machines) -> list[Plan]:
    """The same recipe on 1, 2, 4, ... 1,024 such GPUs, nodes filled one after the other.

    Where the share of a GPU is smaller than the micro batch, the micro batch shrinks with it; where the recipe has
    fewer lanes than GPUs, as many lanes as GPUs are planned (see `needs_lanes`).
    """
    plans = []
    for gpus in CURVE_GPUS:
        if recipe.global_batch_size % gpus or (
            gpus > machines.gpus_per_node and gpus % machines.gpus_per_node
        ):
            continue
        share = recipe.global_batch_size // gpus
        micro = max(m for m in range(1, recipe.micro_batch_size + 1) if share % m == 0)
        lanes = gpus if needs_lanes(recipe, gpus) else recipe.lanes
        inside = min(gpus, machines.gpus_per_node)
        plans.append(
            make_plan(
                replace(recipe, micro_batch_size=micro, lanes=lanes),
                replace(machines, nodes=gpus // inside, gpus_per_node=inside),
            )
        )
    return plans


def needs_lanes(recipe: Recipe, gpus: int) -> bool:
    """Whether this many GPUs need another data.lanes, which changes the order of the data."""
    return num_lanes(recipe.global_batch_size, recipe.lanes) % gpus != 0


def comparison(plan: Plan) -> list[dict[str, Any]]:
    """This run beside the published ones: work, hours on V100 at the plan's efficiency, and as published."""
    recipe, mfu = plan.recipe, plan.machines.mfu

    def work(name: str, tokens: float, flops: float) -> dict[str, Any]:
        return {
            "name": name,
            "tokens": tokens,
            "flops": flops,
            "v100_hours_at_mfu": flops / (mfu * V100_TFLOPS * 1e12) / 3600,
            "published_gpu_hours": None,
            "published_mfu": None,
            "share_of_flops": flops / REFERENCE_RUN.flops,
            "share_of_gpu_hours": None,
            "share_of_gib_hours": None,
            "source": "",
        }

    def published(run: PublishedRun) -> dict[str, Any]:
        row = {**work(run.name, run.tokens, run.flops), "source": run.source}
        hours, reference = run.gpu_hours, REFERENCE_RUN
        assert reference.gpu_hours is not None
        if hours is not None:
            row["published_gpu_hours"] = hours
            row["share_of_gpu_hours"] = hours / reference.gpu_hours
            row["share_of_gib_hours"] = hours * run.gpu_gib / (reference.gpu_hours * reference.gpu_gib)
        if hours is not None and run.hours_of_phases:
            row["published_mfu"] = run.flops / (hours * 3600 * V100_TFLOPS * 1e12)
        return row

    return [work("this recipe", recipe.tokens, recipe.total_flops), *map(published, PUBLISHED_RUNS)]


def as_json(plan: Plan, curve: Sequence[Plan], price: float | None) -> dict[str, Any]:
    """All figures of a plan, its curve and the comparison, as JSON holds them."""

    def summary(each: Plan) -> dict[str, Any]:
        return {
            "gpus": each.machines.world_size,
            "micro_batch_size": each.recipe.micro_batch_size,
            "accumulation": each.accumulation,
            "memory_gib": each.memory_gib,
            "step_s": each.time.total,
            "communication_s": each.time.communication,
            "exposed_communication_s": each.time.exposed,
            "bytes_sent_per_gpu_and_step": each.sent.per_step,
            "tokens_per_s": each.tokens_per_s,
            "days": each.hours / 24,
            "gpu_hours": each.gpu_hours,
            "cost": None if price is None else each.gpu_hours * price,
        }

    recipe = plan.recipe
    return {
        **summary(plan),
        "memory_bytes": plan.memory,
        "machines": asdict(plan.machines),
        "student": asdict(recipe.student),
        "teachers": [asdict(each) for each in recipe.teachers],
        "flops_per_token": asdict(recipe.flops),
        "steps": recipe.steps,
        "tokens": recipe.tokens,
        "curve": [summary(each) for each in curve],
        "comparison": comparison(plan),
    }
