"""Flip one random bit in a random file of a run's newest checkpoint, many times, and count what export makes of it.

    python tests/flip_bits.py RUN --tries 1000

The run is copied; it needs two whole checkpoints. Good is: the damaged step is passed over in one line that names it,
and the student is, bit for bit, that of the step before. Exit code 1 where any try ended otherwise.
"""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from launch.common.cli import command_parser
from train.checkpointing.checkpoint import newest_checkpoint, step_folders
from train.distributed.world import import_deepspeed, quiet_libraries
from train.errors import UserError
from train.export.hugging_face import load_student

GOOD = "passed over and named, the step before taken"
Weights = dict[str, torch.Tensor]


def main(arguments: Sequence[str]) -> int:
    """Copy, flip, count, print."""
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--tries", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    import_deepspeed("error")
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Path(shutil.copytree(options.run / "checkpoints", Path(folder, "checkpoints")))
        newest, before = step_folders(checkpoints)[:2]
        weights = {path: load_student(path).state_dict() for path in (newest, before)}
        files = sorted(path for path in newest.rglob("*") if path.is_file())
        rng, outcomes = random.Random(options.seed), Counter[str]()
        for _ in range(options.tries):
            file = rng.choice(files)
            whole = file.read_bytes()
            place, bit = rng.randrange(len(whole)), rng.randrange(8)
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            outcome = outcome_of(checkpoints, newest, weights)
            outcomes[outcome] += 1
            if outcome != GOOD:
                print(f"{outcome}: {file.relative_to(newest)}, byte {place}, bit {bit}", flush=True)
            file.write_bytes(whole)
    print(
        f"{options.tries} tries over {len(files)} files: "
        + ", ".join(f"{n} {o}" for o, n in outcomes.most_common())
    )
    return int(set(outcomes) != {GOOD})


def outcome_of(checkpoints: Path, damaged: Path, weights: dict[Path, Weights]) -> str:
    """What export makes of a run whose newest checkpoint is damaged.

    Args:
        weights: of the student of each whole checkpoint.
    """
    said: list[str] = []
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = newest_checkpoint(checkpoints, said.append)
            assert found is not None
            student = load_student(found).state_dict()
    except UserError:
        return "refused"
    except Exception:
        traceback.print_exc()
        return "raw"
    expected = weights[found]
    same = student.keys() == expected.keys() and all(
        torch.equal(student[name], value) for name, value in expected.items()
    )
    if not same:
        return "silent: other weights"
    if found == damaged:
        return "silent: the damage is not noticed"
    return GOOD if len(said) == 1 and str(damaged) in said[0] else "not said"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
