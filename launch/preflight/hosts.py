"""The hosts of a job as launch/doctor.py talks to them: a hostfile, and a probe on each, over ssh or plainly."""

from __future__ import annotations

import contextlib
import json
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.environment_file import read_utf8
from train.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 30.0
END_TIMEOUT_S = 5.0
CLOCK_QUESTIONS = 5
DEFAULT_SSH = "ssh -o BatchMode=yes -o ConnectTimeout=10"


class UnreachableError(Exception):
    """A host did not answer; the message is what it said instead."""


@dataclass(frozen=True)
class HostEntry:
    """A line of a hostfile."""

    name: str
    slots: int


def read_hostfile(path: str) -> list[HostEntry]:
    """`NAME slots=GPUS` a line, as DeepSpeed reads it; blank lines and comments are passed over.

    Raises:
        UserError: no such file, no UTF-8, no host, a line that is none, a host twice.
    """
    try:
        lines = read_utf8(Path(path), f"--hostfile {path}").splitlines()
    except OSError as error:
        raise UserError(
            f"--hostfile {path}: {error.strerror}; write a line `NAME slots=GPUS` for each host"
        ) from None
    if lines and lines[0].startswith("\ufeff"):
        raise UserError(
            f"--hostfile {path} begins with a byte order mark, which deepspeed takes for a name; remove it"
        )
    hosts = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if "[" in words[0] or "," in words[0]:
            raise UserError(
                f"--hostfile {path}, line {number}: deepspeed takes {words[0]!r} for one host; give each a line"
            )
        # Like deepspeed, no look at what follows, such as mpirun's max_slots=.
        count = words[1].removeprefix("slots=") if len(words) > 1 and words[1].startswith("slots=") else ""
        if not (count.isdecimal() and int(count) > 0):
            raise UserError(f"--hostfile {path}, line {number}: {line.strip()!r} is not `NAME slots=GPUS`")
        hosts.append(HostEntry(words[0], int(count)))
    names = [host.name for host in hosts]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--hostfile {path} names {name} twice; give it one line with all its slots")
    if not hosts:
        raise UserError(f"--hostfile {path} names no host; write a line `NAME slots=GPUS` for each")
    return hosts


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
    """ServerAliveInterval with which `ssh` reaches a host, as `ssh -G` tells it; None where it does not tell."""
    try:
        told = subprocess.run(
            [*ssh, "-G", name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = next(
        (line.split() for line in told.stdout.splitlines() if line.startswith("serveraliveinterval ")), []
    )
    return int(words[1]) if len(words) == 2 and words[1].isdecimal() else None


class Host:
    """A probe on one host; close it when done.

    Args:
        ssh: the command that runs a command on a host; the host's name and the command are appended. None: a plain
            process of this machine.
    """

    def __init__(self, entry: HostEntry, ssh: Sequence[str] | None) -> None:
        self.name, self.slots = entry.name, entry.slots
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._said: list[str] = []
        command = [sys.executable, "-m", "launch.preflight.probe"]
        if ssh is not None:
            command = [*ssh, self.name, f"cd {shlex.quote(str(ROOT))} && {shlex.join(command)}"]
        try:
            self._process: subprocess.Popen[str] | None = subprocess.Popen(
                command,
                cwd=ROOT,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            self._process = None
            self._said.append(f"{command[0]}: {error.strerror}")
            return
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self) -> None:
        """Wait for the probe; UnreachableError with ssh's or Python's own words where none comes."""
        self._next(START_TIMEOUT_S)

    def ask(self, do: str, wait_s: float = 120.0, **request: Any) -> Any:
        """The probe's answer to a request (launch/preflight/probe.py); UnreachableError where none comes."""
        if self._process is None or self._process.stdin is None:
            raise UnreachableError(self._last_words())
        try:
            print(json.dumps({"do": do, **request}), file=self._process.stdin, flush=True)
        except OSError:
            raise UnreachableError(self._last_words()) from None
        return self._next(wait_s)["answer"]

    def clock_offset(self) -> tuple[float, float]:
        """(seconds that the host's clock is ahead of ours, how far that may be wrong): the quickest answer's."""
        best = (0.0, float("inf"))
        for _ in range(CLOCK_QUESTIONS):
            before = time.time()
            there = self.ask("time", wait_s=10)
            after = time.time()
            if (after - before) / 2 < best[1]:
                best = (there - (before + after) / 2, (after - before) / 2)
        return best

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):  # a question that it no longer read
                self._process.stdin.close()
            try:
                self._process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _next(self, timeout_s: float) -> Any:
        if self._process is None:
            raise UnreachableError(self._last_words())
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise UnreachableError(f"no answer within {timeout_s:.0f} s") from None
        if line is None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # ssh lives on without the probe
                self._process.wait(END_TIMEOUT_S)
            raise UnreachableError(self._last_words())
        return json.loads(line)

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # a login shell may greet first
                self._lines.put(line)
        self._lines.put(None)

    def _listen(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said = [*self._said[-4:], line.strip()]

    def _last_words(self) -> str:
        code = None if self._process is None else self._process.poll()
        time.sleep(0.1)  # the thread that reads its standard error may be behind
        return " / ".join(self._said) or f"ended with code {code}"


def all_reduce(hosts: Sequence[Host], address: str, port: int, backend: str, timeout_s: float) -> list[Any]:
    """Start a rank per slot on every host; what each rank left, in rank order."""
    world_size = sum(host.slots for host in hosts)
    answers: list[Any] = [None] * len(hosts)

    def ask(index: int) -> None:
        first = sum(host.slots for host in hosts[:index])
        environments = [
            {
                "RANK": str(first + local),
                "LOCAL_RANK": str(local),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": address,
                "MASTER_PORT": str(port),
                "DOCTOR_BACKEND": backend,
            }
            for local in range(hosts[index].slots)
        ]
        try:
            answers[index] = hosts[index].ask(
                "ranks", timeout_s + 30, environments=environments, timeout_s=timeout_s
            )
        except UnreachableError as error:
            answers[index] = [{"code": -1, "output": str(error)}]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [result for answer in answers for result in answer]
