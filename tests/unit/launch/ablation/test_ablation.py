"""The ablation's table, its figure, and its command with the training itself replaced."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from launch import ablate
from launch.ablation import runs as ablation_runs
from launch.ablation.figure import plot
from launch.ablation.table import Ablation, Result, Scale, as_json, as_markdown, as_text
from launch.ablation.variants import FULL, PUBLISHED, variants_of
from launch.common.cli import parse_config
from launch.experiments import job as experiment_job
from launch.experiments.run_folders import FREE_TO_DIFFER
from tests.paths import ROOT
from tests.tiny_shards import write_tiny_shards
from train.config import Config
from train.errors import UserError
from train.finetuning.results import write_scores
from train.finetuning.tasks import GLUE
from train.run_folder import as_tree, differing_keys

QUICKSTART = ["--config", str(ROOT / "launch" / "recipes" / "quickstart-student.yaml")]
HIDDEN = ["--objective.layer_cosine_weight=1", "--objective.layer_pairs=[[1,2]]"]
HELDOUT = {
    "heldout_kl": 0.05,
    "heldout_top1_agreement": 0.8,
    "heldout_mlm_loss": 4.9,
    "heldout_accuracy": 0.22,
}
MASKED = {"heldout_masking": "15 % of 64 tokens, uniform"}


def test_adamw_is_tried_at_rates_of_its_own() -> None:
    found, _ = variants_of(parse_config(QUICKSTART, ""), 4, 1, (3e-4, 1e-3))
    rates = {v.name: v.changes["optimizer.lr"] for v in found if v.name.startswith("adamw")}
    assert rates == {"adamw-0.0003": 3e-4, "adamw-0.001": 1e-3}
    results = [result(FULL, 0.05), dataclasses.replace(result("adamw", 0.06), changed="optimizer.lr=0.001")]
    assert "steps and learning rate, but for optimizer.lr=0.001; one" in as_text(Ablation(results, SMALL))


def test_differing_keys_leave_out_what_does_not_matter() -> None:
    before = as_tree(Config())
    now = as_tree(
        parse_config(["--run.dir=x", "--checkpoint.every_steps=7", "--evaluation.every_steps=9"], "")
    )
    assert differing_keys(before, now, FREE_TO_DIFFER) == []
    now = as_tree(parse_config(["--evaluation.max_windows=9", "--data.seed=4"], ""))
    assert differing_keys(before, now, FREE_TO_DIFFER) == [
        "data.seed: 0 -> 4",
        "evaluation.max_windows: 2048 -> 9",
    ]


def result(name: str, kl: float, scores: dict[str, float] | None = None) -> Result:
    return Result(name, "nothing", {**HELDOUT, "heldout_kl": kl}, 1000.0, scores or {})


SMALL = Scale(1_461_952, 1_858_752, 300, 1_228_800)
LARGE = Scale(66_985_530, 109_514_298, 100_000, 10**11)
RESULTS = [result("full", 0.05), result("no-kd", 0.09), result("no-mlm", 0.052), result("full-seed-1", 0.047)]


def test_differences_and_noise_by_hand() -> None:
    ablation = Ablation(RESULTS, SMALL)
    assert ablation.scores(RESULTS[1])["heldout_kl"].difference == pytest.approx(0.04)
    noise = ablation.noise()
    assert noise is not None
    assert noise["heldout_kl"] == pytest.approx(0.003)
    rows: dict[str, str] = defaultdict(str)  # a table too wide for a terminal is shown in parts
    for row in as_text(ablation).splitlines():
        if row.startswith("│"):
            rows[row.split("│")[1].strip()] += row
    assert "+0.0400" in rows["no-kd"]
    assert "+0.0400 ~" not in rows["no-kd"]
    assert "+0.0020 ~" in rows["no-mlm"]
    assert "-0.0030" in rows["full-seed-1"]
    assert "~" not in rows["full-seed-1"] + rows["full"]
    alone = Ablation(RESULTS[:2], SMALL)
    assert alone.noise() is None
    assert "how large chance is, is not known" in as_text(alone)


def test_the_scale_and_what_is_published_are_labelled() -> None:
    for text in (as_text(Ablation(RESULTS, SMALL)), as_markdown(Ablation(RESULTS, SMALL))):
        text = " ".join(text.split())
        assert "SMALL SCALE: student of 1.46M parameters, teacher of 1.86M; 300 steps, 1.23M tokens" in text
        assert "-2.96" in text
        assert "the paper's column: GLUE points lost in Sanh et al. 2019, table 4" in text
        assert "not measured here" in text
    assert "SMALL" not in as_text(Ablation(RESULTS, LARGE))
    assert dataclasses.replace(LARGE, tokens=10**8).is_small
    assert PUBLISHED == {"no-kd": -2.96, "no-cosine": -1.46, "no-mlm": -0.31, "random": -3.69}


def test_scores_of_tasks_and_a_missing_one() -> None:
    results = [
        result("full", 0.05, {"sst2": 80.0, "rte": 60.0}),
        result("no-kd", 0.09, {"sst2": 78.0, "rte": 57.0}),
        result("random", 0.5, {"sst2": 70.0}),
    ]
    ablation = Ablation(results, SMALL, finetuning_seeds=3, failed={"random": "fine-tuning: exit code 1"})
    assert ablation.scores(results[1])["mean"].difference == pytest.approx(-2.5)
    saved = {row["name"]: row for row in as_json(ablation)["variants"]}
    assert saved["full"]["glue"] == 70.0
    assert saved["no-kd"]["scores"] == {"sst2": 78.0, "rte": 57.0}
    assert saved["random"]["published_glue_difference"] == -3.69
    text = as_markdown(ablation)
    assert "| no-kd | `nothing` | 78.0 (-2.0) | 57.0 (-3.0) | 67.5 (-2.5) | -2.96 |" in text
    assert "| random | `nothing` | 70.0 (-10.0) | missing | missing | -3.69 |" in text
    assert "FAILED: random: fine-tuning: exit code 1" in text
    assert "median of 3 fine-tuning seeds" in text


def test_nothing_is_cut_off_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of GLUE, long numbers, long names."""
    monkeypatch.setenv("COLUMNS", "80")
    scores = dict.fromkeys(GLUE, 100.0)
    results = [
        result(name, -12.3456, scores) for name in ("full", "every-other", "distilbert", "full-seed-10")
    ]
    text = as_text(Ablation(results, SMALL, finetuning_seeds=3))
    assert "…" not in text
    tables = [line for line in text.splitlines() if line.startswith("│")]
    assert max(map(len, tables)) <= 80
    for score in ("-12.3456", "100.0"):
        assert sum(score in line for line in tables if "full-seed-10" in line) >= 1
    assert text.count("100.0") == len(results) * (len(GLUE) + 1)  # and their mean


