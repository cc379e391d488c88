"""The report as one self-contained HTML page and as Markdown, from the same tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from launch.ablation.table import SMALL_CORPUS, SMALL_STUDENT
from launch.common.tables import Table, markdown_escaped
from launch.experiments.study_results import StudyFile
from launch.experiments.study_results import tables_of as study_tables
from launch.reporting import published
from launch.reporting.comparison import ComparedModel
from launch.reporting.inputs import FINETUNE, AblationFile, InferenceFile, ModelScores
from launch.reporting.loss_curves import COLORS, Curve, svg_charts
from launch.reporting.runs import RunFacts
from launch.reporting.scores import downstream_table, glue_table, own_table, retention_table
from launch.reporting.tables import ablation_table, cost_table, heldout_table, size_table, speed_table

TITLE = "Distillation report"
TEMPLATE = Path(__file__).with_name("page.html")
ON_DEVICE = {"CPU": " on CPU", "GPU": " on GPU"}


@dataclass(frozen=True)
class Report:
    """Everything that was read; what is empty or None was not given."""

    versions: Mapping[str, str]
    runs: Sequence[RunFacts] = ()
    curves: Sequence[Curve] = ()
    compared: Sequence[ComparedModel] = ()
    scores: Sequence[ModelScores] = ()
    reference: str = ""
    """Of the scored models: what the others' retention is a share of."""
    inference: InferenceFile | None = None
    ablation: AblationFile | None = None
    study: StudyFile | None = None


@dataclass(frozen=True)
class Part:
    """Tables that stand together, or how to get them."""

    name: str
    tables: Sequence[Table | None]
    remedy: str


def parts_of(report: Report) -> list[Part]:
    """The report in its order; a part without tables has no input."""
    scores, inference, ablation = report.scores, report.inference, report.ablation
    return [
        Part(
            "Held-out scores, loss curves and cost",
            [heldout_table(report.compared)] if report.compared else [],
            "give the folders of finished runs (deepspeed launch/pretrain.py)",
        ),
        Part("Table 1, GLUE", [glue_table(scores)], f"{FINETUNE}, then --scores NAME=SCORES"),
        Part(
            "Retention",
            [retention_table(scores, report.reference)] if scores else [],
            "--scores teacher=SCORES student=SCORES, with tasks that both have",
        ),
        Part(
            "Table 2, IMDb and SQuAD",
            [downstream_table(scores)],
            f"{FINETUNE.replace('sst2 mrpc ...', 'imdb squad')}, then --scores",
        ),
        *([Part("Tasks of one's own", [own], "")] if (own := own_table(scores)) is not None else []),
        Part(
            "Table 3, size and speed",
            [size_table(inference), speed_table(inference)] if inference else [],
            "python launch/benchmark.py inference --model teacher=DIR --model student=DIR --json FILE, "
            "then --inference FILE",
        ),
        Part(
            "Table 4, ablation",
            [ablation_table(ablation)] if ablation else [],
            "python launch/ablate.py --config RECIPE --out DIR, then --ablation DIR/ablation.json",
        ),
        Part(
            "Study of objectives and budgets",
            list(study_tables(report.study)) if report.study else [],
            "python launch/study.py --teacher DIR --corpus SHARDS --tasks DATA --out DIR, then --study DIR/study.json",
        ),
    ]


def tables_of(report: Report) -> list[Table]:
    """All tables, the runs' cost last."""
    found = [table for part in parts_of(report) for table in part.tables if table is not None]
    return [*found, cost_table(report.runs)] if report.runs else found


def left_out(report: Report) -> dict[str, str]:
    """What is missing -> how to make it."""
    return {part.name: part.remedy for part in parts_of(report) if not any(part.tables)}


def scale_sentence(report: Report) -> str:
    """How large our models and runs are, so that no figure of ours is taken for one of the paper's."""
    if report.runs:
        sizes = [(run.name, run.student_parameters) for run in report.runs]
        own = [_run_scale(run) for run in report.runs]
    else:
        models = [*report.scores, *(report.inference.models if report.inference else ())]
        models += report.study.models if report.study else ()
        sizes = list({model.name: model.parameters for model in models}.items())
        own = [f"{name} has {count:,} parameters" for name, count in sizes]
    is_small = any(count < SMALL_STUDENT for _, count in sizes) or any(
        run.tokens < SMALL_CORPUS for run in report.runs
    )
    first = "SMALL SCALE, not the paper's. " if is_small else ""
    ours = f"{'; '.join(own)}. " if own else ""
    theirs = [published.PARAMETERS[name] // 10**6 for name in (published.STUDENT, published.TEACHER)]
    return (
        f"{first}{ours}The paper's student has {theirs[0]} million parameters, its teacher {theirs[1]} million; its "
        "corpus was English Wikipedia and the Toronto Book Corpus. Columns headed "
        f"“{published.LABEL}” are copied from the paper; all others are ours"
        f"{' and say nothing about models of that size' if is_small else ''}."
    )


def _run_scale(run: RunFacts) -> str:
    teacher = f"its teacher {run.teacher_parameters:,}" if run.teacher_parameters else "no teacher"
    processes = f"{run.num_processes} process{'es' if run.num_processes > 1 else ''}"
    return (
        f"{run.name} has {run.student_parameters:,} parameters ({teacher}), trained on {run.tokens:,} tokens by "
        f"{processes}{ON_DEVICE.get(run.device, f', {run.device}')}"
    )


def as_html(report: Report) -> str:
    """One page that needs nothing but itself."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=TITLE,
        source=published.SOURCE,
        scale=scale_sentence(report),
        tables=tables_of(report),
        charts=svg_charts(report.curves),
        colors=COLORS,
        left_out=left_out(report),
        versions=report.versions,
    )


def as_markdown(report: Report) -> str:
    """The same words for a README or a wiki; curves as the picture beside it."""
    parts = [f"# {TITLE}", f"**{markdown_escaped(scale_sentence(report))}**"]
    for number, table in enumerate(tables_of(report)):
        parts += [f"## {markdown_escaped(table.title)}", table.as_markdown(markdown_escaped)]
        if number == 0 and any(curve.losses for curve in report.curves):
            parts.append("![MLM loss of each run over its tokens](loss.png)")
    if missing := left_out(report):
        lines = [f"* {markdown_escaped(what)}: `{command}`" for what, command in missing.items()]
        parts += ["## Left out", "\n".join(lines)]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    parts.append(f"Published figures: {published.SOURCE}. Made with {markdown_escaped(versions)}.")
    return "\n\n".join(parts) + "\n"
