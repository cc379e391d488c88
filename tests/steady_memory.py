"""Does a long run stay as it is? Thousands of quick steps on one rank: memory, open files, threads, sizes on disk.

    python tests/steady_memory.py --minutes 10 [--out DIR]

Trains a tiny model by the real command, with TensorBoard and a row of metrics for every step, and samples the process.
Prints, per 1,000 steps and from the second fifth of the run on (before, caches fill): the slope of the resident memory
and of the numbers of files and threads, and what metrics.jsonl and tensorboard/ grow by.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.common.cli import command_parser
from tests.conftest import WORDS
from tests.distributed.data_prep_runs import command as data_prep_command
from tests.distributed.data_prep_runs import run, write_corpus
from tests.paths import ROOT
from tests.tiny_tasks import save_encoder

MODEL = (
    "{model_type: bert, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 1, intermediate_size: 8, "
)
MODEL += "max_position_embeddings: 16}"
COLUMNS = ("resident memory (KiB)", "open files", "threads", "metrics.jsonl (KiB)", "tensorboard/ (KiB)")


def settings(out: Path) -> list[str]:
    """Of a run that would take for ever."""
    return [
        *("--model.teacher=null", f"--model.scratch={MODEL}", "--objective.kd_weight=0"),
        *("--objective.cosine_weight=0", f"--data.shards={out / 'shards'}", "--data.sequence_length=16"),
        *("--training.global_batch_size=4", "--training.micro_batch_size=4", "--data.lanes=4"),
        *("--training.max_steps=10000000", "--run.log_every_steps=1", "--checkpoint.every_steps=1000"),
        *("--evaluation.every_steps=1000", "--evaluation.max_windows=8", f"--run.dir={out / 'run'}"),
    ]


def sample(process: psutil.Process, run: Path) -> list[float]:
    """(step, then a number for each of COLUMNS)."""
    with (run / "metrics.jsonl").open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4000))
        rows = [line for line in file.read().splitlines() if line.endswith(b"}")]
    step = int(rows[-1].split(b'"step":')[1].split(b",")[0])
    board = sum(path.stat().st_size for path in (run / "tensorboard").iterdir())
    resident = process.memory_info().rss / 1024
    return [step, resident, process.num_fds(), process.num_threads(), size / 1024, board / 1024]


def main(arguments: Sequence[str]) -> None:
    """Train, sample every two seconds, fit lines."""
    parser = command_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=Path("runs/steady-memory"))
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    save_encoder(out / "encoder")
    run(data_prep_command(write_corpus(out / "corpus", WORDS), str(out / "encoder"), out / "shards"))
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *settings(out)]
    samples: list[list[float]] = []
    with (out / "output.txt").open("w") as output:
        job = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        process, deadline = psutil.Process(job.pid), time.monotonic() + 60 * options.minutes
        while time.monotonic() < deadline and job.poll() is None:
            time.sleep(2)
            metrics = out / "run" / "metrics.jsonl"
            if metrics.exists() and metrics.stat().st_size > 4000:
                samples.append(sample(process, out / "run"))
        assert job.poll() is None, (out / "output.txt").read_text()
        job.terminate()
        assert job.wait(60) == 75, (out / "output.txt").read_text()
    table = np.array(samples)
    late = table[len(table) // 5 :]
    print(f"{int(table[-1, 0]):,} steps")
    for index, name in enumerate(COLUMNS, start=1):
        slope = np.polyfit(late[:, 0], late[:, index], 1)[0] * 1000
        first, last = late[0, index], late[-1, index]
        print(
            f"{name}: {first:,.0f} at step {int(late[0, 0]):,}, {last:,.0f} at the end; {slope:+,.2f} per 1,000 steps"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
