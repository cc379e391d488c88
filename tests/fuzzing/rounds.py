"""Many damaged inputs, each read in a forked process that has all imports and may hang, die or swell."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.fuzzing.target import BAD, GOOD, Outcome, Target, outcome_of, try_once

BLOCK = 25
"""Tries of one process."""
SPARE_BYTES = 3 << 30
"""What a process may take beside what it has at its start."""


@dataclass
class Prepared:
    """A target with its undamaged input, and what is read of it: all processes inherit that."""

    target: Target
    pristine: Path
    expected: Any


@dataclass
class _Block:
    """A running process and what it was given."""

    process: Any
    prepared: Prepared
    seeds: list[int]
    """Of those the first is being tried."""
    since: float


def prepare(target: Target, folder: Path) -> Prepared:
    """Make and read an undamaged input in `folder`/NAME."""
    pristine = folder / target.name
    shutil.rmtree(pristine, ignore_errors=True)
    pristine.mkdir(parents=True)
    before = os.getcwd()
    target.make(pristine)
    # What is read may be changed by the reading: a copy.
    scratch = folder / f"{target.name}.read"
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(pristine, scratch, symlinks=True)
    try:
        os.chdir(scratch)
        expected = target.read(Path())
    finally:
        os.chdir(before)
    shutil.rmtree(scratch)
    return Prepared(target, pristine, expected)


def fuzz(
    work: Iterable[tuple[Prepared, Sequence[int]]],
    out: Path,
    processes: int,
    found: Callable[[Target, int, Outcome], None],
) -> None:
    """Try blocks of seeds until there are no more.

    Args:
        out: bad inputs stay here as CLASS-SEED, each with CLASS-SEED.json.
        found: called with every outcome.
    """
    running: dict[Connection, _Block] = {}
    blocks = iter(work)
    waiting: list[tuple[Prepared, Sequence[int]]] = []
    while True:
        while len(running) < processes and (block := waiting.pop() if waiting else next(blocks, None)):
            connection, started = _start(*block, out)
            running[connection] = started
        if not running:
            return
        for connection in [*wait(list(running), timeout=0.2)]:
            block = running[connection]
            try:
                outcome = connection.recv()
            except EOFError:
                del running[connection]
                block.process.join()
                if block.seeds:
                    text = f"the process ended with {block.process.exitcode}"
                    _keep(block, Outcome("raw", "see the folder", text), out, found)
                    waiting.append((block.prepared, block.seeds))
                continue
            _keep(block, outcome, out, found)
        for block in running.values():
            if block.seeds and time.monotonic() - block.since > block.prepared.target.timeout_s:
                block.process.kill()
                block.process.join()
                limit = f"no end within {block.prepared.target.timeout_s:g} s"
                _keep(block, Outcome("hung", "see the folder", limit), out, found)
                waiting.append((block.prepared, [*block.seeds]))
                block.seeds.clear()


def _keep(block: _Block, outcome: Outcome, out: Path, found: Callable[[Target, int, Outcome], None]) -> None:
    seed, target = block.seeds.pop(0), block.prepared.target
    block.since = time.monotonic()
    if outcome.kind in BAD:
        (out / f"{target.name}-{seed}.json").write_text(json.dumps(asdict(outcome), indent=1) + "\n")
    found(target, seed, outcome)


def _start(prepared: Prepared, seeds: Sequence[int], out: Path) -> tuple[Connection, _Block]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_try_all, args=(sender, prepared, seeds, out), daemon=True)
    process.start()
    sender.close()
    return receiver, _Block(process, prepared, [*seeds], time.monotonic())


def _try_all(sender: Connection, prepared: Prepared, seeds: Sequence[int], out: Path) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    for seed in seeds:
        folder = out / f"{prepared.target.name}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        sender.send(try_once(prepared.target, seed, prepared.pristine, folder, prepared.expected))


def replay(prepared: Prepared, folder: Path) -> Outcome:
    """Read a kept input once more, in this process."""
    copy = folder.with_name(f"{folder.name}.again")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy, symlinks=True)
    return outcome_of(prepared.target, "as kept", prepared.pristine, copy, prepared.expected)


def counts_table(counts: dict[str, Counter[str]]) -> list[list[str]]:
    """A row for each class, and one for all: tried, then each kind of outcome."""
    total: Counter[str] = sum(counts.values(), Counter())
    return [
        [name, *(f"{number:,}" for number in (sum(count.values()), *(count[kind] for kind in (*GOOD, *BAD))))]
        for name, count in {**counts, "all": total}.items()
    ]
