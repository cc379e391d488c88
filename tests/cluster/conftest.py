"""What every launcher's test compares with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.needs import need
from tests.distributed.pretraining import losses


@pytest.fixture(scope="session")
def expected_losses(undisturbed: Path) -> list[float]:
    """Losses under `deepspeed` on one host with two ranks."""
    return losses(undisturbed)


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    need("ip", "tc", "sshd", "ssh", "pdsh")
    with Hosts(tmp_path_factory.mktemp("hosts") / "files") as opened:
        yield opened
