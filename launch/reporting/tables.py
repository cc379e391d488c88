"""The report's tables as plain words: one source for the page and for Markdown, so that both say the same.

Published figures stand in columns of their own, under `published.LABEL`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from launch.ablation.table import ALIKE
from launch.reporting import published
from launch.reporting.comparison import ComparedModel
from launch.reporting.inputs import AblationFile, InferenceFile
from launch.reporting.runs import RunFacts

DASH = "–"  # noqa: RUF001
OURS = "ours"


@dataclass(frozen=True)
class Column:
    """One column; `group` is the heading above it, shared with its neighbours."""

    heading: str
    group: str = ""
    is_number: bool = True


@dataclass(frozen=True)
class Table:
    """Words in rows. The first column names the row."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default_factory=list)

    def groups(self) -> list[tuple[str, int]]:
        """(group, how many columns), left to right; one empty group where no column has any."""
        found: list[tuple[str, int]] = []
        for column in self.columns:
            if found and found[-1][0] == column.group:
                found[-1] = (column.group, found[-1][1] + 1)
            else:
                found.append((column.group, 1))
        return found


def columns_of(first: str, ours: Sequence[str], theirs: Sequence[str] = ()) -> list[Column]:
    """A column of words, then numbers: of our models, and published ones under their label."""
    return [
        Column(first, is_number=False),
        *(Column(name, OURS if theirs else "") for name in ours),
        *(Column(name, published.LABEL) for name in theirs),
    ]


def heldout_table(compared: Sequence[ComparedModel]) -> Table:
    """Models on the same held-out windows."""
    headings = (
        "parameters",
        "MLM loss (nats)",
        "perplexity",
        "accuracy",
        "top-1 agreement with teacher",
        "KL to teacher (nats)",
        "sentences/s (CPU, batch 32)",
    )
    rows = [
        (
            model.name,
            f"{model.parameters:,}",
            f"{model.mlm_loss:.3f}",
            f"{model.perplexity:,.1f}",
            f"{model.accuracy:.1%}",
            f"{model.top1_agreement:.1%}",
            f"{model.kl:.3f}",
            f"{model.sentences_per_s:,.0f}",
        )
        for model in compared
    ]
    return Table("Held-out masked tokens, the same for every model", columns_of("model", headings), rows)


def size_table(speeds: InferenceFile) -> Table:
    """Table 3: parameters, bytes, and the paper's measure of speed."""
    theirs = (published.TEACHER, published.STUDENT)
    rows = [
        [
            "parameters",
            *(f"{model.parameters:,}" for model in speeds.models),
            *(f"{published.PARAMETERS[name]:,}" for name in theirs),
        ],
        [
            "size on disk, fp32 (MB)",
            *(f"{model.bytes / 1e6:,.1f}" for model in speeds.models),
            *(DASH for _ in theirs),
        ],
    ]
    passes = [
        next((row for row in model.rows if row.workload == "STS-B" and row.runtime == "eager"), None)
        for model in speeds.models
    ]
    if all(passes):
        seconds = [row.latency_ms / 1e3 * published.STSB_PAIRS for row in passes if row]
        rows += [
            [
                f"{published.STSB_PAIRS:,} pairs as long as STS-B's, batch 1 (s)",
                *(f"{value:,.1f}" for value in seconds),
                *(f"{published.PASS_SECONDS[name]:.0f}" for name in theirs),
            ],
            [
                f"times faster than {speeds.models[0].name} ({theirs[0]})",
                DASH,
                *(
                    f"{speeds.faster[(model.name, *row.kind)]:.2f}"
                    for model, row in zip(speeds.models[1:], passes[1:], strict=True)
                    if row
                ),
                DASH,
                f"{published.PASS_SECONDS[theirs[0]] / published.PASS_SECONDS[theirs[1]]:.2f}",
            ],
        ]
    notes = [f"Ours: {speeds.hardware}. Published: Xeon E5-2690 v3."]
    notes += [f"{model.name}: {model.source}." for model in speeds.models if model.source == "random weights"]
    columns = columns_of("", [model.name for model in speeds.models], theirs)
    return Table("Table 3. Size and speed", columns, rows, notes)