def test_the_figure_is_a_png_without_a_legend_over_its_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [dataclasses.replace(entry, scores={"rte": 60.0}) for entry in RESULTS]
    ablation = Ablation(results, SMALL, finetuning_seeds=3, teacher={"heldout_mlm_loss": 4.7})
    drawn: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **b: drawn.append(figure) or savefig(figure, *a, **b)
    )
    plot(ablation, tmp_path / "ablation.png")
    assert not any(axes.get_legend() for axes in drawn[0].axes)
    assert any("dashed: the teacher itself" in text.get_text() for text in drawn[0].texts)
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def words(tmp_path: Path, teacher_folder: str, shards_folder: str) -> list[str]:
    inputs = [f"--model.teacher={teacher_folder}", f"--data.shards={shards_folder}"]
    return [*QUICKSTART, *inputs, "--out", str(tmp_path / "out"), "--ranks", "1", "--full-seeds", "1"]


class Stages:
    """Stands in for the training and the fine-tuning: leaves what they leave, and remembers their flags."""

    def __init__(self, codes: dict[str, int]) -> None:
        self.codes, self.commands = codes, []

    def __call__(self, command: Sequence[str], environment: Any) -> int:
        self.commands.append(list(command))
        if "--task" in command:
            scores = Path(command[command.index("--out") + 1]) / "sst2"
            scores.mkdir(parents=True)
            write_scores(scores, {"task": "sst2"}, {seed: {"score": 60.0 + seed} for seed in range(3)})
            return 0
        run_dir = Path(next(word for word in command if word.startswith("--run.dir=")).partition("=")[2])
        code = self.codes.get(run_dir.name, 0)
        if code == 0:
            (run_dir / "model").mkdir(parents=True)
            (run_dir / "model" / "config.json").write_text("{}")
            summary = {"steps": 300, "tokens": 1228800, "tokens_per_s": 9.0, "heldout": {**HELDOUT, **MASKED}}
            summary["heldout_before"] = {**HELDOUT, **MASKED, "teacher_heldout_mlm_loss": 4.7}
            summary["parameters"] = {"student": 1461952, "teacher": 1858752}
            (run_dir / "summary.json").write_text(json.dumps(summary))
        return code


