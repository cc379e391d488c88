"""The report's tables of fine-tuned models: GLUE (table 1), IMDb and SQuAD (table 2), others, retention."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from launch.common.tables import DASH, Table
from launch.reporting import published
from launch.reporting.inputs import ModelScores, TaskScores
from launch.reporting.tables import columns_of, published_column
from train.errors import UserError
from train.finetuning.tasks import GLUE, SPLIT_OFF, title_of

DOWNSTREAM = (
    ("imdb", "accuracy"),
    ("squad", "exact_match"),
    ("squad", "f1"),
    ("squad_v2", "exact_match"),
    ("squad_v2", "f1"),
)
SIZES = ("max_train_examples", "max_eval_examples")
"""Settings that a task's numbers of examples say already."""
NOT_COMPARED = (*SIZES, "temperature", "hard_weight", "unlabelled_only")
"""Nor those of the task distillation, which models without a fine-tuned teacher cannot have."""
METRIC_TITLES = {"accuracy": "accuracy", "exact_match": "exact match", "f1": "F1"}


def reference_of(names: Sequence[str], wanted: str | None) -> str:
    """The model that retention is a share of: the one asked for, else `teacher`, else the first.

    Raises:
        UserError: there is no model of that name.
    """
    if wanted is not None and wanted not in names:
        raise UserError(f"--reference {wanted}: --scores has {', '.join(names)}")
    return wanted or ("teacher" if "teacher" in names else names[0])


def retention(student: float, teacher: float) -> str:
    """The student's score as a share of the teacher's; a dash where the teacher has none to keep."""
    return f"{student / teacher:.1%}" if teacher > 0 else DASH


def glue_table(models: Sequence[ModelScores]) -> Table | None:
    """Table 1: GLUE by task; None where no model was scored on any."""
    tasks = sorted((task for task in GLUE if any(task in model.tasks for model in models)), key=_by_title)
    if not tasks:
        return None
    theirs = (published.TEACHER, published.STUDENT)
    rows = [
        [
            title_of(task),
            *(_score(model.tasks.get(task), "score") for model in models),
            *(f"{published.GLUE[name][task]:.1f}" for name in theirs),
        ]
        for task in tasks
    ]
    common = [task for task in tasks if all(task in model.tasks for model in models)]
    if len(common) > 1:
        rows.append(
            [
                f"mean of {'these' if len(common) == len(tasks) else 'the'} {len(common)}"
                + ("" if len(common) == len(tasks) else " that all have"),
                *(f"{_mean(model, common):.1f}" for model in models),
                *(
                    f"{statistics.fmean(published.GLUE[name][task] for task in common):.1f}"
                    for name in theirs
                ),
            ]
        )
    notes = [
        "Dev sets, points of 100: Matthews correlation for CoLA, mean of accuracy and F1 for MRPC and QQP, mean of "
        f"Pearson and Spearman for STS-B, {_mnli(models)}else accuracy.",
        *_score_notes(models, tasks),
    ]
    if 1 < len(common) < len(GLUE):
        notes.append(
            f"GLUE has {len(GLUE)} tasks, over which the published means are {published.GLUE_AVERAGE[theirs[0]]} and "
            f"{published.GLUE_AVERAGE[theirs[1]]}; the means here are over the same {len(common)} for every column."
        )
    columns = columns_of("task", [model.name for model in models], theirs)
    return Table("Table 1. GLUE", columns, rows, notes)


def retention_table(models: Sequence[ModelScores], reference: str) -> Table | None:
    """Each model's share of the reference's score; None without two models that share a task."""
    teacher = next(model for model in models if model.name == reference)
    others = [model for model in models if model.name != reference]
    tasks = [task for task in teacher.tasks if any(task in model.tasks for model in others)]
    if not tasks:
        return None
    rows = [
        [
            title_of(task),
            *(
                retention(model.tasks[task].median["score"], teacher.tasks[task].median["score"])
                if task in model.tasks
                else DASH
                for model in others
            ),
            _published_retention(task),
        ]
        for task in sorted(tasks, key=_by_title)
    ]
    common = [task for task in tasks if task in GLUE and all(task in model.tasks for model in others)]
    if len(common) > 1:
        theirs = [
            statistics.fmean(published.GLUE[name][task] for task in common)
            for name in (published.STUDENT, published.TEACHER)
        ]
        means = [retention(_mean(model, common), _mean(teacher, common)) for model in others]
        rows.append([f"means of {len(common)} GLUE tasks", *means, retention(theirs[0], theirs[1])])
    notes = [
        f"The model's median score over that of {reference}; a dash where that is 0 or less, or missing."
    ]
    notes += _differences(models, tasks)
    columns = columns_of("task", [f"{model.name} / {reference}" for model in others])
    columns.append(published_column(f"{published.STUDENT} / {published.TEACHER}"))
    return Table("Retention", columns, rows, notes)


def downstream_table(models: Sequence[ModelScores]) -> Table | None:
    """Table 2: IMDb and SQuAD; None where no model was scored on them."""
    lines = [(task, metric) for task, metric in DOWNSTREAM if any(task in model.tasks for model in models)]
    if not lines:
        return None
    theirs = (published.TEACHER, published.STUDENT, published.DISTILLED)
    rows = []
    for task, metric in lines:
        figures = published.DOWNSTREAM.get((task, metric), {})
        rows.append(
            [
                f"{title_of(task)}, {METRIC_TITLES[metric]}",
                *(_score(model.tasks.get(task), metric) for model in models),
                *(f"{figures[name]:g}" if name in figures else DASH for name in theirs),
            ]
        )
    notes = [
        f"{published.DISTILLED}: fine-tuned with the soft labels of a fine-tuned teacher.",
        *_score_notes(models, [task for task, _ in lines]),
    ]
    columns = columns_of("task", [model.name for model in models], theirs)
    return Table("Table 2. IMDb and SQuAD", columns, rows, notes)


