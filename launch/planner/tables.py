"""A plan as tables to read and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.common.tables import text_table
from launch.planner.cost import REFERENCE_RUN
from launch.planner.memory import GIB
from launch.planner.planning import Plan, comparison, needs_lanes


def memory_table(plan: Plan, memory_gib: float) -> str:
    rows = [(name, f"{size / GIB:.3f}") for name, size in plan.memory.items()]
    share = plan.memory_gib / memory_gib
    rows.append((f"all, {share:.0%} of {memory_gib:g} GiB", f"{plan.memory_gib:.3f}"))
    gpus = plan.machines.world_size
    return text_table(
        ("part", "GiB"), rows, title="Memory of one GPU" if gpus == 1 else f"Memory of each of {gpus} GPUs"
    )


def work_table(plan: Plan) -> str:
    """FLOPs and bytes."""
    recipe, flops = plan.recipe, plan.recipe.flops
    rows = [
        ("student", f"{recipe.student.parameters / 1e6:,.1f}", f"{flops.student / 1e6:,.0f}"),
        *(
            (
                f"teacher ({model.model_type}, {model.layers} layers)",
                f"{model.parameters / 1e6:,.1f}",
                "",
            )
            for model in recipe.teachers
        ),
        ("all teachers", "", f"{flops.teachers / 1e6:,.0f}"),
        ("together", "", f"{flops.total / 1e6:,.0f}"),
    ]
    return text_table(
        ("model", "parameters (M)", "MFLOPs per token"),
        rows if recipe.teachers else [rows[0]],
        title=f"Work per token of a sequence of {recipe.sequence_length}",
    )


def time_table(plan: Plan, price: float | None) -> str:
    """One optimizer step, and the run."""
    recipe, time = plan.recipe, plan.time
    batch = f"{recipe.micro_batch_size} x {plan.accumulation} x {plan.machines.world_size}"
    rows = [
        ("global batch = micro batch x accumulation x GPUs", f"{recipe.global_batch_size:,} = {batch}"),
        ("sent by each GPU in a step", f"{plan.sent.per_step / 1e9:,.2f} GB"),
        *_at_stage_1(plan),
        ("computing", f"{time.compute:,.3f} s"),
        ("communication, of which not hidden", f"{time.communication:,.3f} s, {time.exposed:,.3f} s"),
        ("a step", f"{time.total:,.3f} s"),
        ("tokens/s", f"{plan.tokens_per_s:,.0f}"),
        ("steps, tokens of the run", f"{recipe.steps:,}, {recipe.tokens / 1e9:,.2f}e9"),
        ("time", duration(plan.hours)),
        ("GPU-hours", f"{plan.gpu_hours:,.0f}"),
    ]
    if price is not None:
        rows.append((f"cost at {price:g} per GPU-hour", f"{plan.gpu_hours * price:,.0f}"))
    return text_table(("one optimizer step, and the run", ""), rows, title="Time")


def _at_stage_1(plan: Plan) -> list[tuple[str, str]]:
    """Nothing where it sends the same, or is refused."""
    engine, reductions = plan.recipe.engine, plan.sent.reductions
    if engine.stage != 2 or reductions == 1 or not plan.sent.weights or not engine.takes_stage_1:
        return []
    return [("at stage 1, which reduces once", f"{plan.sent.reduced_once / 1e9:,.2f} GB")]


def curve_table(curve: Sequence[Plan], price: float | None) -> str:
    """The scaling curve as numbers."""
    first = curve[0]
    columns = ["GPUs", "micro x acc.", "GiB each", "step (s)", "tokens/s", "efficiency", "time", "GPU-hours"]
    columns += ["cost"] if price is not None else []
    rows = []
    for plan in curve:
        gpus = plan.machines.world_size
        lanes = "*" if plan.recipe.lanes != first.recipe.lanes else ""
        row = [
            f"{gpus:,}{lanes}",
            f"{plan.recipe.micro_batch_size} x {plan.accumulation}",
            f"{plan.memory_gib:.1f}",
            f"{plan.time.total:,.2f}",
            f"{plan.tokens_per_s:,.0f}",
            f"{plan.tokens_per_s / gpus / (first.tokens_per_s / first.machines.world_size):.0%}",
            duration(plan.hours),
            f"{plan.gpu_hours:,.0f}",
        ]
        rows.append([*row, f"{plan.gpu_hours * price:,.0f}"] if price is not None else row)
    text = text_table(columns, rows, title="The same recipe on more GPUs")
    if any(needs_lanes(first.recipe, plan.machines.world_size) for plan in curve):
        text += (
            f"\n* needs data.lanes=GPUs in place of {first.recipe.lanes}, which changes the order of the data"
        )
    return text


def duration(hours: float) -> str:
    """In the unit that a reader would choose: "3.6 days", "1.01 hours", "26 minutes"."""
    for unit, length, least in (("days", 24.0, 48.0), ("hours", 1.0, 1.0), ("minutes", 1 / 60, 1 / 60)):
        if hours >= least:
            return f"{hours / length:,.3g} {unit}"
    return f"{hours * 3600:.3g} seconds"


def comparison_table(plan: Plan) -> str:
    """What the paper's claims about cost can be read off."""

    def cell(number: float | None, layout: str) -> str:
        return "" if number is None else format(number, layout)

    rows = [
        (
            row["name"],
            f"{row['tokens'] / 1e9:,.1f}e9",
            f"{row['flops']:.1e}",
            f"{row['v100_hours_at_mfu']:,.0f}",
            cell(row["published_gpu_hours"], ",.0f"),
            cell(row["published_mfu"], ".1%"),
            f"{row['share_of_flops']:.1%}",
            cell(row["share_of_gpu_hours"], ".1%"),
            cell(row["share_of_gib_hours"], ".1%"),
        )
        for row in comparison(plan)
    ]
    text = text_table(
        (
            "run",
            "tokens",
            "FLOPs",
            f"V100-hours\nat {plan.machines.mfu:.0%}",
            "V100-hours\npublished",
            "their\nMFU",
            "share of\nFLOPs",
            "of GPU-\nhours",
            "of GiB x\nhours",
        ),
        rows,
        title=f"Beside published runs (shares are of {REFERENCE_RUN.name})",
    )
    sources = [f"{row['name']}: {row['source']}" for row in comparison(plan) if row["source"]]
    return "\n".join([text, *sources])


