"""Processes that need not import torch, DeepSpeed and transformers: forked from one that has, and done with alone.

What a rank is made of (its memory, its sockets, its end by a signal) is its own; a short job takes one second of
processor time in place of ten.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from tests.paths import ROOT

# All that a rank needs until its last step.
IMPORTED = ["launch.common.cli", "train.run", "torch.utils.tensorboard"]
IMPORTED += [f"transformers.models.{name}.modeling_{name}" for name in ("bert", "distilbert", "roberta")]
IMPORTED.append("tests.distributed.ranks.imported")  # the last
# Read while they are imported.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCH_CPP_LOG_LEVEL": "ERROR"}
# Killed processes leave tqdm's semaphore behind, which the tracker removes at the end, and would say.
ENVIRONMENT["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"


class Forked:
    """As much of subprocess.Popen as the tests use, with stdout and stderr in one."""

    def __init__(
        self,
        function: Callable[..., None],
        *args: Any,
        environment: Mapping[str, str],
        folder: Path = ROOT,
        before: Callable[[], None] | None = None,
    ) -> None:
        _start_server()
        self._output = tempfile.NamedTemporaryFile()  # noqa: SIM115 - closed with this object
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(
            target=_run,
            args=(self._output.name, dict(environment), str(folder), before, function, args),
            daemon=True,
        )
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        """The exit code, negative after a signal; None while the process runs."""
        return self._process.exitcode

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        if self.poll() is None and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """All output, after the end; TimeoutExpired where that does not come."""
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("forked process", timeout or 0.0)
        return Path(self._output.name).read_text(), None


def run_script(path: str, *arguments: str) -> None:
    """What `python path arguments` does."""
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def _start_server() -> None:
    kept = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _run(
    output: str,
    environment: dict[str, str],
    folder: str,
    before: Callable[[], None] | None,
    function: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if before is not None:
        before()
    function(*args)
