"""The report's tables of models, speeds, ablation and cost.

Published figures stand in columns of their own, under `published.LABEL`.
"""

from __future__ import annotations

from collections.abc import Sequence

from launch.ablation.table import ALIKE
from launch.ablation.variants import PUBLISHED
from launch.common.tables import DASH, Column, Table, text_table
from launch.reporting import published
from launch.reporting.comparison import ComparedModel
from launch.reporting.inputs import AblatedVariant, AblationFile, InferenceFile, Speed, SpeedRatio
from launch.reporting.runs import RunFacts

OURS = "ours"
ABLATED_SCORES = {
    "heldout_kl": ("KL to teacher (nats)", 1.0, ".4f"),
    "heldout_top1_agreement": ("top-1 agreement (%)", 100.0, ".1f"),
    "heldout_mlm_loss": ("MLM loss (nats)", 1.0, ".4f"),
}
"""Key of a held-out score -> (heading, factor, format)."""
HELDOUT = {
    "parameters": ("parameters", "parameters", ",d"),
    "mlm_loss": ("MLM loss (nats)", "MLM loss (nats)", ".3f"),
    "perplexity": ("perplexity", "perplexity", ",.1f"),
    "accuracy": ("accuracy", "accuracy", ".1%"),
    "top1_agreement": ("top-1 agreement with teacher", "top-1 agreement\nwith teacher", ".1%"),
    "kl": ("KL to teacher (nats)", "", ".3f"),
    "relation": ("relations to teacher (nats)", "relations\n(nats)", ".4f"),
    "cosine": ("1 - cos to teacher", "1 - cos", ".4f"),
    "embedding": ("1 - cos of sentence vectors to teacher", "1 - cos,\nsentences", ".4f"),
    "sentences_per_s": ("sentences/s (CPU, batch 32)", "sentences/s\n(CPU)", ",.0f"),
}
"""Field of a compared model -> (heading, heading in a terminal, format)."""


def published_column(heading: str) -> Column:
    """A column of the paper's figures."""
    return Column(heading, published.LABEL, css_class="published")


def columns_of(first: str, ours: Sequence[str], theirs: Sequence[str] = ()) -> list[Column]:
    """A column of words, then numbers: of our models, and published ones under their label."""
    return [
        Column(first, is_number=False),
        *(Column(name, OURS if theirs else "") for name in ours),
        *map(published_column, theirs),
    ]


def heldout_table(compared: Sequence[ComparedModel]) -> Table:
    """Models on the same held-out windows."""
    columns = _heldout_columns(compared)
    rows = [
        (model.name, *(_cell(getattr(model, name), spec) for name, (_, _, spec) in columns.items()))
        for model in compared
    ]
    return Table(
        _heldout_title(compared), columns_of("model", [heading for heading, _, _ in columns.values()]), rows
    )


def heldout_text(compared: Sequence[ComparedModel]) -> str:
    """The same for a terminal of any width and report.txt, without the KL."""
    columns = {name: column for name, column in _heldout_columns(compared).items() if name != "kl"}
    rows = [
        [model.name, *(_cell(getattr(model, name), spec) for name, (_, _, spec) in columns.items())]
        for model in compared
    ]
    headings = ["model", *(short for _, short, _ in columns.values())]
    return text_table(headings, rows, title=_heldout_title(compared), width=80)


def _heldout_columns(compared: Sequence[ComparedModel]) -> dict[str, tuple[str, str, str]]:
    """Those of `HELDOUT` that some model has."""
    return {
        name: column
        for name, column in HELDOUT.items()
        if any(getattr(model, name) is not None for model in compared)
    }


def _heldout_title(compared: Sequence[ComparedModel]) -> str:
    maskings = {model.masking for model in compared} - {None}
    assert len(maskings) <= 1, maskings
    if not maskings:
        return "Held-out text, the same for every model"
    return f"Held-out masked tokens, the same for every model: {maskings.pop()}"


def _cell(value: float | None, spec: str) -> str:
    return DASH if value is None else format(value, spec)


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
        reference = speeds.models[0].name
        faster = [
            speeds.ratio(model.name, row) for model, row in zip(speeds.models, passes, strict=True) if row
        ]
        rows += [
            [
                f"{published.STSB_PAIRS:,} pairs as long as STS-B's, batch 1 (s)",
                *(f"{row.latency_ms / 1e3 * published.STSB_PAIRS:,.1f}" for row in passes if row),
                *(f"{published.PASS_SECONDS[name]:.0f}" for name in theirs),
            ],
            [
                f"times faster than {reference} ({theirs[0]})",
                *map(_times_faster, faster),
                DASH,
                f"{published.PASS_SECONDS[theirs[0]] / published.PASS_SECONDS[theirs[1]]:.2f}",
            ],
        ]
    threads = f"{speeds.threads} thread{'' if speeds.threads == 1 else 's'}"
    notes = [f"Ours: {speeds.hardware}, {threads}. Published: Xeon E5-2690 v3."]
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
            cells += [_latency(row), _digits(row.sentences_per_s)] if row else [DASH, DASH]
        rows.append([*cells, *(_times_faster(speeds.ratio(model.name, first)) for model in others)])
    notes = [
        f"On {' and '.join(devices)}; medians (and ranges) over rounds in which all took turns. "
        "STS-B: sequences as long as its pairs. eager and compile: torch; onnx: ONNX Runtime, fp32; "
        "onnx-int8: with int8 weights."
    ]
    return Table("Latency and throughput", columns, rows, notes)


