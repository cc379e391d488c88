"""Which errors are those of collectives; none loses its cause."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist

from train.distributed.collective_errors import cause_of, is_from_a_collective

OF_NCCL = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, invalid usage, NCCL version 2.27.3
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 3d000
Exception raised from create at NCCLUtils.cpp:77 (most recent call first):
frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x88"""


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (dist.DistBackendError(OF_NCCL), True),
        (dist.DistNetworkError("The client socket has failed to connect"), True),
        (
            RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
            True,
        ),
        (RuntimeError("Distributed package doesn't have NCCL built in"), False),
        (RuntimeError("HTTP Connection pool is full"), False),
        (ConnectionResetError("Connection reset by peer"), False),
        (ValueError("NCCL"), False),
    ],
)
def test_errors_of_collectives_alone(error: Exception, found: bool) -> None:
    assert is_from_a_collective(error) == found


def test_the_cause_is_kept_without_the_stack() -> None:
    cause = cause_of(dist.DistBackendError(OF_NCCL))
    assert cause.startswith("NCCL error in: ")
    assert cause.endswith("Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 3d000")
    assert cause_of(RuntimeError()) == "RuntimeError"


def test_a_real_one() -> None:
    with pytest.raises(dist.DistError) as raised:
        dist.TCPStore("127.0.0.1", 1, 2, False, timeout=timedelta(milliseconds=200))
    assert is_from_a_collective(raised.value)
    assert "127.0.0.1" in cause_of(raised.value)
