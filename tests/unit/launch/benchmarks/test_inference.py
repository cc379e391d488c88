"""launch/benchmark.py inference: the right models, in turns, with figures that follow from the seconds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering, DistilBertConfig, DistilBertForMaskedLM

from launch.benchmarks import inference
from launch.benchmarks.inference_models import (
    STSB_LENGTHS,
    Contender,
    Workload,
    as_classifier,
    load_contenders,
    make_workloads,
    numbers,
)
from train.errors import UserError
from train.models.loading import load_with_saved_head


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    inference.add_arguments(parser)
    return parser.parse_args(list(words))


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    config = DistilBertConfig(
        vocab_size=72, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64
    )
    DistilBertForMaskedLM(config).save_pretrained(folder)
    return folder


def test_json_table_and_ratios(
    teacher_folder: str, student_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    words = ["--model", f"teacher={teacher_folder}", "--model", f"student={student_folder}"]
    words += ["--runtimes", "eager,onnx,onnx-int8", "--lengths", "16", "--batch-sizes", "1,4"]
    words += ["--rounds", "3", "--threads", "1", "--json", str(tmp_path / "i.json")]
    assert inference.main(options(*words)) == 0
    report = json.loads((tmp_path / "i.json").read_text())
    assert [model["name"] for model in report["models"]] == ["teacher", "student"]
    assert report["reference"] == "teacher"
    for model in report["models"]:
        kinds = [(row["workload"], row["runtime"], row["batch"]) for row in model["rows"]]
        assert kinds == [
            (name, runtime, batch)
            for name, batch in (("STS-B", 1), ("", 1), ("", 4))
            for runtime in ("eager", "onnx", "onnx-int8")
        ]
        for row in model["rows"]:
            low, high = row["latency_ms_range"]
            assert 0 < low <= row["latency_ms"] <= high
            assert row["sentences_per_s"] == pytest.approx(1000 * row["batch"] / row["latency_ms"])
            assert row["rounds"] == (3 if row["batch"] == 1 else 2)
        assert model["bytes"] >= 4 * model["parameters"]
        assert model["bytes_by_runtime"]["onnx-int8"] < model["bytes_by_runtime"]["onnx"]
    assert report["models"][0]["parameters"] > report["models"][1]["parameters"]
    assert len(report["ratios"]) == 9
    printed = capsys.readouterr().out
    assert "published, BERT-base scale: Sanh et al. 2019, arXiv:1910.01108, table 3: 1,500 pairs" in printed
    assert "668 s and 410 s, 1.63 times faster" in printed
    seconds = [model["rows"][0]["latency_ms"] * 1.5 for model in report["models"]]
    assert f"teacher {seconds[0]:.1f} s, student {seconds[1]:.1f} s" in printed


def test_figures_follow_from_the_seconds() -> None:
    model = torch.nn.Linear(2, 2)
    contenders = [Contender(name, "", model, "", {"eager": 24}) for name in ("slow", "quick")]  # type: ignore[arg-type]
    workloads = [Workload("", 8, 16.0, {})]
    times = {(0, "eager", "slow"): [1.0, 2.0, 3.0], (0, "eager", "quick"): [1.0, 0.5, 1.0]}
    report = inference.summarise(contenders, workloads, times, options())
    row = report["models"][0]["rows"][0]
    assert (row["latency_ms"], row["latency_ms_range"], row["sentences_per_s"]) == (2000, [1000, 3000], 4)
    # Of 1, 4 and 3: each round by itself.
    assert [ratio["times_faster"] for ratio in report["ratios"]] == [3.0]
    assert report["ratios"][0]["times_faster_range"] == [1.0, 4.0]
    assert report["models"][1]["parameters"] == 6


def test_models_take_turns_and_the_first_round_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = iter(range(1000))
    monkeypatch.setattr(inference.time, "perf_counter", lambda: float(next(clock)))

    def noting(name: str) -> Callable[[Any], None]:
        return lambda inputs: calls.append(name)

    model: Any = torch.nn.Linear(1, 1)
    contenders = [
        Contender(name, "", model, "", {}, {"eager": noting(f"{name} eager"), "onnx": noting(f"{name} onnx")})
        for name in ("a", "b")
    ]
    inputs = {"input_ids": torch.zeros(1, 3, dtype=torch.long)}
    workload = Workload("", 1, 3.0, {"a": [inputs, inputs], "b": [inputs, inputs]})
    times = inference.measure(contenders, [workload], 2, "cpu", {})
    turn = ["a eager"] * 2 + ["b eager"] * 2 + ["a onnx"] * 2 + ["b onnx"] * 2
    assert calls == turn * 3
    assert {len(seconds) for seconds in times.values()} == {2}
    assert set(times[0, "eager", "a"]) == {0.5}  # one tick for two batches


def test_a_runtime_that_does_not_work_here_is_left_out(
    teacher_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(**inputs: Any) -> None:
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(torch, "compile", lambda model, dynamic: no_compiler)
    words = ["--runtimes", "compile,eager", "--lengths", "8", "--batch-sizes", "1", "--rounds", "1"]
    assert inference.main(options("--model", f"one={teacher_folder}", *words)) == 0
    assert "compile is left out: no C++ compiler found" in capsys.readouterr().out


def test_lengths_of_the_paper() -> None:
    """STS-B's dev set in BERT's vocabulary: 1,500 pairs of 11 to 87 tokens, 31.47 on average."""
    assert sum(STSB_LENGTHS) / len(STSB_LENGTHS) == pytest.approx(31.47, abs=0.2)


def test_heads(teacher_folder: str, tmp_path: Path) -> None:
    """A vocabulary's head gives way to one output, the encoder stays; other heads stay as they are."""
    masked = load_with_saved_head(Path(teacher_folder))
    classifier, words = as_classifier(masked)
    assert words == "one output in place of the vocabulary's"
    given = {"input_ids": torch.arange(5, 12)[None], "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    with torch.no_grad():
        hidden = classifier.base_model(**given).last_hidden_state
        assert torch.equal(hidden, masked.base_model(**given).last_hidden_state)
        assert classifier(**given).logits.shape == (1, 1)
    span = BertForQuestionAnswering(
        BertConfig(
            vocab_size=72, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
        )
    )
    assert as_classifier(span) == (span, "question-answering")


def test_defaults_are_the_published_shapes() -> None:
    with torch.device("meta"):  # shapes alone
        bert, distilbert = load_contenders([])
    assert (bert.parameters, distilbert.parameters) == (109_483_009, 66_954_241)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "teacher"], "--model teacher: give NAME=DIR"),
        (["--model", "a={t}", "--model", "a={t}"], "there is a model 'a' already"),
        (["--model", "a=nowhere"], "nowhere is not a Hugging Face folder"),
        (["--model", "a={t}", "--lengths", "65"], "--lengths 65: a has positions for 64 tokens"),
        (["--model", "a={t}", "--lengths", "8,x"], "--lengths 8,x: give positive numbers with commas"),
        (["--model", "a={t}", "--batch-sizes", "0"], "--batch-sizes 0: give positive numbers"),
        (["--runtimes", "eager,tflite"], "--runtimes tflite: there are eager, compile, onnx, onnx-int8"),
    ],
)
def test_bad_input_is_named(words: list[str], message: str, teacher_folder: str) -> None:
    with pytest.raises(ValueError, match=message):
        inference.main(options(*(word.replace("{t}", teacher_folder) for word in words)))


