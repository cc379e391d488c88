"""How the commands that call other commands do it (quickstart.py, ablate.py, __main__.py): the launcher, and what
becomes of a stage when its caller is killed or interrupted."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

from train.distributed.rendezvous import free_port
from train.distributed.signals import STOPPED_AFTER_SAVING, end_with_parent

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = [sys.executable, "-m", "deepspeed.launcher.runner"]
"""DeepSpeed's launcher: the command `deepspeed` lies beside Python only where both were installed together."""
# Anything lower says at a stop what the ranks have said: "exits with return code = 75".
QUIET = ["--log_level", "critical"]
DEFAULT_HOSTFILE = Path("/job/hostfile")
"""What the launcher reads where it is given no other."""
RANKS = 2
AGAIN = "stopped: run the same command again to go on where it stopped"


def deepspeed_words(ranks: int | None, hostfile: Path | None = None) -> list[str]:
    """The real launcher's command, to be followed by a script and its flags.

    Args:
        ranks: on this machine; None for what the launcher finds, or the hostfile says.
    """
    words = [*LAUNCHER, *QUIET]
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
    code, was_stopped = run_until_stopped(command, environment, folder)
    if code and (was_stopped or code in (STOPPED_AFTER_SAVING, -signal.SIGINT, 128 + signal.SIGINT)):
        return STOPPED_AFTER_SAVING
    return code


def run_until_stopped(
    command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None
) -> tuple[int, bool]:
    """`run_stage`, with the exit code as it is, and whether a signal came to this process.

    Ctrl-C would end DeepSpeed's launcher with a traceback while the ranks save, and kill ranks that take longer than
    30 s. Ranks of this machine therefore run in a process group of their own, which the terminal's Ctrl-C and Ctrl-Z do
    not reach, and this process passes both on.
    """
    names_hosts = DEFAULT_HOSTFILE.exists() or any(word.startswith(("--hostfile", "-H")) for word in command)
    has_ranks = list(command[1:3]) == LAUNCHER[1:3] and not names_hosts
    with (
        subprocess.Popen(
            command, cwd=folder, env=environment, preexec_fn=_begin_ranks if has_ranks else end_with_parent
        ) as process,
        _stops_ranks(process) if has_ranks else _passed_on(process) as stopped,
    ):
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the terminal has sent it to the stage as well
            stopped.append(signal.SIGINT)
            code = process.wait()
    return code, bool(stopped)


@contextlib.contextmanager
def _handling(handlers: Mapping[signal.Signals, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Send the signals that ask for a stop to the stage; the list of those that came."""
    came: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        came.append(number)
        process.send_signal(number)

    with _handling({signal.SIGTERM: pass_on, signal.SIGUSR1: pass_on}):
        yield came


@contextlib.contextmanager
def _stops_ranks(launcher: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Send the signals that ask for a stop to the ranks below a launcher; the list of those that came."""
    came: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        came.append(number)
        ranks = ranks_below(launcher.pid)
        for rank in ranks:
            with contextlib.suppress(psutil.Error):
                rank.terminate()
        if not ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGTERM)

    def pause(number: int, _: FrameType | None) -> None:
        os.killpg(launcher.pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.killpg(launcher.pid, signal.SIGCONT)

    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    with _handling({**dict.fromkeys(stops, stop), signal.SIGTSTP: pause}):
        yield came


def ranks_below(launcher: int) -> list[psutil.Process]:
    """The ranks that a `deepspeed` command has started on this machine.

    It starts another process, deepspeed.launcher.launch, which starts the ranks.
    """
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(launcher).children():
            if "deepspeed.launcher.launch" in process.cmdline()[:4]:
                return process.children()
    return []


def _begin_ranks() -> None:
    os.setpgid(0, 0)
    end_with_parent()
