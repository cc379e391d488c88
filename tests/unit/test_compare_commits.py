"""tests/compare_commits.py on a repository whose commands are stand-ins of a few lines: what it runs and sees."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import compare_commits

STAND_INS = {
    "data_prep/train_tokenizer.py": """
        from pathlib import Path
        Path("tokenizer").mkdir()
    """,
    "data_prep/write_shards.py": """
        from pathlib import Path
        Path("shards/tokenizer").mkdir(parents=True)
        for name in ("manifest.json", "train-000000.tar", "tokenizer/tokenizer.json"):
            Path("shards", name).write_text(Path("corpus.txt").read_text() + {shards!r})
    """,
    "launch/inspect_batch.py": """
        import sys
        step = sys.argv[sys.argv.index("--step") + 1]
        print("digest:", f"{int(step) + {batch}:064x}")
    """,
    "launch/pretrain.py": """
        import json, sys
        from pathlib import Path
        import numpy as np
        from safetensors.numpy import save_file
        run = Path(next(word for word in sys.argv if word.startswith("--run.dir=")).partition("=")[2])
        resumed = (run / "checkpoints/step-00000012").exists()
        assert (run.name == "resumed") == resumed and not (run / "summary.json").exists()
        if run.name == "resumed":
            assert not (run / "checkpoints/step-00000024").exists()
        for step in (12, 24):
            (run / f"checkpoints/step-{step:08d}").mkdir(parents=True, exist_ok=True)
        rows = [{"step": step, "loss": step / 3 + {loss}, "time_data": id(run) % 1000} for step in range(25)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
        (run / "model").mkdir(exist_ok=True)
        save_file({"layer": np.full(3, 1 + {weight}, np.float32)}, run / "model/model.safetensors")
        (run / "summary.json").write_text("{}")
    """,
}
SAME = {"shards": "", "batch": 0, "loss": 0.0, "weight": 0.0}
DIFFERENT = {"shards": " ", "batch": 1, "loss": 2.0**-50, "weight": 2.0**-23}
"""One change each, as small as it can be; and the results that it changes."""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty git repository in place of this one; its commands run on one rank each."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    monkeypatch.setattr(compare_commits, "ROOT", folder)
    plain = compare_commits.command
    monkeypatch.setattr(compare_commits, "command", lambda *words, ranks=1: plain(*words))
    return folder


def git(folder: Path, *words: str) -> str:
    name = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(
        ["git", *name, *words], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def commit(folder: Path, **changes: object) -> str:
    """Commit the stand-ins with some values changed; its id."""
    for path, text in STAND_INS.items():
        for name, value in {**SAME, **changes}.items():
            text = text.replace(f"{{{name}!r}}", repr(value)).replace(f"{{{name}}}", repr(value))
        lines = [line.removeprefix(" " * 8) for line in text.strip("\n").splitlines()]
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("\n".join(lines))
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", "commit")
    return git(folder, "rev-parse", "HEAD")


def test_equal_commits(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = commit(repository)
    commit(repository)
    assert compare_commits.main([base, "--keep", str(tmp_path / "kept")]) == 0
    # 3 files, 3 batches, and of three runs 25 losses and a tensor.
    assert f"equal to the last bit: {3 + 3 + 3 * 26} results" in capsys.readouterr().out
    assert (tmp_path / "kept/head/runs/resumed/summary.json").exists()


@pytest.mark.parametrize("what", DIFFERENT)
def test_the_smallest_difference_is_named(
    what: str, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = commit(repository)
    head = commit(repository, **{what: DIFFERENT[what]})
    assert compare_commits.main([base, head]) == 1
    first = {
        "shards": "shards/manifest.json: ",
        "batch": "batch of step 0: ",
        "loss": "teacher: step 0 loss: ",
        "weight": "teacher: weights layer: ",
    }
    assert f"\n{first[what]}" in capsys.readouterr().out


def test_a_command_that_fails_is_shown(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = commit(repository)
    head = commit(repository, loss="no number")
    assert compare_commits.main([base, head]) == 1
    printed = capsys.readouterr().err
    assert f"error: at head {head}: launch/pretrain.py" in printed
    assert "TypeError" in printed


def test_what_is_no_commit_is_refused(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commit(repository)
    with pytest.raises(SystemExit) as ended:
        compare_commits.main(["nothing"])
    assert ended.value.code == 2
    assert "'nothing' is no commit" in capsys.readouterr().err
