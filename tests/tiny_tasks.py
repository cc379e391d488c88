"""Tasks that a tiny encoder can learn, and tiny encoders of several families, for the tests of fine-tuning."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.finetune import job_of, parser
from tests.conftest import WORDS
from tests.unit.finetuning.squad_tokenizers import byte_pairs, wordpiece
from train.finetuning.settings import Job
from train.finetuning.tasks import task_named

FILLERS = [word for word in WORDS if word not in ("fast", "slow")]


def save_encoder(
    folder: Path,
    family: str = "bert",
    tokenizer: Any = None,
    seed: int = 0,
    num_layers: int = 2,
    num_positions: int = 66,
) -> str:
    """A random masked language model of width 32, with its tokenizer."""
    import torch
    import transformers

    torch.manual_seed(seed)
    tokenizer = tokenizer or (byte_pairs() if family == "roberta" else wordpiece())
    common = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": num_positions,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "distilbert":
        config: Any = transformers.DistilBertConfig(
            dim=32, hidden_dim=64, n_layers=num_layers, n_heads=4, **common
        )
        kind: Any = transformers.DistilBertForMaskedLM
    else:
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        shape["num_hidden_layers"] = num_layers
        if family == "roberta":
            shape["type_vocab_size"] = 1
        name = {"bert": "Bert", "roberta": "Roberta"}[family]
        config = getattr(transformers, f"{name}Config")(**shape, **common)
        kind = getattr(transformers, f"{name}ForMaskedLM")
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sentences(count: int, seed: int) -> list[tuple[str, int]]:
    """(text, label): 1 with the word "fast" in it, 0 with "slow"."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        words = [*rng.choices(FILLERS, k=rng.randint(1, 9)), "slow" if index % 2 else "fast"]
        rng.shuffle(words)
        rows.append((" ".join(words), 1 - index % 2))
    return rows


def write_sst2(folder: Path, num_train: int = 96, num_dev: int = 32) -> Path:
    """folder/SST-2/train.tsv and dev.tsv; returns `folder`."""
    place = folder / "SST-2"
    place.mkdir(parents=True)
    for name, count, seed in (("train", num_train, 0), ("dev", num_dev, 1)):
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in sentences(count, seed))]
        (place / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write_pairs(
    folder: Path, header: str, labels: Sequence[str], names: Sequence[str] = ("train", "dev"), count: int = 24
) -> Path:
    """A .tsv for each name with the columns sentence1, sentence2 of `header`, and labels in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        texts = [text for text, _ in sentences(2 * count, seed)]
        rows = zip(texts[:count], texts[count:], strict=True)
        cells = [(*pair, labels[index % len(labels)]) for index, pair in enumerate(rows)]
        lines = [header, *("\t".join((*["x"] * (header.count("\t") - 2), *row)) for row in cells)]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def job_for(out: Path, model: str, task: str, data: Path | str | None, *flags: str) -> tuple[Job, list[str]]:
    """(the job of a command line, the list that it says things to)."""
    import dataclasses

    words = ["--model", model, "--task", task, "--out", str(out), *flags]
    words += ["--data", str(data)] if data is not None else []
    said: list[str] = []
    job = job_of(task_named(task), parser().parse_args(words))
    return dataclasses.replace(job, say=said.append), said


class StopAfter:
    """Asked to stop from the n-th time on that somebody looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    @property
    def requested(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def when_asked(self, act: Callable[[], None]) -> None:
        pass
