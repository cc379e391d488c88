"""The plan's memory and traffic against real DeepSpeed engines on one and two gloo ranks.

python -m tests.distributed.test_plan_memory [base]      prints what is measured beside what is predicted
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from launch.planner.cost import traffic
from launch.planner.memory import Step, memory_parts, model_state_bytes
from launch.planner.models import PlannedModel
from tests.distributed.ranks.harness import run_ranks
from train.config_sections.objective import ObjectiveConfig
from train.engine_config import engine_settings

# (family, precision, ZeRO stage, accumulation); bf16 with fp32 accumulation is laid out as fp16 on a GPU is.
CASES = [("bert", "bf16", 2, 2), ("roberta", "fp32", 2, 2), ("bert", "fp32", 2, 1), ("bert", "fp32", 1, 2)]
ONE_RANK = CASES[:2]


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    """What every rank of every case counted."""
    target = "tests.distributed.workers.plan:measure_all"
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run_ranks, target, *arguments) for arguments in ((1, ONE_RANK), (2, CASES))]
    return [found for run in runs for each in run.result() for found in each]


def test_model_state_is_exact(measured: list[dict[str, Any]]) -> None:
    assert len(measured) == 2 + 2 * 4
    for found in measured:
        predicted = model_state_bytes(step_of(found))
        assert predicted == {name: found[name] for name in predicted}


def test_accumulated_gradients(measured: list[dict[str, Any]]) -> None:
    """Exact where they are accumulated in fp32 beside bf16; never less than what is held elsewhere."""
    for found in measured:
        predicted = memory_parts(step_of(found))["gradients, fp32 accumulation"]
        if "bf16" in found["config"]:
            assert predicted == found["gradients"]
        else:
            assert found["gradients"] <= predicted + 8  # ZeRO's padding


def test_traffic_is_exact(measured: list[dict[str, Any]]) -> None:
    """What collectives were given in one step; on a ring a GPU sends 2 (W - 1) / W and (W - 1) / W of it."""
    for found in measured:
        step = step_of(found)
        sent = traffic(step.student, step.engine, step.world_size, step.accumulation)
        ring = (step.world_size - 1) / step.world_size
        assert sent.gradients_per_reduction * sent.reductions == pytest.approx(2 * ring * found["reduced"])
        assert sent.weights == pytest.approx(ring * found["gathered"], rel=1e-3)  # ZeRO's padding


def test_peak_of_a_whole_step(measured: list[dict[str, Any]]) -> None:
    """All parts together against the most bytes of tensors that were alive at once: within 5 %."""
    for found in measured:
        planned = sum(memory_parts(step_of(found)).values())
        assert planned == pytest.approx(found["peak"], rel=0.05), found["config"]


def step_of(found: dict[str, Any]) -> Step:
    """What workers/plan.py ran: a CPU keeps dropout masks in the activations' format, and an fp32 teacher."""
    engine = engine_settings(found["config"])
    return Step(
        **found["step"],
        student=PlannedModel(**found["student"]),
        teachers=(PlannedModel(**found["teacher"]),),
        objective=ObjectiveConfig(),
        engine=engine,
        teacher_bytes_per_element=4,
        on_gpu=False,
        dropout_mask_bytes=engine.bytes_per_element,
    )


def main() -> None:
    """Print measured and predicted MB."""
    cases: list[tuple[Any, ...]] = [("bert", "fp32", 2, 2, "base")] if "base" in sys.argv else list(CASES)
    for ranks in (1, 2):
        results = run_ranks("tests.distributed.workers.plan:measure_all", ranks, cases, timeout_s=900)[0]
        for case, found in zip(cases, results, strict=True):
            parts = memory_parts(step_of(found))
            names = [name for name in found if name in parts]
            pairs = {name: (found[name], parts[name]) for name in names}
            pairs["accumulated gradients"] = (found["gradients"], parts["gradients, fp32 accumulation"])
            pairs["peak of a step"] = (found["peak"], sum(parts.values()))
            print(f"{ranks} rank(s), family, precision, ZeRO stage, accumulation: {case}")
            for name, (measured_bytes, predicted) in pairs.items():
                ratio = predicted / measured_bytes
                print(f"  {name:24}{measured_bytes / 1e6:12.4f}{predicted / 1e6:12.4f} MB{ratio:8.3f}")


if __name__ == "__main__":
    main()
