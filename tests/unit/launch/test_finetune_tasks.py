"""launch/finetune.py --task: `glue` is what there is of it, and says so; a task named itself must be there."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import finetune
from tests.tiny_tasks import save_encoder, write_sst2
from train.errors import UserError


def jobs(folder: Path, *tasks: str) -> list[str]:
    flags = ["--model", str(folder / "model"), "--data", str(folder), "--out", str(folder / "out")]
    options = finetune.parser().parse_args([*flags, "--task", *tasks])
    found = [finetune.job_of(task, options) for task in finetune.tasks_of(options.task)]
    return [job.task.name for job in finetune.jobs_with_data(found, options.task)]


def test_glue_is_what_the_folder_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_encoder(tmp_path / "model")
    write_sst2(tmp_path)
    (tmp_path / "SST-2").rename(tmp_path / "RTE")
    write_sst2(tmp_path)
    assert jobs(tmp_path, "glue") == ["sst2", "rte"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 7
    assert said[3].startswith(f"qqp is left out: no training set of QQP in {tmp_path}: looked for train.tsv")
    with pytest.raises(UserError, match="no training set of QQP"):
        jobs(tmp_path, "glue", "qqp")
    assert jobs(tmp_path, "SST-2", "sst-2", "sst2") == ["sst2"]
    (tmp_path / "SST-2").rename(tmp_path / "away")
    (tmp_path / "RTE").rename(tmp_path / "gone")
    with pytest.raises(
        UserError, match=r"holds none of the tasks cola, sst2, .*, wnli; give --data the folder"
    ):
        jobs(tmp_path, "GLUE")


def test_the_average_names_what_it_lacks() -> None:
    results = [
        {
            "task": task,
            "metrics": ["accuracy"],
            "median": {"score": score},
            "seeds": {"0": {"score": score, "seconds": 9.0}},
            "train_examples": 9,
            "dev_examples": {"dev": 9},
        }
        for task, score in (("sst2", 90.0), ("rte", 60.0))
    ]
    table = finetune.table_of(results)
    assert "GLUE (2 of 9)" in table
    assert table.endswith("GLUE's average is without cola, mrpc, stsb, qqp, mnli, qnli, wnli")
