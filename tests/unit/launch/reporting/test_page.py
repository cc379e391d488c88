"""launch/report.py: the page and its Markdown say what the inputs say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import launch.report
from launch.report import main
from launch.reporting import published
from launch.reporting.comparison import ComparedModel
from launch.reporting.runs import device_of, read_run_facts
from launch.reporting.scores import retention
from launch.reporting.tables import heldout_table, heldout_text
from tests.unit.launch.reporting.given import (
    DASH,
    MASKED,
    NASTY,
    Page,
    ablation_json,
    finished_run,
    inference_json,
    markdown_tables,
    rows_of,
    scores,
    write_scores,
)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of all inputs; the models' scoring stands in for itself, since it needs models."""
    tmp_path = tmp_path_factory.mktemp("everything")
    model = ComparedModel("student", 66_000, 4.75, 0.25, 0.5, 0.125, 1234.4, MASKED)
    teacher = write_scores(
        tmp_path / "t",
        cola=scores("cola", 0.0),
        sst2=scores("sst2", 90.0),
        imdb=scores("imdb", 88.0),
        squad=scores("squad", 80.0, metrics={"exact_match": 70.25, "f1": 80.0}),
    )
    student = write_scores(
        tmp_path / "s",
        cola=scores("cola", 12.0),
        sst2=scores("sst2", 81.0, teacher=["big"]),
        imdb=scores("imdb", 66.0, seeds=1),
        mnli=scores("mnli", 50.0),
    )
    (tmp_path / "i.json").write_text(json.dumps(inference_json()))
    (tmp_path / "a.json").write_text(json.dumps(ablation_json()))
    words = [str(finished_run(tmp_path)), "--out", str(tmp_path / "out")]
    words += ["--scores", f"teacher={teacher}", f"{NASTY}={student}"]
    words += ["--inference", str(tmp_path / "i.json"), "--ablation", str(tmp_path / "a.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.report, "compare_runs", lambda runs: [model])
        assert main(words) == 0
    return tmp_path / "out"


def test_models_without_head_have_columns_of_their_own() -> None:
    """And none that would be empty."""
    rest = (None, None, None, None, 1234.4, None)
    models = [
        ComparedModel("teacher", 110_000, *rest),
        ComparedModel("student", 66_000, *rest, relation=0.25),
    ]
    table = heldout_table(models)
    assert [column.heading for column in table.columns] == [
        "model",
        "parameters",
        "relations to teacher (nats)",
        "sentences/s (CPU, batch 32)",
    ]
    assert table.rows == [("teacher", "110,000", DASH, "1,234"), ("student", "66,000", "0.2500", "1,234")]
    assert table.title == "Held-out text, the same for every model"
    assert "0.2500" in heldout_text(models)


def test_numbers_are_the_inputs(everything: Path) -> None:
    tables = rows_of(everything)
    assert tables["Table 1. GLUE"]["CoLA"] == ["0.0 (-1.5 to 0.5)", "12.0 (10.5 to 12.5)", "56.3", "51.3"]
    assert tables["Table 1. GLUE"]["SST-2"][:2] == ["90.0 (88.5 to 90.5)", "81.0 (79.5 to 81.5)"]
    assert tables["Table 1. GLUE"]["MNLI"] == [DASH, "50.0 (48.5 to 50.5)", "84.7", "82.1"]
    assert tables["Table 1. GLUE"]["mean of the 2 that all have"] == ["45.0", "46.5", "74.5", "71.3"]
    assert tables["Table 2. IMDb and SQuAD"]["IMDb, accuracy"][:2] == ["88.0 (86.5 to 88.5)", "66.0"]
    assert tables["Table 2. IMDb and SQuAD"]["SQuAD 1.1, exact match"] == [
        "70.2 (68.8 to 70.8)",
        DASH,
        "81.2",
        "77.7",
        "79.1",
    ]
    assert tables["Table 3. Size and speed"]["size on disk, fp32 (MB)"] == ["8.0", "4.0", DASH, DASH]
    assert tables["Table 3. Size and speed"]["1,500 pairs as long as STS-B's, batch 1 (s)"] == [
        "15.0",
        "6.0",
        "668",
        "410",
    ]
    assert tables["Table 3. Size and speed"]["times faster than teacher (BERT-base)"][1::2] == [
        "2.51 (2.35-2.60)",
        "1.63",
    ]
    assert tables["Latency and throughput"]["8 x 128, eager"] == ["80", "12.5", "50", "20", DASH]
    assert tables["Latency and throughput"]["1 x STS-B, eager"] == [
        *("10", "100", "4 (3.9-4.25)", "250", "2.51 (2.35-2.60)")
    ]
    assert tables["Table 4. Ablation"]["no-kd"] == [
        "a=<b>",
        "0.7500 (+0.2500)",
        "50.0 (+0.3 ~)",
        "66.5 (-3.5)",
        "-2.96",
    ]
    # 40 s for the first 4,000 tokens and 20 s for the others, on 64 / (16 x 2) processes
    assert tables["Cost"]["student"] == ["adamw", "20", "8,000", "60", "133", "2", "CPU", "0.0333"]
    assert tables[f"Held-out masked tokens, the same for every model: {MASKED}"]["student"][:3] == [
        "66,000",
        "4.750",
        "115.6",
    ]


def test_retention(everything: Path) -> None:
    rows = rows_of(everything)["Retention"]
    assert rows["CoLA"] == [DASH, "91.1%"]  # the teacher scores 0
    assert rows["SST-2"] == ["90.0%", "98.5%"]
    assert rows["IMDb"] == ["75.0%", "99.3%"]
    assert rows["means of 2 GLUE tasks"] == ["103.3%", "95.7%"]
    assert not {"SQuAD 1.1", "MNLI"} & set(rows)  # one of the two was not scored
    assert (retention(45.0, 90.0), retention(1.0, 0.0), retention(1.0, -2.0)) == ("50.0%", DASH, DASH)


def test_page_and_markdown_agree(everything: Path) -> None:
    page = Page((everything / "report.html").read_text())
    in_markdown = markdown_tables((everything / "report.md").read_text())
    assert list(page.tables) == list(in_markdown)
    for title, rows in page.tables.items():
        assert [[" ".join(cell.split()) for cell in row] for row in rows[-len(in_markdown[title]) :]] == (
            in_markdown[title]
        )


def test_page_stands_alone_and_is_escaped(everything: Path) -> None:
    text = (everything / "report.html").read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not [attrs for _, attrs in page.tags if {"src", "href", "onload"} & set(attrs)]
    assert all(attrs.get("xlink:href", "#").startswith("#") for tag, attrs in page.tags)
    assert "url(" not in text.replace("url(#", "")
    assert "@import" not in text
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;|*x*" in text
    markdown = (everything / "report.md").read_text()
    assert "<script" not in markdown
    assert r"&lt;script&gt;alert(1)&lt;/script&gt;\|\*x\*" in markdown


def test_tables_are_accessible(everything: Path) -> None:
    page = Page((everything / "report.html").read_text())
    assert all(attrs.get("scope") in ("col", "row", "colgroup") for tag, attrs in page.tags if tag == "th")
    assert [tag for tag, _ in page.tags].count("caption") == [tag for tag, _ in page.tags].count("table") == 8
    charts = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("role") == "img"]
    assert len(charts) == 2
    assert all("lines: student" in str(attrs["aria-label"]) for attrs in charts)


def test_published_figures_stand_apart_and_the_scale_comes_first(everything: Path) -> None:
    text = (everything / "report.html").read_text()
    scale = text.index(
        "SMALL SCALE, not the paper&#39;s. student has 66,000 parameters (its teacher 110,000)"
    )
    assert scale < text.index("<table>")
    assert "trained on 8,000 tokens by 2 processes on CPU" in text
    assert text.count(f'class="published">{published.LABEL}</th>') == 5
    cells = re.findall(r'<td class="published( first)?">([^<]*)</td>', text)
    assert {value for _, value in cells} >= {"56.3", "51.3", "93.46", "668", "-2.96", "98.5%"}
    ours = re.findall(r'<td class="(?: ?first)?">([^<]*)</td>', text)
    assert not {"56.3", "93.46", "668", "-2.96"} & set(ours)


def test_notes_tell_what_cannot_be_compared(everything: Path, tmp_path: Path) -> None:
    text = (everything / "report.md").read_text()
    assert "with a fine-tuned teacher's soft labels on SST-2" in text
    assert "median of 1 to 3 seeds" in text
    one = write_scores(tmp_path / "one", rte=scores("rte", 60.0))
    two = write_scores(tmp_path / "two", rte=scores("rte", 50.0, dev_examples={"dev": 49}))
    main(["--out", str(tmp_path / "o2"), "--scores", f"a={one}", f"b={two}", "--reference", "b"])
    text = (tmp_path / "o2" / "report.md").read_text()
    assert (
        text.count("RTE: the models had different dev examples; not to be compared.") == 2
    )  # GLUE, retention
    assert "| mean" not in text  # of one task
    assert "| RTE | 120.0% | 86.4% |" in text


def test_what_was_not_given_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_scores(tmp_path / "s", sst2=scores("sst2", 90.0))
    main(["--out", str(tmp_path / "out"), "--scores", f"student={folder}"])
    assert list(rows_of(tmp_path / "out")) == ["Table 1. GLUE"]
    text = (tmp_path / "out" / "report.html").read_text()
    for command in ("launch/pretrain.py", "launch/ablate.py", "benchmark.py inference", "--task imdb squad"):
        assert command in text
    assert "SMALL SCALE, not the paper&#39;s. student has 1,234,567 parameters" in text
    assert not (tmp_path / "out" / "loss.png").exists()
    assert capsys.readouterr().out == f"page:        {tmp_path / 'out' / 'report.html'}\n"


def test_a_large_model_is_not_called_small(tmp_path: Path) -> None:
    folder = write_scores(tmp_path / "s", sst2=scores("sst2", 90.0, parameters=66_955_010))
    main(["--out", str(tmp_path / "out"), "--scores", f"student={folder}"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "SMALL SCALE" not in text
    assert "student has 66,955,010 parameters" in text


def test_device(run_folder: Path) -> None:
    assert read_run_facts(run_folder).device == "CPU"
    cuda = {"versions": {"torch": "2.13.0+cu130"}}
    assert device_of(cuda, {"fp16": {"enabled": True}}) == "GPU"
    assert device_of(cuda, {}) == "device not recorded"
    assert device_of({**cuda, "device": "cpu"}, {"bf16": {"enabled": True}}) == "CPU"
    assert device_of({**cuda, "device": "cuda:0"}, {}) == "GPU"
