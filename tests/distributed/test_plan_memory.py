"""The plan's memory and traffic against real DeepSpeed engines on one and two gloo ranks.

python -m tests.distributed.test_plan_memory [base]      prints what is measured beside what is predicted
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from launch.planner.cost import traffic
from launch.planner.memory import (
    Objective,
    activation_bytes,
    engine_settings,
    memory_parts,
    model_state_bytes,
)
from launch.planner.shapes import PlannedModel, num_parameters
from tests.distributed.harness import run_ranks
from tests.distributed.plan_sizes import SIZES

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
    for ranks, _, found in measured:
        student = PlannedModel(**found["shape"])
        assert num_parameters(student) == found["parameters"]
        predicted = model_state_bytes(student, ranks, engine_settings(found["config"]))
        assert predicted == {name: found[name] for name in predicted}


def test_accumulated_gradients(measured: list[Any]) -> None:
    """Exact where they are accumulated in fp32 beside bf16; never less than what is held elsewhere."""
    for ranks, case, found in measured:
        parts = plan_of(ranks, case, found)
        predicted = parts["gradients, fp32 accumulation"]
        if case[1] == "bf16":
            assert predicted == found["gradients"]
        else:
            assert found["gradients"] <= predicted + 8  # ZeRO's padding


def test_traffic_is_exact(measured: list[Any]) -> None:
    """What collectives were given in one step; on a ring a GPU sends 2 (W - 1) / W and (W - 1) / W of it."""
    for ranks, case, found in measured:
        student, engine = PlannedModel(**found["shape"]), engine_settings(found["config"])
        sent = traffic(student, engine, ranks, case[3])
        ring = (ranks - 1) / ranks
        assert sent.gradients_per_reduction * sent.reductions == pytest.approx(2 * ring * found["reduced"])
        assert sent.weights == pytest.approx(ring * found["gathered"], rel=1e-3)  # ZeRO's padding


def test_peak_of_a_whole_step(measured: list[Any]) -> None:
    """All parts together against the most bytes of tensors that were alive at once: within 5 %."""
    for ranks, case, found in measured:
        assert sum(plan_of(ranks, case, found).values()) == pytest.approx(found["peak"], rel=0.05), (
            ranks,
            case,
        )


def plan_of(ranks: int, case: tuple[Any, ...], found: dict[str, Any]) -> dict[str, int]:
    """The plan for what workers_plan.py ran: a CPU keeps dropout masks in the activations' format, and an fp32
    teacher."""
    kind, accumulation, size = case[0], case[3], SIZES[case[4] if len(case) > 4 else "small"]
    student, engine = PlannedModel(**found["shape"]), engine_settings(found["config"])
    teacher = replace(student, model_type=kind, layers=size.layers, token_types=2 if kind == "bert" else 1)
    parts = memory_parts(
        student,
        (teacher,),
        Objective("all", size.masked, mlm=True, cosine=True),
        engine,
        world_size=ranks,
        micro_batch_size=size.micro,
        sequence_length=size.length,
        accumulation=accumulation,
        teacher_bytes_per_element=4,
        on_gpu=False,
    )
    place = (student, size.micro, size.length, engine.bytes_per_element)
    parts["activations"] += activation_bytes(*place, engine.bytes_per_element) - activation_bytes(*place)
    return parts


def main() -> None:
    """Print measured and predicted MB."""
    cases: list[tuple[Any, ...]] = [("bert", "fp32", 2, 2, "base")] if "base" in sys.argv else list(CASES)
    for ranks in (1, 2):
        results = run_ranks("tests.distributed.workers_plan:measure_all", ranks, cases, timeout_s=900)[0]
        for case, found in zip(cases, results, strict=True):
            parts = plan_of(ranks, case, found)
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
