"""What every launcher's test compares with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.needs import need
from tests.distributed.pretraining import finish, losses, small_settings, start


@pytest.fixture(scope="session")
def settings(shards_folder: str, teacher_folder: str) -> list[str]:
    return small_settings(shards_folder, teacher_folder)


@pytest.fixture(scope="session")
def expected_losses(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses under `deepspeed` on one host with two ranks."""
    run_dir = tmp_path_factory.mktemp("deepspeed") / "run"
    code, output = finish(start(settings, run_dir, 2))
    assert code == 0, output
    return losses(run_dir)


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    need("ip", "tc", "sshd", "ssh", "pdsh")
    with Hosts(tmp_path_factory.mktemp("hosts") / "files") as opened:
        yield opened
