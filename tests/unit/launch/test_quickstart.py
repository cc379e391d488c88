"""The quickstart: its number format, measured once and kept; its folder, its shards, and what it refuses."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep import write_shards
from launch import quickstart
from tests.conftest import WORDS
from tests.distributed.data_prep_runs import contents
from train.errors import UserError
from train.models.cpu import precision


@pytest.mark.parametrize(("bf16", "expected"), [(1.9e11, "fp32"), (2.1e11, "bf16")])
def test_bf16_where_its_products_are_twice_as_fast(
    bf16: float, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "product_rates", lambda: (1e11, bf16))
    assert quickstart._settled_format("auto", tmp_path) == expected
    other = {"bf16": "fp32", "fp32": "bf16"}[expected]
    assert quickstart._settled_format(other, tmp_path) == other
    (tmp_path / "options.json").write_text(json.dumps({"format": other}))
    assert quickstart._settled_format("auto", tmp_path) == other


def test_a_folder_of_before_went_on_in_fp32(tmp_path: Path) -> None:
    before = {"scale": 1.0, "source": "installed-docs"}
    (tmp_path / "options.json").write_text(json.dumps(before))
    assert quickstart._settled_format("auto", tmp_path) == "fp32"
    quickstart._refuse_other_options(tmp_path, {**before, "format": "fp32"})
    with pytest.raises(UserError, match=r"was started with .*'format': 'fp32'"):
        quickstart._refuse_other_options(tmp_path, {**before, "format": "bf16"})


def test_runs_get_the_engine_and_the_teachers_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(quickstart, "_deepspeed", lambda *words: calls.append([str(word) for word in words]))
    monkeypatch.setattr(quickstart, "final_model", lambda folder: folder / "model")
    for number_format in ("fp32", "bf16"):
        for stage in quickstart.stages(tmp_path, 1.0, "text.txt", number_format):
            if stage.name in quickstart.STEPS:
                stage.work()
    found = [
        [word for word in call if "deepspeed.config" in word or "teacher_dtype" in word] for call in calls
    ]
    engine, teacher = "--deepspeed.config=ds_configs/cpu-bf16.json", "--model.teacher_dtype=bf16"
    assert found == [[], [], [], [engine], [engine, teacher], [engine, teacher]]


def test_stages_read_a_source_of_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(quickstart, "_run", lambda *words: calls.append(words))
    monkeypatch.chdir(tmp_path)
    (stage,) = (
        each for each in quickstart.stages(tmp_path, 1.0, "line:a.txt", "fp32") if each.name == "tokenizer"
    )
    stage.work()
    assert calls[0][2] == f"line:{tmp_path}/a.txt"


def test_quickstart_refuses_a_folder_of_another_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(
        UserError, match=r"holds checkpoints, which is not the quickstart's: give another --out"
    ):
        quickstart.main(["--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """How the quickstart starts write_shards, here without a process of its own."""

    def run(python: str, script: str, *words: object) -> None:
        assert script == "data_prep/write_shards.py"
        assert write_shards.main([*map(str, words), "--processes", "1"]) == 0

    monkeypatch.setattr(quickstart, "_run", run)
    return run


@pytest.mark.usefixtures("in_process")
def test_quickstart_refuses_too_little_text(tmp_path: Path, tokenizer_folder: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer").symlink_to(tokenizer_folder)
    (tmp_path / "few.txt").write_text("\n\n".join(["the small model reads a large shard fast"] * 3))
    with pytest.raises(ValueError, match=r"the source has too little text: \d+ tokens were held out"):
        quickstart.make_shards(tmp_path / "few.txt", out)
    assert not (out / "shards").exists(), "shards left behind would be taken for finished ones"


def test_the_command_that_the_quickstart_prints_makes_its_shards(
    tmp_path: Path, tokenizer_folder: str, in_process: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same folder, with the options of that line, gives the same bytes: its held-out share and size of a shard."""
    rng = random.Random(0)
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(300):
        (texts / f"{number}.txt").write_text(" ".join(rng.choices(WORDS, k=40)))
    (tmp_path / "tokenizer").symlink_to(tokenizer_folder)
    quickstart.make_shards(texts, tmp_path)
    (printed,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("python "))
    python, script, *words = shlex.split(printed)
    words[words.index("--out") + 1] = str(tmp_path / "again")
    in_process(python, script, *words)
    assert contents(tmp_path / "again") == contents(tmp_path / "shards")


def test_the_quickstart_s_folders_are_those_of_the_folder_it_is_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stages run from the repository's, or the installed package's."""
    started: list[object] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "_deepspeed", lambda *words: started.extend(words))
    stages_of = {stage.name: stage for stage in quickstart.stages(Path("q"), 1.0, "wiki.jsonl", "fp32")}
    stages_of["teacher"].work()
    assert {f"--run.dir={tmp_path}/q/teacher", f"--data.shards={tmp_path}/q/shards"} <= set(started)
