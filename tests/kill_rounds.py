"""Kill -9 at random moments, in data preparation and in training, until so many kills are survived.

    python tests/kill_rounds.py --kills 200 [--seed S] [--out DIR]

A round prepares a corpus and trains on its shards on two ranks, and is killed and started again until it is through:
all processes of data preparation at once; of training one rank while it saves and steps, or both, from their first
moment on. Then every byte of the shards, every loss and every weight must be those of the undisturbed round. Finished
rounds stand in OUT/rounds.jsonl: the same command goes on after them.

Exit code 0: all survived. An AssertionError says what differs, and OUT keeps it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.update(
    OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"
)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.common.cli import command_parser
from tests.conftest import WORDS
from tests.distributed.data_prep_runs import command, contents, run, write_corpus
from tests.distributed.pretraining import finish, losses, start_without_launcher, weights
from tests.tiny_tasks import save_encoder

STEPS = 60
KILLS_OF_A_PART = 8
"""Of data preparation, and of training, in one round; then it may end."""


class Rounds:
    """The inputs, the undisturbed results, and the rounds that are compared with them."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.corpus, self.teacher, whole = out / "corpus", out / "teacher", out / "undisturbed"
        if not (whole / "done").exists():
            for path in (self.corpus, self.teacher, whole):
                shutil.rmtree(path, ignore_errors=True)
            write_corpus(self.corpus, WORDS)
            save_encoder(self.teacher)
            run(self.preparation(whole))
            codes = [
                finish(job) for job in start_without_launcher(self.settings(whole), whole / "run", [], [])
            ]
            assert [code for code, _ in codes] == [0, 0], codes
            (whole / "done").touch()
        self.shards = contents(whole / "shards")
        self.losses, self.weights = losses(whole / "run"), weights(whole / "run")

    def preparation(self, folder: Path) -> list[str]:
        return command(self.corpus, str(self.teacher), folder / "shards", "--processes", "2")

    def settings(self, folder: Path) -> list[str]:
        return [
            f"--data.shards={folder / 'shards'}",
            f"--model.teacher={self.teacher}",
            "--model.layer_map=every_other",
            *(
                "--data.sequence_length=32",
                "--training.global_batch_size=32",
                "--training.micro_batch_size=8",
            ),
            *(f"--training.max_steps={STEPS}", "--checkpoint.every_steps=1", "--run.log_every_steps=1"),
            *("--evaluation.every_steps=20", "--optimizer.lr=0.01"),
        ]

    def round(self, number: int, rng: random.Random) -> tuple[int, int]:
        """Kills in data preparation and in training; AssertionError where anything came out otherwise."""
        folder = self.out / f"round-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        in_preparation = self._prepare(folder, rng)
        assert contents(folder / "shards") == self.shards, f"{folder}: other shards"
        in_training = self._train(folder, rng)
        assert losses(folder / "run") == self.losses, f"{folder}: other losses"
        assert weights(folder / "run") == self.weights, f"{folder}: other weights"
        shutil.rmtree(folder)
        return in_preparation, in_training

    def _prepare(self, folder: Path, rng: random.Random) -> int:
        kills, longest = 0, 3.0
        while kills < KILLS_OF_A_PART:
            with subprocess.Popen(
                self.preparation(folder),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            ) as process:
                try:
                    assert process.wait(rng.uniform(0.1, longest)) == 0
                    return kills
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    kills += 1
        run(self.preparation(folder))
        return kills

    def _train(self, folder: Path, rng: random.Random) -> int:
        kills = 0
        while True:
            jobs = start_without_launcher(self.settings(folder), folder / "run", [], [])
            if kills < KILLS_OF_A_PART:
                both = rng.random() < 0.3
                if not both:
                    self._wait_for_a_row(folder / "run", jobs[0])
                time.sleep(rng.uniform(0, 8 if both else 1.5))
                if all(job.poll() is None for job in jobs):
                    for job in jobs if both else [rng.choice(jobs)]:
                        job.kill()
                    kills += 1
            ends = [finish(job) for job in jobs]
            codes = [code for code, _ in ends]
            if codes == [0, 0]:
                return kills
            assert set(codes) <= {-signal.SIGKILL, 1}, ends
            assert not any("Traceback" in output for _, output in ends), ends

    @staticmethod
    def _wait_for_a_row(run_dir: Path, job: object) -> None:
        def count() -> int:
            return len(losses(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0

        begun, deadline = count(), time.monotonic() + 120
        while count() == begun and job.poll() is None and time.monotonic() < deadline:  # type: ignore[attr-defined]
            time.sleep(0.05)


def main(arguments: Sequence[str]) -> None:
    """Rounds until there are enough kills; a line for each."""
    parser = command_parser(__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kill-rounds"))
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    record = out / "rounds.jsonl"
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    rounds = Rounds(out)
    while sum(sum(row["kills"]) for row in done) < options.kills:
        number = len(done)
        begun = time.monotonic()
        kills = rounds.round(number, random.Random(f"{options.seed}/{number}"))
        done.append({"round": number, "kills": kills, "seconds": round(time.monotonic() - begun)})
        with record.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(
            f"round {number}: {kills[0]} kills in data preparation, {kills[1]} in training; all equal",
            flush=True,
        )
    parts = [sum(row["kills"][part] for row in done) for part in (0, 1)]
    print(
        f"{sum(parts)} kills ({parts[0]} in data preparation, {parts[1]} in training) in {len(done)} rounds: shards, "
        "losses and weights are those of the undisturbed round"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
