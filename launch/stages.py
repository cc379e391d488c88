"""How the commands that call other commands do it (quickstart.py, ablate.py): the launcher, and what becomes of a
stage when its caller is killed or interrupted."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from train.distributed.rendezvous import free_port
from train.distributed.signals import STOPPED_AFTER_SAVING

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2
AGAIN = "stopped: run the same command again to go on where it stopped"


def deepspeed_words(ranks: int | None, hostfile: Path | None = None) -> list[str]:
    """The real launcher's command, to be followed by a script and its flags.

    Args:
        ranks: on this machine; None for what the launcher finds, or the hostfile says.
    """
    words = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "--quiet"]
    if hostfile is not None:
        return [*words, "--hostfile", str(hostfile)]
    words += [] if ranks is None else ["--num_gpus", str(ranks)]
    return [*words, "--master_port", str(free_port())]


def cpu_environment() -> dict[str, str]:
    """This environment, on this machine's CPU."""
    return {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def run_stage(command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None) -> int:
    """Run a command with its output shown.

    SIGTERM, SIGUSR1 and Ctrl-C reach the stage too, which may save; kill -9 of this process sends it SIGTERM.

    Args:
        folder: working directory; None for this process's own.
    Returns:
        Its exit code; 75 where it was stopped, by such a signal or by one of its own.
    """
    with (
        subprocess.Popen(command, cwd=folder, env=environment, preexec_fn=_end_with_parent) as process,
        _passed_on(process) as stopped,
    ):
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the terminal has sent it to the stage as well
            stopped.append(signal.SIGINT)
            code = process.wait()
    if code and (stopped or code in (STOPPED_AFTER_SAVING, -signal.SIGINT, 128 + signal.SIGINT)):
        return STOPPED_AFTER_SAVING
    return code


@contextlib.contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Send the signals that ask for a stop to the stage; the list of those that came."""
    came: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        came.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """Have Linux send this child SIGTERM when its parent dies, also by kill -9, so that no stage goes on unseen
    beside the next call's."""
    pr_set_pdeathsig = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
