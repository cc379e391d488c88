"""Threads that read ahead: order, errors, and what is left of them when their consumer goes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import pytest

from tests.paths import ROOT
from train.data.prefetch import ConsumerLeft, ReadAhead, in_background


def test_items_come_in_order_and_an_error_after_those_before_it() -> None:
    def produce(left: threading.Event) -> Iterator[int]:
        yield from range(50)
        raise OSError("the disk is gone")

    items = in_background(produce, depth=3)
    assert [next(items) for _ in range(50)] == list(range(50))
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)


def test_an_item_is_made_once_and_freed_after_its_last_use() -> None:
    made: list[str] = []
    left = threading.Event()
    with ReadAhead(lambda key: made.append(key) or key.upper(), num_threads=3) as items:
        for step in range(4):
            items.request("a", step)
        items.request("b", 1)
        assert (items.get("a", left), items.get("b", left)) == ("A", "B")
        items.forget(0)
        assert len(items) == 2
        items.forget(1)
        assert (len(items), items.get("a", left)) == (1, "A")
        items.request("b", 5)
        assert items.get("b", left) == "B"
    assert sorted(made) == ["a", "b", "b"]


def test_the_error_of_an_item_comes_where_it_is_taken() -> None:
    left = threading.Event()
    with ReadAhead(lambda key: 1 // key, num_threads=1) as items:
        items.request(0, 0)
        items.request(1, 0)
        assert items.get(1, left) == 1
        with pytest.raises(ZeroDivisionError):
            items.get(0, left)


def test_who_waits_for_an_item_is_released_when_the_consumer_leaves() -> None:
    left, hang = threading.Event(), threading.Event()
    with ReadAhead(lambda key: hang.wait(10), num_threads=1) as items:
        items.request(0, 0)
        threading.Timer(0.2, left.set).start()
        with pytest.raises(ConsumerLeft):
            items.get(0, left)
        hang.set()


def test_a_reader_that_hangs_does_not_keep_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.data.prefetch._JOIN_S", 0.5)
    hang = threading.Event()

    def produce(left: threading.Event) -> Iterator[int]:
        with ReadAhead(lambda key: hang.wait(60), num_threads=2) as items:
            items.request(0, 0)
            yield 0
            items.get(0, left)

    items = in_background(produce, depth=1)
    next(items)
    start = time.monotonic()
    items.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 2
    hang.set()


def test_a_process_may_end_with_an_open_iterator() -> None:
    """Exit code and nothing on stderr: a thread inside torch or numpy would abort the process."""
    script = """
        import sys, threading
        import numpy, torch
        from train.data.prefetch import ReadAhead, in_background

        def work(key):
            return numpy.argsort(numpy.random.default_rng(key).random(300_000))

        def produce(left):
            with ReadAhead(work, 2) as items:
                for step in range(10**9):
                    items.request(step, step)
                    items.request(step + 1, step + 1)
                    yield torch.from_numpy(items.get(step, left)).sort()
                    items.forget(step)

        items = in_background(produce, 2)
        next(items)
        sys.exit(75)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (75, "")


def test_no_thread_outlives_the_iterator() -> None:
    def produce(left: threading.Event) -> Iterator[int]:
        with ReadAhead(lambda key: time.sleep(0.3) or key, num_threads=2) as items:
            for key in range(9):
                items.request(key, key)
            yield items.get(0, left)
            yield items.get(8, left)

    items = in_background(produce, depth=1)
    assert next(items) == 0
    items.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
