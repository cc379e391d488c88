"""From files to scores with tiny models: trained, resumed, distilled, refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from launch import finetune
from tests.tiny_tasks import StopAfter, job_for, save_encoder, sentences, write_pairs, write_sst2
from train.errors import NonFiniteError, UserError
from train.finetuning import batches, classification
from train.finetuning.batches import Padding, epoch_batches
from train.finetuning.runs import check_task, run_task
from train.finetuning.settings import Job
from train.finetuning.soft_labels import class_order, mean_soft_labels, soft_label_loss
from train.finetuning.tasks import task_named
from train.finetuning.training import Stopped, newest_whole_checkpoint

QUICK = ["--epochs", "4", "--learning-rate", "0.01", "--batch-size", "8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sst2(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, model: str, data: Path) -> Path:
    """OUT of two seeds on a task that can be learnt."""
    out = tmp_path_factory.mktemp("out")
    job, _ = job_for(out, model, "sst2", data, *QUICK)
    run_task(job, range(2))
    return out


def weights(out: Path, task: str = "sst2", seed: int = 0) -> dict[str, torch.Tensor]:
    return load_file(out / task / f"seed-{seed}" / "model.safetensors")


def test_a_batch_holds_texts_of_like_length_and_an_epoch_all_of_them() -> None:
    lengths = np.random.default_rng(0).integers(2, 100, 1003)
    found = epoch_batches(lengths, 8, seed=0, epoch=0, group_by_length=True)
    assert sorted(np.concatenate(found)) == list(range(1003))
    assert sorted(map(len, found)) == [3] + [8] * 125
    padded = sum(lengths[batch].max() * len(batch) for batch in found)
    mixed = epoch_batches(lengths, 8, seed=0, epoch=0, group_by_length=False)
    assert padded < 1.1 * lengths.sum() < 1.5 * lengths.sum() < sum(lengths[b].max() * len(b) for b in mixed)
    again, other = (epoch_batches(lengths, 8, 0, epoch, True) for epoch in (0, 1))
    assert all((one == two).all() for one, two in zip(found, again, strict=True))
    assert (np.concatenate(other) != np.concatenate(found)).any()
    firsts = [lengths[batch].max() for batch in found]
    assert sorted(firsts, reverse=True) != firsts  # long texts do not come first


def test_padding_has_a_mask_where_it_pads() -> None:
    one, two = ({"input_ids": np.arange(length), "labels": np.float32(length)} for length in (2, 3))
    batch = Padding(9)([one, two])
    assert batch["input_ids"].tolist() == [[0, 1, 9], [0, 1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [2.0, 3.0]
    assert "attention_mask" not in Padding(9)([two, two])


def test_seeds_leave_models_and_scores(taught: Path, model: str, data: Path) -> None:
    scores = json.loads((taught / "sst2" / "scores.json").read_text())
    assert scores["median"]["score"] > 90
    assert scores["median"]["accuracy"] == np.mean([seed["accuracy"] for seed in scores["seeds"].values()])
    assert (scores["train_examples"], scores["dev_examples"], scores["metrics"]) == (
        96,
        {"dev": 32},
        ["accuracy"],
    )
    assert scores["settings"]["learning_rate"] == 0.01
    assert (scores["teacher"], scores["unlabelled"], scores["model"]) == ([], None, model)
    assert {path.name for path in (taught / "sst2").iterdir()} == {
        ".lock",
        "options.json",
        "scores.json",
        "seed-0",
        "seed-1",
    }
    loaded = AutoModelForSequenceClassification.from_pretrained(taught / "sst2" / "seed-0")
    tokenizer = AutoTokenizer.from_pretrained(taught / "sst2" / "seed-0")
    assert tokenizer.model_max_length == loaded.config.max_position_embeddings < 512
    assert loaded.config.id2label == {0: "negative", 1: "positive"}
    assert sum(weight.numel() for weight in loaded.parameters()) == scores["parameters"]
    assert scores["seeds"]["0"]["examples_per_s"] > 0
    assert not torch.equal(weights(taught)["classifier.weight"], weights(taught, seed=1)["classifier.weight"])


def test_bf16_changes_the_products_and_not_what_is_kept(
    taught: Path, model: str, data: Path, tmp_path: Path
) -> None:
    scores = run_task(job_for(tmp_path, model, "sst2", data, *QUICK, "--bf16")[0], range(1))
    assert scores["settings"]["bf16"] is True
    assert scores["median"]["score"] > 90
    half, full = weights(tmp_path), weights(taught)
    assert {weight.dtype for weight in half.values()} == {torch.float32}
    assert any(not torch.equal(half[name], full[name]) for name in full)


def test_finished_seeds_are_not_trained_again(taught: Path, model: str, data: Path, tmp_path: Path) -> None:
    shutil.copytree(taught, tmp_path / "out")
    before = (tmp_path / "out/sst2/seed-0/model.safetensors").stat()
    job, said = job_for(tmp_path / "out", model, "sst2", data, *QUICK)
    assert run_task(job, range(2))["task"] == "sst2"
    assert said == ["sst2: seeds 0 to 1 finished before"]
    (tmp_path / "link").symlink_to(model)  # as RUN/student is to RUN/model
    assert run_task(job_for(tmp_path / "out", str(tmp_path / "link"), "sst2", data, *QUICK)[0], range(2))
    (tmp_path / "out/sst2/scores.json").unlink()  # killed just before it was written
    scores = run_task(job, range(3))
    assert list(scores["seeds"]) == ["0", "1", "2"]
    assert "sst2 seed 1: finished before" in said
    assert (tmp_path / "out/sst2/seed-0/model.safetensors").stat() == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch-size", "16"], "settings.batch_size: 8 -> 16"),
        (["--max-train-examples", "9"], "settings.max_train_examples: None -> 9"),
    ],
)
def test_other_options_are_refused_by_name(
    taught: Path, model: str, data: Path, flags: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=rf"was begun with other options:\n  {said}\ngive another --out"):
        run_task(job_for(taught, model, "sst2", data, *QUICK, *flags)[0], range(2))


def test_a_task_that_diverges_leaves_the_others_their_scores(
    tmp_path: Path,
    model: str,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def diverges(job: Job, seeds: Sequence[int]) -> dict[str, Any]:
        if job.task.name == "sst2":
            raise NonFiniteError("sst2 seed 0: no numbers any more")
        return {"task": job.task.name}

    monkeypatch.setattr("train.finetuning.runs.run_task", diverges)
    monkeypatch.setattr(finetune, "table_of", lambda results: f"table of {results}")
    jobs = [
        dataclasses.replace(job_for(tmp_path, model, "sst2", data)[0], task=task_named(name))
        for name in ("sst2", "rte")
    ]
    assert finetune.run_jobs(jobs, range(1)) == 1
    printed = capsys.readouterr()
    assert "table of [{'task': 'rte'}]" in printed.out
    assert printed.err.count("sst2 FAILED: sst2 seed 0: no numbers any more") == 2  # at once, and last
    assert finetune.run_jobs(jobs[:1], range(1)) == 1
    assert "no scores" in capsys.readouterr().out


def test_other_contents_are_refused_by_name(tmp_path: Path, taught: Path, data: Path, model: str) -> None:
    shutil.copytree(taught, tmp_path / "out")
    shutil.copytree(data, tmp_path / "data")
    with pytest.raises(UserError, match=r"data: .*data.* -> "):
        run_task(job_for(tmp_path / "out", model, "sst2", tmp_path / "data", *QUICK)[0], range(3))
    options = tmp_path / "out/sst2/options.json"
    options.write_text(options.read_text().replace(str(data), str(tmp_path / "data")))
    (tmp_path / "data/SST-2/dev.tsv").write_text("sentence\tlabel\nthe fast\t1\n")
    with pytest.raises(UserError, match="contents of the data differ"):
        run_task(job_for(tmp_path / "out", model, "sst2", tmp_path / "data", *QUICK)[0], range(3))
    other = save_encoder(tmp_path / "model", seed=1)
    options.write_text(options.read_text().replace(model, other))
    with pytest.raises(UserError, match="contents of the model differ"):
        run_task(job_for(tmp_path / "out", other, "sst2", tmp_path / "data", *QUICK)[0], range(2))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, model: str, data: Path) -> Path:
    """OUT of a seed that was stopped in the second of four epochs."""
    out = tmp_path_factory.mktemp("stopped")
    job, _ = job_for(out, model, "sst2", data, *QUICK, "--checkpoint-seconds", "0")
    with pytest.raises(Stopped, match="sst2 seed 0: stopped at step 17 of 48, saved"):
        run_task(dataclasses.replace(job, stop=StopAfter(17)), range(1))
    return out


@pytest.mark.parametrize("damage", ["none", "truncated", "unfinished"])
def test_a_stopped_seed_goes_on_as_if_it_had_not_been(
    tmp_path: Path, taught: Path, stopped: Path, model: str, data: Path, damage: str
) -> None:
    """It ends with the weights of the run that was not stopped, bit for bit."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    job, said = job_for(tmp_path, model, "sst2", data, *QUICK)
    work = tmp_path / "sst2" / ".seed-0"
    assert sorted(path.name for path in work.iterdir()) == ["checkpoint-16", "checkpoint-17"]
    newest = work / "checkpoint-17"
    if damage == "truncated":
        optimizer = newest / "optimizer.pt"
        optimizer.write_bytes(optimizer.read_bytes()[:-100])
    elif damage == "unfinished":
        (newest / "complete.json").unlink()
    for checkpoint in work.iterdir():  # as long to read as an hour of training
        seconds = checkpoint / "seconds.json"
        assert 0 < float(seconds.read_text()) < 1000
        seconds.write_text(f"{float(seconds.read_text()) + 3600:019.15f}"[: seconds.stat().st_size])
    scores = run_task(job, range(1))
    assert 3600 < scores["seeds"]["0"]["seconds"] < 4600
    step = 17 if damage == "none" else 16
    assert f"sst2 seed 0: going on from step {step} of 48" in said
    assert any("checkpoint-17 is not whole" in line for line in said) == (damage != "none")
    assert not work.exists()
    expected = weights(taught)
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path).items())
    assert (
        scores["seeds"]["0"]["score"]
        == json.loads((taught / "sst2/scores.json").read_text())["seeds"]["0"]["score"]
    )


