"""The tasks that an encoder is scored on.

The hyper-parameters are those of the published figures as far as they are known. GLUE: batch 32, learning rate 2e-5, 3
epochs, 128 tokens, 5 epochs for the small MRPC and WNLI (transformers' examples/pytorch/text-classification, the
successor of the script that DistilBERT, Sanh et al. 2019, was scored with), within what BERT's authors searched
(Devlin et al. 2019, arXiv:1810.04805, appendix A.3: batch 16 or 32, 2e-5 to 5e-5, 2 to 4 epochs); warm-up over the
first tenth of the steps and weight decay 0.01 as in BERT's own code (run_classifier.py, optimization.py). IMDb: 512
tokens, the longest that BERT takes. SQuAD: 384 tokens, a window every 128, and 3 epochs, as in BERT's own run_squad.py
and DistilBERT's run_squad_w_distillation.py; batch 12 and 3e-5 as in the command that transformers' examples give for
the teacher's 88.5 F1 (the two scripts have 32 and 5e-5, 8 and 5e-5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from train.errors import UserError

SPLIT_OFF = "split off train"
"""Name of a dev set that is a part of the training set, for want of one: its scores are not the published ones."""


class NoTrainingSetError(UserError):
    """A folder of tasks lacks one of them."""


@dataclass(frozen=True)
class Settings:
    """Numbers that the scores depend on; all are written into scores.json. UserError for one that cannot be."""

    epochs: float = 3.0
    learning_rate: float = 2e-5
    batch_size: int = 32
    max_length: int = 128
    """Tokens, special ones included; clipped to the model's positions."""
    warmup_ratio: float = 0.1
    """Share of the steps in which the learning rate rises; then it falls linearly to 0."""
    weight_decay: float = 0.01
    group_by_length: bool = True
    """Batches of texts of like length: less padding."""
    bf16: bool | None = None
    """Matrix products in bfloat16, by autocast, in training and on the dev set. None: all in fp32."""
    max_train_examples: int | None = None
    max_eval_examples: int | None = None
    temperature: float | None = None
    """Of the soft labels; None without a teacher, and for a regression, which has none."""
    hard_weight: float | None = None
    """alpha: share of the loss on the true labels, 1 - alpha on the teacher's; None without a teacher."""
    unlabelled_only: bool | None = None
    doc_stride: int | None = None
    """Tokens between the beginnings of neighbouring windows, as in BERT's run_squad.py; span tasks alone."""
    max_answer_length: int | None = None
    """Tokens of an answer; span tasks alone."""

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "batch_size", "max_length", "temperature"):
            self._refuse_unless(name, lambda value: value > 0, "a number above 0")
        for name in ("max_train_examples", "max_eval_examples", "doc_stride", "max_answer_length"):
            self._refuse_unless(name, lambda value: value >= 1, "at least 1")
        self._refuse_unless("weight_decay", lambda value: value >= 0, "0 or more")
        for name in ("warmup_ratio", "hard_weight"):
            self._refuse_unless(name, lambda value: 0 <= value <= 1, "a number from 0 to 1")

    def _refuse_unless(self, name: str, good: Callable[[Any], bool], wanted: str) -> None:
        value = getattr(self, name)
        if value is not None and not (math.isfinite(value) and good(value)):
            raise UserError(f"--{name.replace('_', '-')} is {value}; give {wanted}")

    def as_json(self) -> dict[str, Any]:
        """Without the fields that this task does not have."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class OwnFiles:
    """Where the data of a user's own task lie."""

    format: str
    """csv, tsv, jsonl, conll or hub."""
    train: str
    """File, or hub:NAME[:CONFIG]."""
    dev: str | None
    """File, of the same format."""


@dataclass(frozen=True)
class Task:
    """One row of the table. Columns are tuples of the names that they go by, in files and on the hub."""

    name: str
    title: str
    """As in tables of papers."""
    folders: tuple[str, ...]
    """Names of its folder below the folder of all tasks."""
    texts: tuple[tuple[str, ...], ...]
    """One entry for a text, two for a pair."""
    metrics: tuple[str, ...]
    hub: tuple[str, str | None]
    """Dataset and configuration on the Hugging Face hub."""
    labels: tuple[str, ...] | None = None
    """Class names, in the hub's order; None for a number (regression) or a span."""
    label: tuple[str, ...] = ("label",)
    """Of several classes at a time, also the columns of 0 and 1 that stand for them."""
    many: bool = False
    """A text may have several of the classes, or none."""
    label_range: tuple[float, float] | None = None
    """Of a regression's labels."""
    dev: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"dev": ("dev", "validation")})
    """Dev sets -> the file names, without ending, and hub splits that they go by."""
    headerless: tuple[str, ...] | None = None
    """Column names of a .tsv that has none of its own."""
    split_off: float | None = None
    """Share of the training set, chosen by a hash, that serves as dev set where there is no file of one."""
    kind: str = "sequence"
    """sequence: a label for a text or a pair; tokens: a label for each word; span: a part of a text."""
    glue: bool = False
    defaults: Settings = field(default_factory=Settings)
    own: OwnFiles | None = None
    """None for the tasks of the table below."""

    @property
    def is_pair(self) -> bool:
        return len(self.texts) == 2

    @property
    def is_regression(self) -> bool:
        return self.label_range is not None