def plot_curve(curve: Sequence[Plan], path: Path, title: str) -> None:
    """Tokens per second against GPUs, and what share of perfect scaling that is; grey where the recipe as it is
    does not reach."""
    from matplotlib.figure import Figure

    first = curve[0]
    gpus = [plan.machines.world_size for plan in curve]
    perfect = [first.tokens_per_s / gpus[0] * count for count in gpus]
    reached = [plan.tokens_per_s for plan in curve]
    inside = [plan.machines.world_size for plan in curve if plan.recipe.lanes == first.recipe.lanes]
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(gpus, perfect, color="0.6", linestyle="--", label="if communication were free")
    left.plot(gpus, reached, color="C0", marker="o", label="predicted")
    left.set(yscale="log", ylabel="tokens per second")
    right.plot(gpus, [100 * a / b for a, b in zip(reached, perfect, strict=True)], color="C0", marker="o")
    right.set(ylim=(0, 105), ylabel="% of perfect scaling")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(gpus, [f"{count:,}" for count in gpus], fontsize=8)
        axis.set_xlabel("GPUs")
        axis.grid(True, which="major", color="0.9")
        if inside[-1] < gpus[-1]:
            label = f"needs more than {first.recipe.lanes} data.lanes"
            axis.axvspan(inside[-1] * 2**0.5, gpus[-1] * 2**0.5, color="0.94", zorder=0, label=label)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    models = f"student of {first.recipe.student.parameters / 1e6:,.0f}M"
    if first.recipe.teachers:
        models += f", teacher of {sum(model.parameters for model in first.recipe.teachers) / 1e6:,.0f}M"
    figure.suptitle(
        f"{models} parameters, {first.recipe.global_batch_size:,} sequences a step; {title}", fontsize=10
    )
    figure.savefig(path, dpi=130)
