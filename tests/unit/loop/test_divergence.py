"""Which steps a rollback leaves out, and the file that remembers them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from train import run
from train.checkpointing.state import LossWindow, TrainState
from train.config import Config
from train.data.pipeline import Phase, RunData
from train.errors import UserError
from train.loop.divergence import (
    Rollback,
    all_left_out,
    bad_steps,
    disable_min_scale_error,
    read_rollbacks,
    write_rollbacks,
)


@pytest.mark.parametrize(
    ("skipped", "finite", "fp16", "expected"),
    [
        ([12, 15], True, False, [12, 15]),
        ([3, 12], True, False, [12]),  # 3 lies before the checkpoint
        ([], True, False, [19]),
        ([11, 17, 18, 19], True, True, [17, 18, 19]),  # 11 lowered the loss scale
        ([14, 15, 16, 17, 18, 19], False, False, [13]),
        ([10, 11], False, False, [10]),
        ([], False, True, [19]),
    ],
)
def test_bad_steps_since_a_checkpoint_of_step_10_noticed_after_20(
    skipped: list[int], finite: bool, fp16: bool, expected: list[int]
) -> None:
    assert bad_steps(skipped, 10, 20, finite, fp16) == expected


def test_rollbacks_are_remembered_and_damage_is_named(tmp_path: Path) -> None:
    assert read_rollbacks(tmp_path) == []
    entries = [Rollback(12, 8, (9, 10), "the loss is nan"), Rollback(16, 12, (13,), "again")]
    write_rollbacks(tmp_path, entries)
    assert read_rollbacks(tmp_path) == entries
    assert all_left_out(entries, (4, 9)) == (4, 9, 10, 13)
    whole = (tmp_path / "rollbacks.json").read_text()
    elsewhere = [whole.replace(" 13\n", f" {step}\n") for step in (-13, 11, 17, 93)]
    for damage in ("{", "{}", '{"rollbacks": [{"left_out": 3}]}', "[]", *elsewhere):
        assert damage != whole
        (tmp_path / "rollbacks.json").write_text(damage)
        with pytest.raises(UserError, match=r"rollbacks.json.*restore it, or give another run.dir"):
            read_rollbacks(tmp_path)


def test_a_checkpoint_holds_what_is_left_out() -> None:
    assert TrainState.from_dict({"step": 3, "left_out": [1, 2]}).left_out == (1, 2)
    assert TrainState.from_dict({"step": 3}).left_out == ()


def test_tokens_of_steps_left_out_do_not_count() -> None:
    loader = SimpleNamespace(order=SimpleNamespace(global_batch_size=4))
    phases = [Phase(0, 6, 8, loader, None), Phase(6, 10, 16, loader, None)]  # type: ignore[arg-type]
    data = RunData(phases)
    assert data.tokens_before(8) == 4 * (6 * 8 + 2 * 16)
    assert data.tokens_before(8, (2, 7, 9)) == 4 * (5 * 8 + 1 * 16)


def test_deepspeed_leaves_the_end_of_an_overflowing_run_to_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 1)
    shipped = {"init_scale": 2**16, "scale_window": 1000, "min_scale": 1, "delayed_shift": 2}
    scaler = DynamicLossScaler(**shipped, consecutive_hysteresis=False)
    disable_min_scale_error(SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler)))
    for _ in range(30):
        scaler.update_scale(True)
    assert scaler.cur_scale == 1


@pytest.mark.parametrize(("others_until", "empty"), [(-1, [False, False, False]), (4, [True, False, True])])
def test_sums_of_another_configuration_are_left_out_also_after_a_rollback(
    others_until: int, empty: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start goes on with step 4, goes back to 6, which it has saved itself, and, 6 being damaged, back to 4."""
    parts: Any = SimpleNamespace(
        config=Config(), trainer=SimpleNamespace(total_steps=9, micro_batches_per_step=1)
    )
    window = LossWindow({"loss": [1.5]}, 2)
    to_come = [TrainState(6, window, loss_history=(1.5,)), TrainState(4, window, loss_history=(1.5,)), None]
    found: list[bool] = []

    def train(_parts: object, _inputs: object, state: TrainState, *_: object) -> TrainState | None:
        found.append(parts.trainer.losses.is_empty)
        assert state.loss_history == (() if found[-1] else (1.5,)), "every loss might be a spike"
        return to_come.pop(0)

    monkeypatch.setattr(run, "_train_or_go_back", train)
    monkeypatch.setattr(run, "from_first_rank", lambda world, action: [])
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    anything: Any = SimpleNamespace(device="cpu")
    last = run._train_with_rollbacks(
        parts,
        anything,
        TrainState(4, window, loss_history=(1.5,)),
        anything,
        anything,
        anything,
        others_until,
    )
    assert (found, last.step) == (empty, 9)