def test_without_a_whole_checkpoint_a_seed_begins_again(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "model.safetensors").write_text("x")
    assert newest_whole_checkpoint(tmp_path, lambda line: None) is None
    assert not list(tmp_path.iterdir())


def test_a_stop_between_seeds_and_during_the_evaluation(
    tmp_path: Path, model: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs = []
    real = batches.epoch_batches
    monkeypatch.setattr(batches, "epoch_batches", lambda *words: epochs.append(words[3]) or real(*words))
    job, _ = job_for(tmp_path, model, "sst2", data, *QUICK, "--checkpoint-seconds", "0")
    with pytest.raises(
        Stopped, match="sst2 dev: stopped"
    ):  # 1 look before the seed, 47 steps before the last
        run_task(dataclasses.replace(job, stop=StopAfter(48)), range(1))
    assert epochs == [0, 1, 2, 3]
    with pytest.raises(Stopped, match="sst2: stopped before seed 0"):
        run_task(dataclasses.replace(job, stop=StopAfter(0)), range(1))
    job, said = job_for(tmp_path, model, "sst2", data, *QUICK, "--checkpoint-seconds", "0")
    assert run_task(job, range(1))["median"]["score"] > 90
    assert "sst2 seed 0: going on from step 48 of 48" in said


def test_numbers_that_are_none_end_the_run(tmp_path: Path, model: str, data: Path) -> None:
    job, _ = job_for(tmp_path, model, "sst2", data, "--learning-rate", "1e30", "--epochs", "1")
    with pytest.raises(
        NonFiniteError, match=r"sst2 seed 0: .* no numbers any more; give a lower --learning-rate"
    ):
        run_task(job, range(1))


@pytest.mark.parametrize("family", ["distilbert", "roberta"])
def test_pairs_and_regression_with_other_families(tmp_path: Path, family: str) -> None:
    student = save_encoder(tmp_path / family, family)
    header = "index\tsentence1\tsentence2\tscore"
    data = write_pairs(tmp_path / "data" / "STS-B", header, ["0.0", "2.5", "5.0"])
    job, said = job_for(tmp_path / "out", student, "stsb", data, "--max-eval-examples", "10", "--epochs", "1")
    scores = run_task(job, range(1))
    assert scores["metrics"] == ["pearson", "spearman"]
    assert scores["dev_examples"] == {"dev": 10}
    assert np.isfinite(scores["median"]["score"])
    positions = 64 if family == "roberta" else 66
    assert f"stsb: {student} has positions for {positions} tokens; texts are cut there, not at 128" in said
    config = json.loads((tmp_path / "out/stsb/seed-0/config.json").read_text())
    assert (config["problem_type"], list(config["id2label"])) == ("regression", ["0"])


def test_what_cannot_be_is_refused_before_anything_is_trained(
    tmp_path: Path, taught: Path, model: str, data: Path
) -> None:
    other = write_pairs(
        tmp_path / "RTE", "index\tsentence1\tsentence2\tlabel", ["entailment", "not_entailment"]
    )
    teacher = str(taught / "sst2" / "seed-0")
    for task, folder, flags, said in (
        ("sst2", tmp_path, [], "no training set of SST-2"),
        (
            "rte",
            other,
            ["--teacher", teacher],
            r"teacher .*seed-0 has the labels negative, positive, the task entailment",
        ),
        (
            "sst2",
            data,
            ["--teacher", model, "--unlabelled", "none.txt"],
            "--unlabelled none.txt: there is no such file",
        ),
        ("sst2", data, ["--teacher", "./none"], "there is no model folder ./none"),
    ):
        with pytest.raises(UserError, match=said):
            check_task(job_for(tmp_path / "out", model, task, folder, *flags)[0])
    with pytest.raises(UserError, match="is not fine-tuned"):
        run_task(job_for(tmp_path / "out", model, "sst2", data, "--teacher", model)[0], range(1))


def test_an_ensemble_labels_and_the_student_learns(
    tmp_path: Path, taught: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts without labels alone; the student has other tokens than its teachers; labelled once for all seeds."""
    student = save_encoder(tmp_path / "student", "roberta")
    unlabelled = tmp_path / "texts.txt"
    unlabelled.write_text("\n".join(text for text, _ in sentences(96, 7)) + "\n")
    teachers = [str(taught / "sst2" / f"seed-{seed}") for seed in (0, 1)]
    flags = ["--teacher", *teachers, "--unlabelled", str(unlabelled), *QUICK, "--epochs", "6"]
    calls = []
    real = classification.predict
    monkeypatch.setattr(classification, "predict", lambda *words: calls.append(words[-1]) or real(*words))
    job, _ = job_for(tmp_path / "out", student, "sst2", data, *flags, "--unlabelled-only")
    scores = run_task(job, range(1))
    assert (scores["train_examples"], scores["settings"]["hard_weight"]) == (96, 0.0)
    assert scores["median"]["score"] > 80
    assert scores["teacher"] == teachers
    assert calls == ["sst2 labels of seed-0", "sst2 labels of seed-1", "sst2 dev"]
    run_task(job, range(2))
    assert calls[3:] == ["sst2 dev"]  # the labels are kept
    logits = sorted((tmp_path / "out/sst2/soft-labels").iterdir())
    assert len(logits) == 2
    assert logits[0].stat().st_size == 32 + 4 * 96 * 2
    logits[0].write_bytes(logits[0].read_bytes()[:99])
    with_labels, _ = job_for(tmp_path / "both", student, "sst2", data, *flags, "--epochs", "1")
    assert run_task(with_labels, range(1))["train_examples"] == 192


def test_a_regression_learns_from_its_teachers_numbers(tmp_path: Path, model: str) -> None:
    data = write_pairs(tmp_path / "STS-B", "index\tsentence1\tsentence2\tscore", ["1.0", "4.0"])
    flags = [*QUICK, "--max-length", "64"]
    run_task(job_for(tmp_path / "teacher", model, "stsb", data, *flags)[0], range(1))
    job, _ = job_for(
        tmp_path / "out", model, "stsb", data, *flags, "--teacher", str(tmp_path / "teacher/stsb/seed-0")
    )
    scores = run_task(job, range(1))
    assert "temperature" not in scores["settings"]
    assert not torch.equal(
        weights(tmp_path / "out", "stsb")["classifier.weight"],
        weights(tmp_path / "teacher", "stsb")["classifier.weight"],
    )


def test_soft_label_loss_is_its_formula() -> None:
    """Worked in fp64 from the definitions; a text without a label counts with its soft one alone."""
    rng = np.random.default_rng(0)
    student, first, second = rng.normal(size=(3, 4, 3))
    labels, temperature, weight = np.array([2, 0, -100, 1]), 3.0, 0.3

    def softmax(values: np.ndarray) -> np.ndarray:
        return np.exp(values) / np.exp(values).sum(axis=1, keepdims=True)

    target = (softmax(first / temperature) + softmax(second / temperature)) / 2
    assert mean_soft_labels([first, second], temperature) == pytest.approx(target, abs=1e-6)
    kl = temperature**2 * (target * (np.log(target) - np.log(softmax(student / temperature)))).sum(axis=1)
    ce = -np.log(softmax(student)[np.arange(4), labels.clip(0)])
    expected = np.where(labels >= 0, weight * ce + (1 - weight) * kl, kl).mean()
    tensors = [torch.from_numpy(array) for array in (student, target, labels)]
    assert float(soft_label_loss(*tensors, temperature, weight)) == pytest.approx(expected, rel=1e-10)
    numbers = torch.tensor([1.0, float("nan")])
    loss = soft_label_loss(torch.tensor([[3.0], [3.0]]), torch.tensor([[2.0], [5.0]]), numbers, 2.0, 0.25)
    assert float(loss) == pytest.approx((0.25 * 4 + 0.75 * 1 + 4) / 2)
    assert mean_soft_labels([np.array([[1.0]]), np.array([[2.0]])], None) == pytest.approx(np.array([[1.5]]))


def test_a_teachers_classes_are_matched_by_name() -> None:
    named = SimpleNamespace(num_labels=2, id2label={0: "Positive", 1: "NEGATIVE"})
    assert class_order("t", named, ("negative", "positive")) == [1, 0]
    unnamed = SimpleNamespace(num_labels=2, id2label={0: "LABEL_0", 1: "LABEL_1"})
    assert class_order("t", unnamed, ("negative", "positive")) == [0, 1]
    with pytest.raises(
        UserError, match=r"teacher t has 2 labels \(label_0, label_1\), the task 3 labels \(a, b, c\)"
    ):
        class_order("t", unnamed, ("a", "b", "c"))
    with pytest.raises(
        UserError, match="the task one number, a regression; give a teacher that was fine-tuned on"
    ):
        class_order("t", unnamed, None)