def speed_table(speeds: InferenceFile) -> Table:
    """Latency and throughput of every runtime and batch."""
    reference, *others = speeds.models
    columns = [Column("batch x tokens, runtime", is_number=False)]
    for model in speeds.models:
        columns += [Column("ms", model.name), Column("sentences/s", model.name)]
    columns += [Column(model.name, f"times faster than {reference.name}") for model in others]
    rows = []
    devices = list(dict.fromkeys(row.device for row in reference.rows))
    for first in reference.rows:
        found = [next((row for row in model.rows if row.kind == first.kind), None) for model in speeds.models]
        words = first.workload or f"{first.sequence_length:g}"
        where = f", {first.device}" if len(devices) > 1 else ""
        cells = [f"{first.batch} x {words}, {first.runtime}{where}"]
        for row in found:
            cells += [_digits(row.latency_ms), _digits(row.sentences_per_s)] if row else [DASH, DASH]
        ratios = [speeds.faster.get((model.name, *first.kind)) for model in others]
        rows.append([*cells, *(DASH if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
    notes = [
        f"On {' and '.join(devices)}; medians over rounds in which all took turns. "
        "STS-B: sequences as long as its pairs. eager and compile: torch; onnx: ONNX Runtime, fp32; "
        "onnx-int8: with int8 weights."
    ]
    return Table("Latency and throughput", columns, rows, notes)


def ablation_table(ablation: AblationFile) -> Table:
    """Table 4: what each part of the recipe is worth."""
    kinds = {
        "heldout_kl": ("KL to teacher (nats)", 1.0, ".4f"),
        "heldout_top1_agreement": ("top-1 agreement (%)", 100.0, ".1f"),
        "heldout_mlm_loss": ("MLM loss (nats)", 1.0, ".4f"),
    }
    kinds = {key: kind for key, kind in kinds.items() if any(key in one.heldout for one in ablation.variants)}
    has_glue = any(variant.glue is not None for variant in ablation.variants)
    columns = [Column("variant", is_number=False), Column("changed", OURS, is_number=False)]
    columns += [Column(heading, OURS) for heading, _, _ in kinds.values()]
    columns += [Column("mean of GLUE tasks", OURS)] if has_glue else []
    columns.append(Column("GLUE mean, change", published.LABEL))
    full = ablation.variants[0].glue
    rows = []
    for variant in ablation.variants:
        cells = [variant.name, variant.changed]
        for key, (_, factor, style) in kinds.items():
            if key not in variant.heldout:
                cells.append(DASH)
                continue
            change = variant.difference.get(key, 0.0)
            alike = ablation.noise is not None and abs(change) <= ablation.noise.get(key, 0.0)
            told = f" ({change:+{style}}{' ' + ALIKE if alike else ''})" if change else ""
            cells.append(f"{variant.heldout[key] * factor:{style}}{told}")
        if has_glue:
            told = "" if variant.glue is None or full is None else f" ({variant.glue - full:+.1f})"
            first = variant is ablation.variants[0]
            cells.append(DASH if variant.glue is None else f"{variant.glue:.1f}{'' if first else told}")
        figure = published.ABLATION.get(variant.name)
        rows.append([*cells, DASH if figure is None else f"{figure:+.2f}"])
    notes = [f"Ours: {ablation.scale}."] if ablation.scale else []
    notes.append(
        "In brackets: the change from the first row. Published: points of the GLUE mean over nine tasks."
    )
    if ablation.noise is None:
        notes.append("The recipe was trained with one seed: how large chance is, is not known.")
    else:
        notes.append(
            f"{ALIKE}: no larger than the difference between two seeds of the recipe; may be chance."
        )
    return Table("Table 4. Ablation", columns, rows, [*notes, *ablation.notes])


def cost_table(runs: Sequence[RunFacts]) -> Table:
    """What each run took."""
    headings = ("steps", "tokens", "training time (s)", "tokens/s", "processes", "device", "device-hours")
    rows = [
        (
            run.name,
            f"{run.steps:,}",
            f"{run.tokens:,}",
            f"{run.seconds:,.0f}",
            f"{run.tokens_per_s:,.0f}",
            f"{run.num_processes}",
            run.device,
            f"{run.process_hours:,.3g}",
        )
        for run in runs
    ]
    notes = [
        "Time of the training steps, without start, evaluation and checkpoints. Device-hours: processes times hours, "
        "GPU-hours where each process has a GPU. Published: about 90 hours on 8 V100 GPUs for DistilBERT."
    ]
    return Table("Cost", columns_of("run", headings), rows, notes)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