def test_onnx_on_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="ONNX Runtime is measured on the CPU alone"):
        inference.chosen_runtimes("eager,onnx", "cuda")


def test_texts_replace_the_lengths(teacher_folder: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text("the student reads\tthe shard\n" + "the teacher learns fast\n" * 149 + "\n")
    contenders = load_contenders([f"teacher={teacher_folder}"])
    first, *rest = make_workloads(contenders, [2], [8], path)
    assert (first.name, first.batch, len(first.batches["teacher"])) == ("75 texts", 1, 75)
    assert [one["input_ids"].shape[1] for one in first.batches["teacher"]][:2] == [5, 6]
    assert [(one.batch, one.sequence_length) for one in rest] == [(2, 8)]
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="holds no sentences"):
        make_workloads(contenders, [2], [8], path)
    path.write_text("the student reads", encoding="utf-8-sig")
    (marked, *_) = make_workloads(contenders, [2], [8], path)
    assert marked.batches["teacher"][0]["input_ids"].shape[1] == 5
    path.write_bytes("Stra\xdfe".encode("latin-1"))
    with pytest.raises(UserError, match=r"pairs\.txt is not UTF-8: give a text file"):
        make_workloads(contenders, [2], [8], path)


def test_a_number_that_is_given_twice_counts_once() -> None:
    assert numbers("--batch-sizes", "2,1,2") == [2, 1]
