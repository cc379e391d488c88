"""The hosts of a job: a hostfile, and what launch/preflight/probe.py answers on each, over ssh or started plainly."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.environment_file import read_utf8
from train.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_SSH = "ssh -o BatchMode=yes -o ConnectTimeout=10"


class UnreachableError(Exception):
    """A host did not answer; the message is what it said instead."""


@dataclass(frozen=True)
class Host:
    """A line of a hostfile."""

    name: str
    slots: int


def read_hostfile(path: str) -> list[Host]:
    """`NAME slots=GPUS` a line, as DeepSpeed reads it; blank lines and comments are passed over.

    Raises:
        UserError: no such file, no UTF-8, no host, a line that is none, a host twice.
    """
    flag = f"--hostfile {path}"
    try:
        lines = read_utf8(Path(path), flag).splitlines()
    except OSError as error:
        raise UserError(f"{flag}: {error.strerror}; write a line `NAME slots=GPUS` for each host") from None
    if lines and lines[0].startswith("\ufeff"):
        raise UserError(f"{flag} begins with a byte order mark, which deepspeed takes for a name; remove it")
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        name, *more = line.partition("#")[0].split() or [""]
        if not name:
            continue
        if "[" in name or "," in name:
            raise UserError(f"{flag}, line {number}: deepspeed takes {name!r} for one host; give each a line")
        # Like deepspeed, no look at what follows, such as mpirun's max_slots=.
        count = more[0].removeprefix("slots=") if more and more[0].startswith("slots=") else ""
        if not (count.isdecimal() and int(count) > 0):
            raise UserError(f"{flag}, line {number}: {line.strip()!r} is not `NAME slots=GPUS`")
        if name in hosts:
            raise UserError(f"{flag} names {name} twice; give it one line with all its slots")
        hosts[name] = Host(name, int(count))
    if not hosts:
        raise UserError(f"{flag} names no host; write a line `NAME slots=GPUS` for each")
    return list(hosts.values())


def read_ssh(text: str) -> list[str]:
    """The words of a --ssh.

    Raises:
        UserError: no words, or an open quote.
    """
    remedy = "give a command that runs another on a host, such as `ssh -p 2222`"
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--ssh {text!r}: {str(error).lower()}; {remedy}") from None
    if not words:
        raise UserError(f"--ssh {text!r} is empty; {remedy}")
    return words


def keep_alive_s(name: str, ssh: Sequence[str]) -> int | None:
    """ServerAliveInterval with which `ssh` reaches a host, by `ssh -G`; None where that does not print it."""
    command = [*ssh, "-G", name]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line.split() for line in done.stdout.splitlines()]
    words = next((words for words in lines if words[:1] == ["serveraliveinterval"]), [])
    return int(words[1]) if len(words) == 2 and words[1].isdecimal() else None


def ask(name: str, ssh: Sequence[str] | None, arguments: Sequence[str], timeout_s: float) -> dict[str, Any]:
    """The probe's answer (launch/preflight/probe.py), with `clock_ahead_s`: the bounds of how many seconds the host's
    clock is ahead of this one's.

    Args:
        ssh: the command that runs a command on a host; the host's name and the command are appended. None: a plain
            process of this machine.
    Raises:
        UnreachableError: no answer within `timeout_s`; with ssh's or Python's own words.
    """
    command = [sys.executable, "-m", "launch.preflight.probe", *arguments]
    if ssh is not None:
        command = [*ssh, name, f"cd {shlex.quote(str(ROOT))} && {shlex.join(command)}"]
    launched_at = time.time()
    # A file and no pipe: ssh's control master may hold it open after the probe has ended.
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                errors="replace",
                timeout=timeout_s,
            )
        except OSError as error:
            raise UnreachableError(f"{command[0]}: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise UnreachableError(f"no answer within {timeout_s:.0f} s") from None
        received_at = time.time()
        said.seek(0)
        words = " / ".join(line.strip() for line in said.read().splitlines()[-5:])
    # A login shell may greet first.
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        raise UnreachableError(words or f"ended with code {done.returncode}") from None
    bounds = (answer["ended_at"] - received_at, answer["started_at"] - launched_at)
    return {**answer, "clock_ahead_s": bounds}


def ask_all(
    hosts: Sequence[Host],
    ssh: Sequence[str] | None,
    arguments: Callable[[Host], Sequence[str]],
    timeout_s: float,
) -> dict[str, dict[str, Any] | UnreachableError]:
    """What every host answers, or why it does not, by name; all are asked at the same time."""

    def answer(host: Host) -> dict[str, Any] | UnreachableError:
        try:
            return ask(host.name, ssh, arguments(host), timeout_s)
        except UnreachableError as error:
            return error

    with ThreadPoolExecutor(len(hosts)) as pool:
        return dict(zip((host.name for host in hosts), pool.map(answer, hosts), strict=True))