def _glue(
    name: str,
    title: str,
    texts: tuple[tuple[str, ...], ...],
    labels: tuple[str, ...] | None,
    metrics: tuple[str, ...] = ("accuracy",),
    **more: object,
) -> Task:
    folders = tuple(dict.fromkeys((title, title.replace("-", ""), name)))
    return Task(name, title, folders, texts, metrics, ("nyu-mll/glue", name), labels, glue=True, **more)  # type: ignore[arg-type]


_SENTENCES = (("sentence1",), ("sentence2",))
_BOTH_MNLI = {
    "matched": ("dev_matched", "validation_matched"),
    "mismatched": ("dev_mismatched", "validation_mismatched"),
}
_SPAN = Settings(learning_rate=3e-5, batch_size=12, max_length=384, doc_stride=128, max_answer_length=30)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _glue(
            "cola",
            "CoLA",
            (("sentence",),),
            ("unacceptable", "acceptable"),
            ("matthews",),
            headerless=("source", "label", "mark", "sentence"),
        ),
        _glue("sst2", "SST-2", (("sentence",),), ("negative", "positive")),
        _glue(
            "mrpc",
            "MRPC",
            (("sentence1", "#1 String"), ("sentence2", "#2 String")),
            ("not_equivalent", "equivalent"),
            ("accuracy", "f1"),
            label=("label", "Quality"),
            defaults=Settings(epochs=5.0),
        ),
        _glue(
            "stsb",
            "STS-B",
            _SENTENCES,
            None,
            ("pearson", "spearman"),
            label=("label", "score"),
            label_range=(0.0, 5.0),
        ),
        _glue(
            "qqp",
            "QQP",
            (("question1",), ("question2",)),
            ("not_duplicate", "duplicate"),
            ("accuracy", "f1"),
            label=("label", "is_duplicate"),
        ),
        _glue(
            "mnli",
            "MNLI",
            (("premise", "sentence1"), ("hypothesis", "sentence2")),
            ("entailment", "neutral", "contradiction"),
            label=("label", "gold_label"),
            dev=_BOTH_MNLI,
        ),
        _glue("qnli", "QNLI", (("question",), ("sentence",)), ("entailment", "not_entailment")),
        _glue("rte", "RTE", _SENTENCES, ("entailment", "not_entailment")),
        _glue(
            "wnli",
            "WNLI",
            _SENTENCES,
            ("not_entailment", "entailment"),
            defaults=Settings(epochs=5.0),
        ),
        Task(
            "imdb",
            "IMDb",
            ("imdb", "IMDb", "aclImdb"),
            (("text",),),
            ("accuracy",),
            ("stanfordnlp/imdb", None),
            ("neg", "pos"),
            dev={"dev": ("dev", "validation", "test")},
            split_off=0.1,
            defaults=Settings(batch_size=16, max_length=512),
        ),
        Task(
            "squad",
            "SQuAD 1.1",
            ("squad", "SQuAD"),
            (("question",), ("context",)),
            ("exact_match", "f1"),
            ("rajpurkar/squad", None),
            kind="span",
            defaults=_SPAN,
        ),
        Task(
            "squad_v2",
            "SQuAD 2.0",
            ("squad_v2", "SQuAD2", "squad"),
            (("question",), ("context",)),
            ("exact_match", "f1"),
            ("rajpurkar/squad_v2", None),
            kind="span",
            defaults=_SPAN,
        ),
    )
}
GLUE = tuple(name for name, task in TASKS.items() if task.glue)


def title_of(name: str) -> str:
    """As in tables of papers; a user's own task has its name alone."""
    return TASKS[name].title if name in TASKS else name


def task_named(name: str) -> Task:
    """The task of a name; spelling as in SST-2, STS_B or sst2 is all the same.

    Raises:
        UserError: there is none, with the list of those there are.
    """
    plain = {plain_name(key): task for key, task in TASKS.items()}
    try:
        return plain[plain_name(name)]
    except KeyError:
        raise UserError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}") from None


def plain_name(name: str) -> str:
    """The letters and digits of a task's name, by which its spellings are the same."""
    return name.lower().replace("-", "").replace("_", "")