def ablation_table(ablation: AblationFile) -> Table:
    """Table 4: what each part of the recipe is worth."""
    shown = {key for variant in ablation.variants for key in variant.heldout}
    scores = {key: score for key, score in ABLATED_SCORES.items() if key in shown}
    has_glue = any(variant.glue is not None for variant in ablation.variants)
    headings = [heading for heading, _, _ in scores.values()] + (["mean of GLUE tasks"] if has_glue else [])
    columns = [Column("variant", is_number=False), Column("changed", OURS, is_number=False)]
    columns += [*(Column(heading, OURS) for heading in headings), published_column("GLUE mean, change")]
    rows = []
    for variant in ablation.variants:
        cells = [_ablated(ablation, variant, key) for key in scores]
        cells += [_ablated_glue(ablation, variant)] if has_glue else []
        figure = PUBLISHED.get(variant.name)
        rows.append([variant.name, variant.changed, *cells, DASH if figure is None else f"{figure:+.2f}"])
    return Table("Table 4. Ablation", columns, rows, _ablation_notes(ablation))


def _ablated(ablation: AblationFile, variant: AblatedVariant, key: str) -> str:
    """A held-out score, and its change from the full recipe's."""
    if key not in variant.heldout:
        return DASH
    _, factor, style = ABLATED_SCORES[key]
    value, change = f"{variant.heldout[key] * factor:{style}}", variant.difference.get(key, 0.0)
    if not change:
        return value
    is_alike = ablation.noise is not None and abs(change) <= ablation.noise.get(key, 0.0)
    return f"{value} ({change:+{style}}{f' {ALIKE}' if is_alike else ''})"


def _ablated_glue(ablation: AblationFile, variant: AblatedVariant) -> str:
    full = ablation.variants[0]
    if variant.glue is None:
        return DASH
    if variant is full or full.glue is None:
        return f"{variant.glue:.1f}"
    return f"{variant.glue:.1f} ({variant.glue - full.glue:+.1f})"


def _ablation_notes(ablation: AblationFile) -> list[str]:
    sizes = {
        "student_parameters": "parameters of the student",
        "steps": "steps",
        "tokens": "tokens for each variant",
    }
    scale = ", ".join(
        f"{ablation.scale[key]:,} {what}" for key, what in sizes.items() if key in ablation.scale
    )
    chance = (
        "The recipe was trained with one seed: how large chance is, is not known."
        if ablation.noise is None
        else f"{ALIKE}: no larger than the difference between two seeds of the recipe; may be chance."
    )
    return [
        *([f"Ours: {scale}."] if scale else []),
        f"Held-out scores: {ablation.heldout_masking}.",
        "In brackets: the change from the first row. Published: points of the GLUE mean over nine tasks.",
        chance,
        *(f"left out: {name}: {reason}" for name, reason in ablation.left_out.items()),
        *(f"failed: {name}: {reason}" for name, reason in ablation.failed.items()),
    ]


def cost_table(runs: Sequence[RunFacts]) -> Table:
    """What each run took."""
    headings = (
        "optimizer",
        "steps",
        "tokens",
        "training time (s)",
        "tokens/s",
        "processes",
        "device",
        "device-hours",
    )
    rows = [
        (
            run.name,
            run.optimizer,
            f"{run.steps:,}",
            f"{run.tokens:,}",
            f"{run.seconds:,.0f}" if run.seconds else DASH,
            f"{run.tokens_per_s:,.0f}" if run.seconds else DASH,
            f"{run.num_processes}",
            run.device,
            f"{run.process_hours:,.3g}" if run.seconds else DASH,
        )
        for run in runs
    ]
    notes = [
        "Time of the training steps, without start, evaluation and checkpoints. Device-hours: processes times hours, "
        "GPU-hours where each process has a GPU. Published: about 90 hours on 8 V100 GPUs for DistilBERT."
    ]
    return Table("Cost", columns_of("run", headings), rows, notes)


def _latency(speed: Speed) -> str:
    ends = speed.latency_ms_range
    return _digits(speed.latency_ms) + (f" ({_digits(ends[0])}-{_digits(ends[1])})" if ends else "")


def _times_faster(ratio: SpeedRatio | None) -> str:
    if ratio is None:
        return DASH
    ends = ratio.times_faster_range
    return f"{ratio.times_faster:.2f}" + (f" ({ends[0]:.2f}-{ends[1]:.2f})" if ends else "")


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
