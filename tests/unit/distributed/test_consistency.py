"""What rank 0 does for all, and what the others learn where that fails."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from train.distributed.consistency import on_first_rank
from train.distributed.world import World
from train.errors import ReportedElsewhereError, UserError, exit_code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("no such teacher"), 2),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "runs/mine"), 2),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1),
        (ValueError("shape mismatch"), 1),
    ],
)
def test_a_fault_on_rank_0_ends_all_with_its_exit_code(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []

    def broadcast(values: list[Any]) -> None:
        if sent:
            values[0] = sent.pop()
        else:
            sent.append(values[0])

    def fail() -> None:
        raise error

    monkeypatch.setattr("torch.distributed.broadcast_object_list", broadcast)
    with pytest.raises(type(error)) as here:
        on_first_rank(World(0, 0, 2, 2, "cpu"), fail)
    assert here.value is error, "with its own traceback"
    with pytest.raises(ReportedElsewhereError) as elsewhere:
        on_first_rank(World(1, 1, 2, 2, "cpu"), fail)
    assert exit_code(elsewhere.value.__cause__) == exit_code(error) == code
    assert str(elsewhere.value.__cause__) == str(error)
