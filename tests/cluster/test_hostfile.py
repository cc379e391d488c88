"""`deepspeed --hostfile` over pdsh and ssh on two hosts: ZeRO-2 across them, a slow link, hosts that die."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.cluster.hosts import Hosts
from tests.distributed.pretraining import DEEPSPEED, finish, losses, wait_for
from tests.paths import ROOT
from train.distributed.rendezvous import free_port
from train.loop.metrics import read_rows

pytestmark = pytest.mark.slow
LOST_AFTER_S = 4
# What the launcher, pdsh and ssh add to the time after which a silent rank is lost (docs/CLUSTER.md).
SECONDS_TO_BE_NAMED = 10
SECONDS_AT_MOST = 120
"""Until the launcher has ended, too; one that has not is killed, and has no exit code of its own."""


def launch(hosts: Hosts, typed_on: str, folder: Path, *script: str) -> subprocess.Popen[str]:
    """The README's command, typed on a host in `folder`; no variable of this process reaches the ranks."""
    launcher = [DEEPSPEED, "--quiet", "--hostfile", str(hosts.hostfile), "--master_port", str(free_port())]
    command = ["env", "--chdir", str(folder), *launcher, str(ROOT / "launch" / "pretrain.py"), *script]
    return subprocess.Popen(
        hosts.command(typed_on, *command),
        env=hosts.environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


class Death(NamedTuple):
    """How a job whose host died has ended."""

    code: int
    output: str
    said_after_s: float
    """From the host's death to the first line that names what is lost; infinite where there is none."""


class Story(NamedTuple):
    """One run that loses its hosts one after the other, and is started again each time."""

    run_dir: Path
    rank_0_cut_off: Death
    rank_1_dead: Death
    rank_0_dead: Death
    output_at_last: str


@pytest.fixture(scope="module")
def story(hosts: Hosts, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Story:
    """host-a holds rank 0 and host-b rank 1; the command is typed on the host that survives."""
    folder = tmp_path_factory.mktemp("hostfile")
    run_dir = folder / "run"
    (folder / "cluster.env").write_text("# every line of torch's\n\nexport TORCH_CPP_LOG_LEVEL='INFO'\n")
    script = [f"--run.dir={run_dir}", f"--run.lost_rank_timeout_s={LOST_AFTER_S}", *settings]

    def die(typed_on: str, where: Path, step: int, strike: str, victim: str) -> Death:
        job = launch(hosts, typed_on, where, *script)
        wait_for(run_dir / "checkpoints" / f"step-{step:08d}" / "complete.json", job)
        how = {"cut": hosts.cut, "kill": hosts.kill, "kill_processes": hosts.kill_processes}[strike]
        struck, said_after_s, lines = time.monotonic(), math.inf, []
        # On a busy disk processes that are killed end late, the victim's as well as the survivor's.
        end = threading.Timer(SECONDS_AT_MOST, job.kill)
        end.start()
        with ThreadPoolExecutor(1) as pool:
            striking = pool.submit(how, victim)
            assert job.stdout is not None
            for line in job.stdout:
                lines.append(line)
                if "error: rank " in line:
                    said_after_s = min(said_after_s, time.monotonic() - struck)
            striking.result()
        end.cancel()
        return Death(job.wait(), "".join(lines), said_after_s)

    with hosts.slow_link(delay_s=0.01, rate="20mbit"):
        cut_off = die("host-b", folder, 4, "cut", "host-a")
        wait_until_gone(run_dir)  # where nobody sees it, rank 0 and its launcher end too
        hosts.link("host-a", "up")
        rank_1_dead = die("host-a", ROOT, 8, "kill", "host-b")
        hosts.start("host-b")
        rank_0_dead = die("host-b", ROOT, 12, "kill_processes", "host-a")
        hosts.start("host-a")
    code, output = finish(launch(hosts, "host-a", ROOT, *script))
    assert code == 0, output
    return Story(run_dir, cut_off, rank_1_dead, rank_0_dead, output)


def wait_until_gone(run_dir: Path) -> None:
    deadline = time.monotonic() + LOST_AFTER_S + SECONDS_TO_BE_NAMED
    while any(f"--run.dir={run_dir}" in (p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline, "a rank or its launcher lives on"
        time.sleep(0.1)


def step_s(run_dir: Path, step: int) -> float:
    (rate,) = [r["tokens_per_s"] for r in read_rows(run_dir) if r["step"] == step and "tokens_per_s" in r]
    return 32 * 32 / rate


def test_two_hosts_give_the_losses_of_one(story: Story, expected_losses: list[float]) -> None:
    assert losses(story.run_dir) == expected_losses
    assert f"continuing from {story.run_dir}/checkpoints/step-" in story.output_at_last
    slow, fast = step_s(story.run_dir, 8), step_s(story.run_dir, 24)
    print(f"step: {fast:.3f} s, at 10 ms and 20 Mbit/s {slow:.3f} s")
    assert slow > fast + 2 * 0.01, "the link was not slow"


@pytest.mark.parametrize(
    ("death", "message"),
    [
        ("rank_0_cut_off", "host-b: error: rank 1 on host-b has had no answer from rank 0 for"),
        ("rank_0_dead", "host-b: error: rank 1 "),
        ("rank_1_dead", "host-a: error: rank 1 on host-b has not been heard of for"),
    ],
)
def test_a_host_that_dies_ends_the_job_with_one_message(story: Story, death: str, message: str) -> None:
    code, output, said_after_s = getattr(story, death)
    print(f"{death}: named after {said_after_s:.1f} s")
    assert code > 0, f"ended by {code}"
    assert said_after_s < LOST_AFTER_S + SECONDS_TO_BE_NAMED, output
    assert output.count("error: ") == 1, output
    assert message in output
    assert "run it again to go on from the newest checkpoint" in output
    if death == "rank_0_dead":
        assert "lost rank 0" in output.replace("lost the connection to rank 0", "lost rank 0")


def test_variables_for_all_hosts_come_from_cluster_env(story: Story) -> None:
    """torch's own messages, which its library prints at this level only, come from both hosts; not without the file."""
    for host in ("host-a", "host-b"):
        assert f"{host}: [I" in story.rank_0_cut_off.output.replace(f"{host}: [rank", f"{host}: [I")
        assert f"{host}: [I" not in story.output_at_last


def test_ranks_of_a_single_host_start_where_the_command_is_typed(
    hosts: Hosts, settings: list[str], tmp_path: Path
) -> None:
    """Whatever the hostfile's one line says; docs/CLUSTER.md tells the remedy, and so does the doctor."""
    hostfile, script = tmp_path / "hosts", tmp_path / "where.py"
    hostfile.write_text("host-b slots=1\n")
    script.write_text("import socket\n\nprint('a rank on', socket.gethostname())\n")

    def typed_on_host_a(*command: str) -> str:
        words = hosts.command("host-a", "env", "--chdir", str(tmp_path), *command)
        done = subprocess.run(words, env=hosts.environment(), capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    deepspeed = [DEEPSPEED, "--quiet", "--hostfile", str(hostfile), "--master_port", str(free_port())]
    assert "a rank on host-a\n" in typed_on_host_a(*deepspeed, str(script))
    assert "a rank on host-b\n" in typed_on_host_a(*deepspeed, "--force_multi", str(script))

    doctor = [sys.executable, str(ROOT / "launch" / "doctor.py"), "--hostfile", str(hostfile)]
    table = typed_on_host_a(*doctor, "--skip-all-reduce", f"--run.dir={tmp_path / 'run'}", *settings)
    assert "host-b is host-b, not host-a" in table
    assert "add --force_multi" in table
