"""launch/benchmark.py step and checkpoint: their clock, products and refusals. tests/distributed runs them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from launch import benchmark
from launch.benchmarks import floor
from launch.benchmarks.options import Shape
from launch.benchmarks.products import products_of
from launch.benchmarks.training import settings
from launch.benchmarks.training.clock import NestedClock
from launch.benchmarks.training.ranks import unavoidable_bytes
from launch.common.cli import parse_config
from train.models.flops import ModelShape, RelationLayers, training_flops_per_token

STUDENT, TEACHER = ModelShape(2, 64, 256, 500, 64), ModelShape(4, 64, 256, 500, 64)


def test_nested_sections_count_their_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 s each second: the outer sections are what the trainer's log reads."""
    now = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    clock = NestedClock("cpu")
    clock.begin()
    with clock.section("student"), clock.section("backward"):  # from 0 to 5, and from 1 to 4
        clock.timed("collectives", lambda: None)()  # from 2 to 3
    with clock.section("collectives"):  # from 6 to 7
        pass
    assert clock.read() == {"student": 5.0, "collectives": 1.0}
    assert clock.totals == {"student": 2.0, "backward": 2.0, "collectives": 2.0}


@pytest.mark.parametrize(
    ("soft", "decoded", "masked", "relations"),
    [("all", 32, 5, None), ("masked", 5, 5, None), ("none", 5, 0, RelationLayers(2, (4,), True, True))],
)
def test_products_are_the_flops_of_a_run(
    soft: Any, decoded: int, masked: int, relations: RelationLayers | None
) -> None:
    shape = Shape(3, 32)
    products = products_of(STUDENT, [TEACHER], shape, attention_heads=2, decoded=decoded, relations=relations)
    counted = training_flops_per_token(STUDENT, [TEACHER], 32, masked, soft, relations)
    assert sum(each.flops for each in products) == pytest.approx(counted.total * 3 * 32)


def test_bytes_of_more_ranks() -> None:
    assert unavoidable_bytes(10, 1) == 400
    assert unavoidable_bytes(10, 2) == 200 + 40


def test_bandwidth_is_the_best_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy moves 8 bytes an element; reading is four times as fast here as both others."""
    starts = [0, 0.25, 1, 2, 3, 4] * 3
    now = iter(starts)
    monkeypatch.setattr(floor, "_now", lambda device: next(now))
    assert floor.measured_bandwidth(elements=10) == 4 * 10 / 0.25


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["--model", "quickstart-teacher", "--objective", "triple"],
            "with --model=quickstart-teacher give mlm",
        ),
        (["--objective", "mlm"], "with --model=bert-base give triple or masked or relation"),
        (["--ranks", "1,2", "--processor-time"], "give --ranks=1"),
        (["--model", "quickstart-teacher", "--against", "plain"], "has no teacher; leave it out"),
    ],
)
def test_what_does_not_fit_is_refused(words: list[str], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        benchmark.main(["step", *words])


@pytest.mark.parametrize("model", ["huge", "6x100", "0x64"])
def test_unknown_models_are_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["checkpoint", "--model", model])
    assert "give" in capsys.readouterr().err


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder; make it first"):
        benchmark.main(["checkpoint", "--dir", str(tmp_path / "none")])


@pytest.mark.parametrize(("model", "objective"), [("2x64", "relation"), ("quickstart-teacher", "mlm")])
def test_settings_are_a_recipe(model: str, objective: str, tmp_path: Path) -> None:
    config = parse_config(settings.settings(model, objective, Shape(4, 32), 2, 3, tmp_path), "")
    assert config.training.global_batch_size == 24
    assert config.training.micro_batch_size == 4
    assert (config.model.teacher is None) == (objective == "mlm")
