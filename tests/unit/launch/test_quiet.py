"""Commands in processes of their own: no library of theirs writes to stderr, and an error is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.tiny_shards import write_tiny_shards
from tests.unit.launch.reporting.given import scores, write_scores

# Each command in a child, so that none is quiet because of another; what takes seconds to import is imported once.
SCRIPT = """
import gc, json, os, runpy, sys
import train.build
gc.freeze()
for words in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
    print("exit code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_commands_are_quiet(tmp_path: Path, teacher_folder: str) -> None:
    pytest.importorskip("onnxruntime")
    write_tiny_shards(tmp_path / "shards")
    scored = write_scores(tmp_path / "scores", sst2=scores("sst2", 90.0))
    commands = [
        ["launch/report.py", "--out", str(tmp_path / "report"), "--scores", f"a={scored}"],
        ["launch/export.py", teacher_folder, str(tmp_path / "onnx"), "--onnx", "--int8"],
        ["launch/inspect_batch.py", "--shards", str(tmp_path / "shards"), "--step", "0", "--world-size", "3"],
    ]
    words = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit code")]
    assert codes == ["exit code 0", "exit code 0", "exit code 2"], done.stderr
    assert done.stderr.startswith("error: a world size of 3 does not fit")
    assert done.stderr.count("\n") == 1