def stages(monkeypatch: pytest.MonkeyPatch, **codes: int) -> Stages:
    stand_in = Stages({name.replace("_", "-"): code for name, code in codes.items()})
    monkeypatch.setattr(experiment_job, "run_stage", stand_in)
    return stand_in


def test_a_failed_variant_is_named_and_the_others_are_kept(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages(monkeypatch, no_mlm=1, random=-9)
    assert ablate.main(words) == 1
    printed = capsys.readouterr()
    assert "FAILED: no-mlm (exit code 1, see above)\nFAILED: random (killed by SIGKILL)" in printed.err
    saved = json.loads((tmp_path / "out" / "ablation.json").read_text())
    names = [row["name"] for row in saved["variants"]]
    assert names[:6] == ["full", "no-kd", "no-cosine", "masked-kd", "first-half", "last-half"]
    assert list(saved["failed"]) == ["no-mlm", "random"]
    assert saved["teacher"] == {"heldout_mlm_loss": 4.7}
    assert "the teacher itself, on the same masked tokens: MLM loss 4.7000 nats" in printed.out
    again = stages(monkeypatch)
    assert ablate.main(words) == 0
    assert len(again.commands) == 2
    assert "[1/11] full: the recipe as it is (nothing changed) - done before" in capsys.readouterr().out


def test_a_corpus_that_holds_nothing_out_is_refused_before_anything_is_trained(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_shards(tmp_path / "shards", heldout=0)
    none = stages(monkeypatch)
    message = (
        r"none could be scored: .*/shards holds out no window of 64 tokens .*with a larger --heldout-fraction"
    )
    with pytest.raises(UserError, match=message):
        ablate.main([*words, f"--data.shards={tmp_path}/shards"])
    assert none.commands == []


def test_scores_under_other_masks_are_taken_anew_once(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of an older version, which scored under the masks that it trained with."""
    stages(monkeypatch)
    words = [*words, "--variants", "no-kd"]
    assert ablate.main(words) == 0
    old = tmp_path / "out" / "no-kd"
    summary = json.loads((old / "summary.json").read_text())
    del summary["heldout"]["heldout_masking"]
    (old / "summary.json").write_text(json.dumps(summary))
    (old / "heldout_as_full.json").write_text(json.dumps(HELDOUT))  # scored by the recipe's masks
    scored = []
    monkeypatch.setattr(
        ablation_runs,
        "scorer",
        lambda config: lambda folder: scored.append(folder) or {**HELDOUT, "heldout_kl": 0.2},
    )
    for _ in range(2):
        assert ablate.main(words) == 0
        saved = json.loads((tmp_path / "out" / "ablation.json").read_text())
        assert [row["heldout"]["heldout_kl"] for row in saved["variants"]] == [0.05, 0.2]
        assert saved["heldout_masking"] == MASKED["heldout_masking"]
    assert scored == [old / "model"]


@pytest.mark.parametrize(
    ("codes", "code", "num_trained", "said"),
    [
        ({"full": 2}, 2, 1, "without the full recipe there is nothing to compare with"),
        ({"no_cosine": 75}, 75, 3, "run the same command again to go on"),
    ],
)
def test_what_ends_an_ablation_at_once(
    codes: dict[str, int],
    code: int,
    num_trained: int,
    said: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained = stages(monkeypatch, **codes)
    assert ablate.main(words) == code
    assert len(trained.commands) == num_trained
    assert said in capsys.readouterr().err


def test_tasks_are_scored_with_finetune(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = stages(monkeypatch)
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("sentence\tlabel\nthe model learns\t1\na layer\t0\n")
    more = ["--variants", "no-kd", "--tasks", "SST-2", "--data", str(tmp_path), "--seeds", "3"]
    assert ablate.main([*words, *more, "--finetune.max-train-examples=50"]) == 0
    command = called.commands[-1]
    assert Path(command[1]) == ROOT / "launch" / "finetune.py"
    run_dir = tmp_path / "out" / "no-kd"
    flags = ["--seeds=3", f"--data={tmp_path}", "--max-train-examples=50", "--task", "sst2"]
    assert command[2:] == [*flags, "--model", str(run_dir / "model"), "--out", str(run_dir / "scores")]
    assert not any("max-train-examples" in word for word in called.commands[0])
    saved = json.loads((tmp_path / "out" / "ablation.json").read_text())["variants"]
    assert [row["scores"] for row in saved] == [{"sst2": 61.0}, {"sst2": 61.0}]
    assert "[scores 2/2] no-kd: sst2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--run.dir=x"], "--run.dir has no effect here"),
        (["--ranks", "0"], "--ranks 0: give at least 1"),
        (["--data", "."], "--data has no effect without --tasks"),
        (["--seeds", "3"], "--seeds has no effect without --tasks"),
        (
            ["--tasks", "rte", "--data", ".", "--finetune.foo=1"],
            r"--finetune\.KEY=VALUE, which becomes --KEY=VALUE of launch/finetune\.py: .*--foo=1",
        ),
        (
            ["--tasks", "rte", "--data", ".", "--finetune.epochs=x"],
            r"launch/finetune\.py: argument --epochs: invalid float",
        ),
        (["--finetune.epochs=1"], r"--finetune\.\* has no effect without --tasks"),
        (["--tasks", "sst2", "--data", "nowhere"], "there is no folder nowhere"),
        (["--tasks", "rte", "--data", ".", "--finetune.epochs=0"], "--epochs is 0.0; give a number above 0"),
        (["--tasks", "rt", "--data", "."], "there is no task 'rt'; the tasks are cola"),
        (["--tasks", "rte", "--data", ".", "--seeds", "0"], "--seeds 0: give at least 1"),
        (["--variants", ","], "names nothing"),
        (["--variants", "no-kl"], "--variants no-kl: no such variant"),
        (["--objective.kd_wait=1"], "kd_wait"),
        (["--objective.kd_weight=-1"], r"objective.kd_weight=-1.0: give 0 or more"),
        (["stray"], "stray"),
    ],
)
def test_broken_options_are_refused_before_anything_is_trained(
    words: list[str], more: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained = stages(monkeypatch)
    with pytest.raises((UserError, FileNotFoundError), match=expected):
        ablate.main([*words, *more])
    assert not trained.commands
    assert not (tmp_path / "out").exists()


def test_a_missing_hostfile_is_refused(teacher_folder: str) -> None:
    with pytest.raises(UserError, match="--hostfile no-hosts: no such file"):
        ablate.main(["--hostfile", "no-hosts"])


def test_the_list_trains_nothing(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trained = stages(monkeypatch)
    assert ablate.main([*words, "--list"]) == 0
    printed = capsys.readouterr().out
    assert "│ last-half  │ model.layer_map=[2,3]" in printed
    assert "left out: distilbert: takes 6 layers" in printed
    assert not trained.commands
    assert not (tmp_path / "out").exists()