def own_table(models: Sequence[ModelScores]) -> Table | None:
    """Tasks of one's own, metric by metric; None where no model was scored on any."""
    metrics = {
        task: [name for name in scores.median if name != "score"]
        for model in models
        for task, scores in model.tasks.items()
        if scores.own
    }
    if not metrics:
        return None
    rows = [
        [f"{task}, {name.replace('_', ' ')}", *(_score(model.tasks.get(task), name) for model in models)]
        for task, names in metrics.items()
        for name in names
    ]
    columns = columns_of("task", [model.name for model in models])
    return Table("Tasks of one's own", columns, rows, _score_notes(models, list(metrics)))


def _score(scores: TaskScores | None, metric: str) -> str:
    if scores is None or metric not in scores.median:
        return DASH
    text = f"{scores.median[metric]:.1f}"
    if len(scores.seeds) > 1 and metric in scores.spread:
        low, high = scores.spread[metric]
        text += f" ({low:.1f} to {high:.1f})"
    return text


def _score_notes(models: Sequence[ModelScores], tasks: Sequence[str]) -> list[str]:
    """Seeds, soft labels, and what keeps two columns from being compared."""
    shown = [model.tasks[task] for model in models for task in tasks if task in model.tasks]
    seeds = sorted({len(scores.seeds) for scores in shown})
    many = " to ".join(str(count) for count in dict.fromkeys((seeds[0], seeds[-1])))
    notes = [
        "One seed each."
        if seeds == [1]
        else f"Ours: median of {many} seeds, lowest and highest in brackets; published: median of 5."
    ]
    for model in models:
        taught = [
            title_of(task)
            for task in dict.fromkeys(tasks)
            if task in model.tasks and model.tasks[task].teacher
        ]
        if taught:
            notes.append(f"{model.name}: with a fine-tuned teacher's soft labels on {', '.join(taught)}.")
    return [*notes, *_sizes(models, tasks), *_differences(models, tasks)]


def _mnli(models: Sequence[ModelScores]) -> str:
    """Which of its dev sets were scored."""
    sets = {tuple(model.tasks["mnli"].dev_examples) for model in models if "mnli" in model.tasks}
    if not sets:
        return ""
    sizes_by_set = [
        "mean of both dev sets" if len(names) > 1 else f"the {names[0]} dev set alone"
        for names in sorted(sets)
    ]
    return f"{' or '.join(sizes_by_set)} for MNLI, "


def _sizes(models: Sequence[ModelScores], tasks: Sequence[str]) -> list[str]:
    """How much of each task it was; what stands in for a dev set."""
    sizes, stand_ins = [], []
    for task in dict.fromkeys(tasks):
        by_size: dict[str, list[str]] = {}
        for model in models:
            if task in model.tasks:
                by_size.setdefault(_size(model.tasks[task]), []).append(model.name)
                if SPLIT_OFF in model.tasks[task].dev_examples:
                    stand_ins.append(f"{title_of(task)} of {model.name}")
        sizes_by_set = [
            size if len(by_size) == 1 else f"{size} ({', '.join(names)})" for size, names in by_size.items()
        ]
        sizes.append(f"{title_of(task)} {' or '.join(sizes_by_set)}")
    notes = [f"Examples of ours, training and dev: {'; '.join(sizes)}."]
    if stand_ins:
        notes.append(
            f"{', '.join(stand_ins)}: scored on a part of the training set, held out for want of a test set: not the "
            "published score."
        )
    return notes


def _size(scores: TaskScores) -> str:
    text = f"{scores.train_examples:,} and {sum(scores.dev_examples.values()):,}"
    return f"{text}, a part" if _is_part(scores) else text


def _is_part(scores: TaskScores) -> bool:
    """Whether a limit has cut the training or a dev set."""
    train, dev = (scores.settings.get(name) for name in SIZES)
    return train == scores.train_examples or dev in scores.dev_examples.values()


def _differences(models: Sequence[ModelScores], tasks: Sequence[str]) -> list[str]:
    """What keeps two scores of a task from being compared."""
    notes = []
    for task in dict.fromkeys(tasks):
        for words, sizes in (
            ("dev", [sorted(model.tasks[task].dev_examples.items()) for model in models if task in model.tasks]),
            ("training", [model.tasks[task].train_examples for model in models if task in model.tasks]),
        ):  # fmt: skip
            if any(size != sizes[0] for size in sizes):
                notes.append(
                    f"{title_of(task)}: the models had different {words} examples; not to be compared."
                )
        settings = [model.tasks[task].settings for model in models if task in model.tasks]
        differing = [
            name
            for name in dict.fromkeys(name for each in settings for name in each)
            if any(each.get(name) != settings[0].get(name) for each in settings) and name not in NOT_COMPARED
        ]
        if differing:
            notes.append(
                f"{title_of(task)}: the models were fine-tuned with different settings ({', '.join(differing)})."
            )
    return notes


def _mean(model: ModelScores, tasks: Sequence[str]) -> float:
    return statistics.fmean(model.tasks[task].median["score"] for task in tasks)


def _published_retention(task: str) -> str:
    figures: Mapping[str, float] = (
        {name: scores[task] for name, scores in published.GLUE.items()}
        if task in GLUE
        else published.DOWNSTREAM.get((task, "f1" if task.startswith("squad") else "accuracy"), {})
    )
    return retention(figures[published.STUDENT], figures[published.TEACHER]) if figures else DASH


def _by_title(task: str) -> tuple[bool, str]:
    """GLUE first, each in the paper's alphabetical order."""
    return task not in GLUE, title_of(task).lower()
