"""Do two commits compute the same, to the last bit? Run for every refactoring.

    python tests/compare_commits.py BASE [HEAD]        HEAD is by default the commit that is checked out
    python tests/compare_commits.py 1a2b3c4 --keep runs/compare

Each commit is checked out into a folder of its own and driven by its commands alone: a vocabulary and shards from the
same made-up text, the batches of steps 0, 7 and 1000, a teacher from random weights, and a distillation on two ranks
under ZeRO-2, once undisturbed and once resumed in the middle. Both must have written the same shard bytes, and have had
the same batch digests, losses, gradient norms, trust ratios, held-out scores and final weights. It takes about two
minutes for each commit on two cores.

Exit codes: 0 equal; 1 a commit differs, or one of its commands failed; 2 bad usage.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS, MIDDLE = 24, 12
BATCH_STEPS = (0, 7, 1000)
TIMES = ("time_", "startup_", "tokens_per_s", "mfu", "memory_gib", "checkpoint_gib")
"""Beginnings of the keys of metrics.jsonl that are no results."""

SHARED = ["--data.shards=shards", "--data.sequence_length=32", "--training.global_batch_size=32"]
TRAINING = [*SHARED, "--training.micro_batch_size=8", "--optimizer.lr=0.01", "--schedule.warmup_steps=4"]
TEACHER = [
    "--model.teacher=null",
    "--model.scratch={model_type: bert, hidden_size: 32, num_hidden_layers: 4, num_attention_heads: 4, "
    "intermediate_size: 64, max_position_embeddings: 64}",
    *("--objective.kd_weight=0", "--objective.cosine_weight=0", "--training.max_steps=4"),
]
STUDENT = [
    *("--model.layer_map=every_other", f"--training.max_steps={STEPS}"),
    *(f"--checkpoint.every_steps={MIDDLE}", "--checkpoint.keep_last=3", "--evaluation.every_steps=8"),
    "--run.log_every_steps=1",
]

Results = dict[str, str]
"""What is compared: a name -> its value as text."""


class CommandFailedError(Exception):
    """A command of one of the commits failed; the text is its output."""


def results_of(checkout: Path, work: Path) -> Results:
    """Run a checkout's commands in the folder `work`, and collect what they computed.

    Raises:
        CommandFailedError: a command failed.
    """
    work.mkdir(parents=True)
    (work / "corpus.txt").write_text(made_up_text())
    command(
        checkout,
        work,
        "data_prep/train_tokenizer.py",
        "corpus.txt",
        "--vocab-size",
        "300",
        "--out",
        "tokenizer",
    )
    command(
        *(checkout, work, "data_prep/write_shards.py", "corpus.txt", "--txt-documents", "line"),
        *(
            "--tokenizer",
            "tokenizer",
            "--out",
            "shards",
            "--shard-tokens",
            "20000",
            "--heldout-fraction",
            "0.1",
        ),
    )
    files = sorted(path for path in (work / "shards").rglob("[!.]*") if path.is_file())
    results = {str(path.relative_to(work)): digest(path.read_bytes()) for path in files}
    for step in BATCH_STEPS:
        output = command(
            checkout, work, "launch/inspect_batch.py", *SHARED, "--step", str(step), "--show", "0"
        )
        results[f"batch of step {step}"] = output.split("digest: ")[1].split()[0]
    command(checkout, work, "launch/pretrain.py", *TRAINING, *TEACHER, "--run.dir=teacher")
    student = [*TRAINING, *STUDENT, "--model.teacher=teacher/model"]
    command(checkout, work, "launch/pretrain.py", *student, "--run.dir=undisturbed", ranks=2)
    cut_off_after_middle(work / "undisturbed", work / "resumed")
    command(checkout, work, "launch/pretrain.py", *student, "--run.dir=resumed", ranks=2)
    for run in ("teacher", "undisturbed", "resumed"):
        results.update({f"{run}: {name}": value for name, value in results_of_run(work / run).items()})
    return results


def made_up_text() -> str:
    """1,500 documents of made-up words, the same at every call."""
    chance = random.Random(20)
    words = ["".join(chance.choices("abcdefghij", k=chance.randint(2, 7))) for _ in range(400)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    lines = (" ".join(chance.choices(words, weights, k=chance.randint(20, 120))) for _ in range(1500))
    return "".join(f"{line}.\n" for line in lines)


def command(checkout: Path, work: Path, script: str, *arguments: str, ranks: int = 1) -> str:
    """Output of a checkout's script; under DeepSpeed's launcher where there are several ranks."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", str(ranks)]
        start += ["--master_port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    ended = subprocess.run(
        [*start, str(checkout / script), *arguments],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
    )
    if ended.returncode != 0:
        raise CommandFailedError(f"{script} {' '.join(arguments)}\n{ended.stdout}{ended.stderr}")
    return ended.stdout


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def cut_off_after_middle(run: Path, target: Path) -> None:
    """Copy a run as a kill after its middle checkpoint would have left it."""
    shutil.copytree(run, target, symlinks=True)
    shutil.rmtree(target / "checkpoints" / f"step-{STEPS:08d}")
    (target / "summary.json").unlink()


def results_of_run(run: Path) -> Results:
    """Every figure of a run's metrics.jsonl that is no time, and a digest of each final tensor."""
    results: Results = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row: dict[str, Any] = json.loads(line)
        for name, value in row.items():
            if name != "step" and not name.startswith(TIMES):
                text = float(value).hex() if isinstance(value, int | float) else str(value)
                results[f"step {row['step']} {name}"] = text
    from safetensors.numpy import load_file

    for name, tensor in load_file(run / "model" / "model.safetensors").items():
        results[f"weights {name}"] = digest(tensor.tobytes())
    return results


def digest(content: bytes) -> str:
    """sha256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def differences(base: Results, head: Results) -> list[str]:
    """A line for each result that is not equal, or that one side lacks."""
    names = list({**base, **head})
    return [
        f"{name}: {base.get(name, 'missing')} -> {head.get(name, 'missing')}"
        for name in names
        if base.get(name) != head.get(name)
    ]


def commit_of(name: str) -> str:
    """The full id of a commit of this repository; SystemExit where there is none of that name."""
    found = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"],
        capture_output=True,
        text=True,
    )
    if found.returncode != 0:
        print(f"error: {name!r} is no commit of this repository; see git log", file=sys.stderr)
        raise SystemExit(2)
    return found.stdout.strip()


def check_out(commit: str, folder: Path) -> Path:
    """The files of a commit, in `folder`."""
    folder.mkdir(parents=True)
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=True
    ).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder


def main(arguments: Sequence[str]) -> int:
    """Compare two commits; see the top of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="a commit, tag or branch")
    parser.add_argument("head", nargs="?", default="HEAD", help="another one (default HEAD)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the checkouts and runs here")
    options = parser.parse_args(arguments)
    commits = {side: commit_of(name) for side, name in (("base", options.base), ("head", options.head))}
    if options.keep is not None and options.keep.exists():
        parser.error(f"--keep {options.keep} exists; name a new folder")
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        for side, commit in commits.items():
            print(f"{side} {commit}: running", flush=True)
            try:
                found[side] = results_of(
                    check_out(commit, folder / side / "checkout"), folder / side / "runs"
                )
            except CommandFailedError as error:
                print(f"error: at {side} {commit}: {error}", file=sys.stderr)
                return 1
    lines = differences(found["base"], found["head"])
    print("\n".join(lines or [f"equal to the last bit: {len(found['head'])} results"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
