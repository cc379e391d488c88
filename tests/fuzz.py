"""Damage every kind of input at random, and see that each is read rightly or refused in one message.

    python tests/fuzz.py --minutes 10                     all classes, on all cores
    python tests/fuzz.py --minutes 2 --only hostfile      one class
    python tests/fuzz.py --replay runs/fuzz/hostfile-17   a bad case once more, with its traceback

Outcomes: accepted (read as the undamaged input, or as what the damaged one now validly says), refused (one message that
names a file and a remedy); and the bad ones: raw (any other exception, or a message without that), silent (read as
something else), hung. A bad case stays in OUT/CLASS-SEED, with the outcome in OUT/CLASS-SEED.json.

Exit code 0: no bad outcome. 1: there was one.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

os.environ.update(
    OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"
)
os.environ.update(TQDM_DISABLE="1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.common.cli import command_parser
from launch.common.tables import Column, Table
from tests.fuzzing.classes import CLASSES
from tests.fuzzing.rounds import BLOCK, Prepared, counts_table, fuzz, prepare, replay
from tests.fuzzing.target import BAD, GOOD, Outcome, Target


def main(arguments: Sequence[str]) -> int:
    """Fuzz, or replay; print what came of it."""
    parser = command_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument(
        "--only", action="append", choices=sorted(CLASSES), metavar="CLASS", help="may be repeated"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the first try of each class (default 1)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--replay", type=Path, metavar="OUT/CLASS-SEED")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    if options.replay:
        folder = options.replay.resolve()
        outcome = replay(prepare(CLASSES[folder.name.rpartition("-")[0]], out / ".whole"), folder)
        print(f"{outcome.kind}: {outcome.text}")
        return int(outcome.kind in BAD)
    prepared = [prepare(CLASSES[name], out / ".whole") for name in options.only or CLASSES]
    counts = {each.target.name: Counter[str]() for each in prepared}

    def found(target: Target, seed: int, outcome: Outcome) -> None:
        counts[target.name][outcome.kind] += 1
        if outcome.kind in BAD:
            last = (outcome.text.strip().splitlines() or [""])[-1]
            print(f"{outcome.kind}: {target.name}-{seed} ({outcome.what}): {last}"[:300], flush=True)

    fuzz(
        _blocks(prepared, options.seed, time.monotonic() + 60 * options.minutes),
        out,
        options.processes,
        found,
    )
    columns = [Column("class", is_number=False), *map(Column, ("tried", *GOOD, *BAD))]
    print(Table("", columns, counts_table(counts)).as_text())
    return int(any(number[kind] for number in counts.values() for kind in BAD))


def _blocks(
    prepared: Sequence[Prepared], first: int, deadline: float
) -> Iterator[tuple[Prepared, Sequence[int]]]:
    for start in count(first, BLOCK):
        for each in prepared:
            if time.monotonic() > deadline:
                return
            yield each, range(start, start + BLOCK)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
