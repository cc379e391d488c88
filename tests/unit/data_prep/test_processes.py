"""ProcessExecutor: answers, errors, and processes that are killed at any moment."""

from __future__ import annotations

import errno
import multiprocessing.spawn
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from data_prep.processes import ProcessExecutor, ProcessLost


def double(number: int) -> int:
    return 2 * number


def fail(name: str) -> None:
    raise KeyError(name)


def make_lock() -> object:
    return threading.Lock()


def kill_itself_while_it_answers(size: int) -> bytes:
    """The parent has read a part of the answer by then."""
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return bytes(size)


def wait_in(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(60)


def test_answers_come_in_order_and_errors_with_their_place() -> None:
    with ProcessExecutor(2) as pool:
        assert list(pool.map(double, range(20))) == [2 * number for number in range(20)]
        with pytest.raises(KeyError, match="nobody") as raised:
            pool.submit(fail, "nobody").result()
        assert "in fail" in str(raised.value.__cause__)
        with pytest.raises(RuntimeError, match=r"make_lock.*does not pickle"):
            pool.submit(make_lock).result()
        assert pool.submit(double, 4).result() == 8


def test_a_process_killed_at_work_is_lost_and_so_is_what_it_is_given_later(tmp_path: Path) -> None:
    with ProcessExecutor(1) as pool:
        waiting = pool.submit(wait_in, str(tmp_path))
        while not (names := os.listdir(tmp_path)):
            time.sleep(0.01)
        os.kill(int(names[0]), signal.SIGKILL)
        for lost in (waiting, pool.submit(double, 1)):
            with pytest.raises(ProcessLost, match=r"exit code -9\); run the same command again"):
                lost.result(timeout=30)


def test_a_process_killed_while_it_answers_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads until it is gone: half of an answer that fills the pipe is there."""
    with ProcessExecutor(1) as pool:
        pool.submit(double, 1).result()
        process, connection = pool._free.get()
        connection.send((kill_itself_while_it_answers, (10**7,), {}))
        process.join()
        pool._free.put((process, connection))
        monkeypatch.setattr(connection, "send", lambda work: None)
        with pytest.raises(ProcessLost, match="exit code -9"):
            pool.submit(double, 1).result(timeout=30)


def test_a_long_command_line_does_not_fill_the_pipe_of_a_process_that_ends_as_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["write_shards.py", *(f"corpus/{number:020}.gz" for number in range(9000))]
    )
    kept = multiprocessing.spawn.get_executable()
    multiprocessing.spawn.set_executable("/bin/false")
    try:
        with ProcessExecutor(1) as pool, pytest.raises(ProcessLost, match="exit code 1"):
            pool.submit(double, 1).result(timeout=30)
    finally:
        multiprocessing.spawn.set_executable(kept)
    assert len(sys.argv) == 9001


def test_a_process_that_cannot_be_started_is_an_oserror(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pipe() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(multiprocessing.get_context("spawn"), "Pipe", no_pipe)
    with ProcessExecutor(2) as pool, pytest.raises(OSError, match="Too many open files"):
        pool.submit(double, 1).result()
