"""`launch/finetune.py` from its command line: a teacher and a student it teaches, stopped and continued, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.paths import ROOT
from tests.tiny_tasks import save_encoder, write_sst2

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
QUICK = ["--learning-rate", "0.003", "--batch-size", "8"]


def command(*flags: object) -> list[str]:
    return [sys.executable, "launch/finetune.py", *map(str, flags)]


def run(*flags: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(*flags), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


def test_two_seeds_stopped_and_continued(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "model")
    data = write_sst2(tmp_path / "data")
    flags = ["--model", model, "--task", "sst2", "--data", data, "--out", tmp_path / "out", "--seeds", 2]
    flags += [*QUICK, "--epochs", "20", "--checkpoint-seconds", "0.1"]
    refused = run(*flags, "--hard-weight", "0.1")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "error: --hard-weight has no effect without --teacher; leave it out\n"

    process = subprocess.Popen(
        command(*flags), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    work = tmp_path / "out/sst2/.seed-0"
    deadline = time.monotonic() + 120
    while not list(work.glob("checkpoint-*/complete.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "sst2 seed 0: stopped at step" in said
    assert said.endswith("saved; run the same command again to go on\n")

    finished = run(*flags)
    assert finished.returncode == 0, finished.stderr
    assert "sst2 seed 0: going on from step" in finished.stdout
    assert "sst2 seed 1: accuracy " in finished.stdout
    assert "lowest to" in finished.stdout
    left = [line for line in finished.stderr.replace("\r", "\n").splitlines() if "examples" not in line]
    assert not "".join(left).strip(), "only progress bars on stderr"
    scores = json.loads((tmp_path / "out/sst2/scores.json").read_text())
    assert list(scores["seeds"]) == ["0", "1"]
    assert scores["median"]["score"] > 80
