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
from tests.distributed.harness import run_ranks
from tests.distributed.plan_sizes import SIZES
from train.config import ObjectiveConfig
from train.engine_config import engine_settings

# (family, precision, ZeRO stage, accumulation); bf16 with fp32 accumulation is laid out as fp16 on a GPU is.
CASES = [("bert", "bf16", 2, 2), ("roberta", "fp32", 2, 2), ("bert", "fp32", 2, 1), ("bert", "fp32", 1, 2)]
ONE_RANK = CASES[:2]


@pytest.fixture(scope="module")
def measured() -> list[tuple[int, tuple[str, str, int, int], dict[str, Any]]]:
    """(ranks, case, what a rank counted) of every rank of every case."""
    target = "tests.distributed.workers_plan:measure_all"
    with ThreadPoolExecutor(2) as pool:
        runs = {
            ranks: pool.submit(run_ranks, target, ranks, cases)
            for ranks, cases in ((1, ONE_RANK), (2, CASES))
        }
    return [
        (ranks, case, found[index])
        for ranks, run in runs.items()
        for found in run.result()
        for index, case in enumerate(CASES[: len(found)])
    ]


def test_model_state_is_exact(measured: list[Any]) -> None:
    assert len(measured) == 2 + 2 * 4
    for ranks, case, found in measured:
        predicted = model_state_bytes(step_of(ranks, case, found))
        assert predicted == {name: found[name] for name in predicted}


def test_accumulated_gradients(measured: list[Any]) -> None:
    """Exact where they are accumulated in fp32 beside bf16; never less than what is held elsewhere."""
    for ranks, case, found in measured:
        predicted = memory_parts(step_of(ranks, case, found))["gradients, fp32 accumulation"]
        if case[1] == "bf16":
            assert predicted == found["gradients"]
        else:
            assert found["gradients"] <= predicted + 8  # ZeRO's padding


def test_traffic_is_exact(measured: list[Any]) -> None:
    """What collectives were given in one step; on a ring a GPU sends 2 (W - 1) / W and (W - 1) / W of it."""
    for ranks, case, found in measured:
        step = step_of(ranks, case, found)
        sent = traffic(step.student, step.engine, ranks, step.accumulation)
        ring = (ranks - 1) / ranks
        assert sent.gradients_per_reduction * sent.reductions == pytest.approx(2 * ring * found["reduced"])
        assert sent.weights == pytest.approx(ring * found["gathered"], rel=1e-3)  # ZeRO's padding


def test_peak_of_a_whole_step(measured: list[Any]) -> None:
    """All parts together against the most bytes of tensors that were alive at once: within 5 %."""
    for ranks, case, found in measured:
        planned = sum(memory_parts(step_of(ranks, case, found)).values())
        assert planned == pytest.approx(found["peak"], rel=0.05), (ranks, case)


def step_of(ranks: int, case: tuple[Any, ...], found: dict[str, Any]) -> Step:
    """What workers_plan.py ran: a CPU keeps dropout masks in the activations' format, and an fp32 teacher."""
    size, engine = SIZES[case[4] if len(case) > 4 else "small"], engine_settings(found["config"])
    return Step(
        student=PlannedModel(**found["student"]),
        teachers=(PlannedModel(**found["teacher"]),),
        objective=ObjectiveConfig(),
        num_masked=size.masked,
        engine=engine,
        world_size=ranks,
        micro_batch_size=size.micro,
        sequence_length=size.length,
        accumulation=case[3],
        teacher_bytes_per_element=4,
        on_gpu=False,
        dropout_mask_bytes=engine.bytes_per_element,
    )


def main() -> None:
    """Print measured and predicted MB."""
    cases: list[tuple[Any, ...]] = [("bert", "fp32", 2, 2, "base")] if "base" in sys.argv else list(CASES)
    for ranks in (1, 2):
        results = run_ranks("tests.distributed.workers_plan:measure_all", ranks, cases, timeout_s=900)[0]
        for case, found in zip(cases, results, strict=True):
            parts = memory_parts(step_of(ranks, case, found))
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
