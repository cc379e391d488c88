"""What signals ask for, also while the main thread is busy outside of Python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.paths import ROOT
from train.distributed.signals import SAME_REQUEST_S, StopRequest


def test_one_signal_asks_and_the_handlers_before_come_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    for _ in range(2):
        with StopRequest() as stop:
            assert not stop.requested
            for _ in range(2):  # a launcher passes one Ctrl-C on more than once
                os.kill(os.getpid(), signal.SIGUSR1)
            deadline = time.monotonic() + 5
            while not stop.requested and time.monotonic() < deadline:
                time.sleep(0.01)
            assert stop.requested
        assert signal.getsignal(signal.SIGUSR1) == before
        assert signal.set_wakeup_fd(-1) == -1


def test_a_second_signal_ends_a_process_that_hangs_outside_of_python() -> None:
    code = "import hashlib; from train.distributed.signals import StopRequest\n"
    code += "with StopRequest():\n    print('open', flush=True)\n"
    code += "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # minutes, as a collective whose other end is frozen
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            process.send_signal(signal.SIGTERM)
            time.sleep(SAME_REQUEST_S + 0.2)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=5) == 128 + signal.SIGTERM
        finally:
            process.kill()


def test_sigusr1_while_a_rank_waits_for_another_ends_with_75() -> None:
    """In torch's C++, where no handler of Python's runs."""
    script = (
        "from train.distributed.rendezvous import free_port; from train.distributed.signals import restart_on_sigusr1; "
        "from train.distributed.store import join_store; restart_on_sigusr1(); print('open', flush=True); "
        "join_store(0, 2, '127.0.0.1', free_port(), wait_s=100)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        time.sleep(1)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=50) == 75


@pytest.mark.parametrize(
    "command", [["launch/pretrain.py"], ["launch/finetune.py", "--model=m", "--task=rte"]]
)
def test_sigusr1_during_the_imports_ends_with_75(command: list[str], tmp_path: Path) -> None:
    """Else a job that Slurm asks to requeue then would end for good."""
    command[0] = str(ROOT / command[0])
    if "finetune" in command[0]:
        command += [f"--out={tmp_path / 'out'}"]
    with subprocess.Popen([sys.executable, *command], cwd=tmp_path, stderr=subprocess.PIPE) as process:
        status = Path(f"/proc/{process.pid}/status")
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            caught = int(status.read_text().partition("SigCgt:")[2].split()[0], 16)
            if caught >> (signal.SIGUSR1 - 1) & 1:
                process.send_signal(signal.SIGUSR1)
                break
            time.sleep(0.02)
        assert process.wait(timeout=30) == 75
