"""`deepspeed --hostfile` over pdsh and ssh on two hosts: ZeRO-2 across them, a slow link, a host that dies."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.needs import need
from tests.distributed.harness import free_port
from tests.distributed.pretraining import DEEPSPEED, finish, losses, wait_for
from train.metrics import read_rows

pytestmark = pytest.mark.slow
LOST_AFTER_S = 4
# What the launcher, pdsh and ssh add to the time after which a silent rank is lost.
SECONDS_TO_END = 10


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    need("ip", "tc", "sshd", "ssh", "pdsh")
    with Hosts(tmp_path_factory.mktemp("hosts") / "files") as opened:
        yield opened


def launch(hosts: Hosts, settings: list[str], run_dir: Path) -> subprocess.Popen[str]:
    """The README's command, typed on host-a; no variable of this process reaches the ranks."""
    launcher = [DEEPSPEED, "--quiet", "--hostfile", str(hosts.hostfile), "--master_port", str(free_port())]
    script = ["launch/pretrain.py", f"--run.dir={run_dir}", f"--run.lost_rank_timeout_s={LOST_AFTER_S}"]
    return subprocess.Popen(
        hosts.command("host-a", *launcher, *script, *settings),
        env=hosts.environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def median_step_s(run_dir: Path) -> float:
    rows = [row["tokens_per_s"] for row in read_rows(run_dir) if "tokens_per_s" in row]
    return 32 * 32 / sorted(rows)[len(rows) // 2]


@pytest.fixture(scope="module")
def on_two_hosts(
    hosts: Hosts, settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    run_dir = tmp_path_factory.mktemp("hostfile") / "run"
    code, output = finish(launch(hosts, settings, run_dir))
    assert code == 0, output
    return run_dir, output


def test_two_hosts_give_the_losses_of_one(
    on_two_hosts: tuple[Path, str], expected_losses: list[float]
) -> None:
    run_dir, output = on_two_hosts
    assert losses(run_dir) == expected_losses
    assert "error" not in output.replace("log_level=error", ""), output


def test_a_host_that_dies_on_a_slow_link_ends_the_job_which_then_goes_on(
    hosts: Hosts,
    settings: list[str],
    on_two_hosts: tuple[Path, str],
    expected_losses: list[float],
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    with hosts.slow_link(delay_s=0.01, rate="20mbit"):
        job = launch(hosts, settings, run_dir)
        wait_for(run_dir / "checkpoints" / "step-00000008" / "complete.json", job)
        died = time.monotonic()
        hosts.kill("host-b")
        code, output = finish(job)
        ended_after_s = time.monotonic() - died
    assert code != 0
    assert ended_after_s < LOST_AFTER_S + SECONDS_TO_END, output
    assert output.count("error: ") == 1, output
    assert "error: rank 1 on host-b has not been heard of for" in output
    assert "run it again to go on from the newest checkpoint" in output
    slow, fast = median_step_s(run_dir), median_step_s(on_two_hosts[0])
    print(
        f"step: {fast:.3f} s, at 10 ms and 20 Mbit/s {slow:.3f} s; host lost: end after {ended_after_s:.1f} s"
    )
    assert slow > fast + 2 * 0.01, "the link was not slow"
    hosts.start("host-b")
    code, output = finish(launch(hosts, settings, run_dir))
    assert code == 0, output
    assert f"continuing from {run_dir}/checkpoints/step-" in output
    assert losses(run_dir) == expected_losses


def test_variables_for_all_hosts_come_from_cluster_env(hosts: Hosts, tmp_path: Path) -> None:
    """The launcher runs in another folder; a mistake in the file is told once, by rank 0, before torch is imported."""
    (tmp_path / "cluster.env").write_text("# comment\n\nA B\n")
    launcher = [DEEPSPEED, "--quiet", "--hostfile", str(hosts.hostfile)]
    script = str(Path(__file__).resolve().parents[2] / "launch" / "pretrain.py")
    command = ["env", "--chdir", str(tmp_path), *launcher, script]
    done = subprocess.run(
        hosts.command("host-a", *command), env=hosts.environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert "host-a: error: cluster.env, line 3: 'A' is not NAME=value" in done.stderr
    assert sys.executable not in done.stderr.split("error:")[1].splitlines()[0]
