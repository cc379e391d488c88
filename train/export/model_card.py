"""README.md of an exported folder: what the model is, how it was made and of what, what it scores, what it is not for.

The figures come from the run folder; licence, language and scores are what the user says, and missing ones are named as
missing. No path of the machine is written, but names of folders.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from transformers import PreTrainedModel

from data_prep.shard_format.checks import first_problem
from data_prep.shard_format.manifest import MANIFEST_NAME, Manifest
from train.checkpointing.integrity import read_facts
from train.config_sections.objective import OBJECTIVE_WEIGHTS
from train.errors import UserError
from train.finetuning.results import FILE, read_scores
from train.models.build import count_parameters
from train.models.families import has_head
from train.run_folder import recorded_config

NOT_STATED = "not stated"
USES = {
    "fill-mask": (
        "transformers",
        ["from transformers import pipeline", "", 'fill_mask = pipeline("fill-mask", model="{name}")'],
    ),
    "feature-extraction": (
        "transformers",
        ["from transformers import AutoModel", "", 'encoder = AutoModel.from_pretrained("{name}")'],
    ),
    "sentence-similarity": (
        "sentence-transformers",
        [
            "from sentence_transformers import SentenceTransformer",
            "",
            'model = SentenceTransformer("{name}")',
        ],
    ),
}
"""The hub's name of what a model does -> library, lines of code that load it."""


@dataclass(frozen=True)
class Stated:
    """What only the user can say."""

    name: str = "THIS_FOLDER"
    """Of the repository on the hub."""
    license: str | None = None
    """Of the weights: an identifier of the hub's, as apache-2.0."""
    languages: tuple[str, ...] = ()
    """Codes: en, de."""
    data_license: str | None = None
    scores: Path | None = None
    """What launch/finetune.py left for this model: DIR/TASK/scores.json."""


class CardFigures(BaseModel):
    """What the model card takes of RUN/summary.json."""

    teacher: str | list[str] | None
    hub_names: list[str] = []
    """Which of the teachers, or the model begun from, were no folders when the run read them; runs of before December
    2026 do not say."""
    steps: int | None = None
    """Of the run; older summaries may not say."""
    tokens: int
    heldout: dict[str, float | str | None]
    versions: dict[str, str]


def model_card(
    student: PreTrainedModel,
    checkpoint: Path,
    summary: Mapping[str, Any] | None,
    is_of_sentences: bool = False,
    stated: Stated | None = None,
) -> str:
    """The card of a checkpoint's student.

    Args:
        summary: RUN/summary.json; None leaves its figures out.
        is_of_sentences: the folder has sentence-transformers' files.
    Raises:
        UserError: the summary, the configuration or the scores are damaged.
    """
    stated, run_dir = stated or Stated(), checkpoint.parent.parent
    figures = _figures(summary, run_dir) if summary else None
    config = recorded_config(run_dir)
    teachers, on_hub = _teachers(config, figures), figures.hub_names if figures else []
    kind = "sentence-similarity" if is_of_sentences else "feature-extraction"
    kind = "fill-mask" if has_head(student) else kind
    title = (
        f"{student.config.model_type} with {student.config.num_hidden_layers} layers of width "
        f"{student.config.hidden_size}"
    )
    code = [line.replace("{name}", stated.name) for line in USES[kind][1]]
    is_its_end = figures is None or figures.steps in (None, read_facts(checkpoint).step)
    sections = [
        _front_matter(kind, teachers, on_hub, stated),
        f"# {title}",
        _opening(student, checkpoint, [shown_name(name, on_hub) for name in teachers]),
        "\n".join(["```python", *code, "```"]),
        _recipe(config, teachers, on_hub),
        _data(config, stated),
        _scores(figures if is_its_end else None, stated),
        _limits(stated),
        _citation(title, stated),
        "Made with " + ", ".join(map(" ".join, figures.versions.items())) + "." if figures else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _figures(summary: Mapping[str, Any], run_dir: Path) -> CardFigures:
    try:
        return CardFigures.model_validate(summary)
    except ValidationError as error:
        path = run_dir / "summary.json"
        raise UserError(
            f"{path} is damaged ({first_problem(error)}); restore it, or remove it to go without its figures"
        ) from None


def shown_name(name: str, on_hub: Collection[str] = ()) -> str:
    """A teacher's or corpus's name without the machine's folders: one `on_hub` as it is, of a path the telling part."""
    if name in on_hub:
        return name
    path = Path(name.rstrip("/"))
    return path.parent.name if path.name in ("model", "student") and path.parent.name else path.name


def _teachers(config: Mapping[str, Any], figures: CardFigures | None) -> list[str]:
    given = figures.teacher if figures else config.get("model", {}).get("teacher")
    return [given] if isinstance(given, str) else list(given or [])


def _front_matter(kind: str, teachers: Sequence[str], on_hub: Sequence[str], stated: Stated) -> str:
    fields: dict[str, Any] = {"library_name": USES[kind][0], "pipeline_tag": kind}
    fields |= {"license": stated.license} if stated.license else {}
    fields |= {"language": list(stated.languages)} if stated.languages else {}
    fields |= {"base_model": list(on_hub)} if on_hub else {}
    fields["tags"] = ["halfling", *(["distillation"] if teachers else [])]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _opening(student: PreTrainedModel, checkpoint: Path, teachers: Sequence[str]) -> str:
    facts = read_facts(checkpoint)
    how = f"distilled from {', '.join(teachers)}" if teachers else "trained without a teacher"
    return (
        f"{count_parameters(student):,} parameters, {how}, with Halfling for {facts.step:,} steps of "
        f"{'AdamW' if facts.optimizer == 'adamw' else 'LAMB'}."
    )


def _recipe(config: Mapping[str, Any], teachers: Sequence[str], on_hub: Sequence[str]) -> str:
    """Of the objective the terms that are on."""
    if not config:
        return ""
    training, optimizer = config.get("training", {}), config.get("optimizer", {})
    model, objective = config.get("model", {}), config.get("objective", {})
    weights = {name: objective[name] for name in OBJECTIVE_WEIGHTS if objective.get(name)}
    rows = {
        "layers of the teacher": model.get("layer_map") if teachers else None,
        "begun from": shown_name(model["start_from"], on_hub) if model.get("start_from") else None,
        "temperature": objective.get("temperature") if "kd_weight" in weights else None,
        **{name.replace("_", " "): weight for name, weight in weights.items()},
        "optimizer": f"{optimizer.get('name')}, learning rate {optimizer.get('lr')}",
        "global batch": f"{training.get('global_batch_size')} sequences of "
        f"{config.get('data', {}).get('sequence_length')} tokens",
    }
    return "## Recipe\n\n" + _table({name: value for name, value in rows.items() if value is not None})


def _data(config: Mapping[str, Any], stated: Stated) -> str:
    shards = str(config.get("data", {}).get("shards", ""))
    lines = ["## Data", ""]
    if shards and Path(shards, MANIFEST_NAME).exists():
        manifest = Manifest.load(shards)
        train = manifest.splits["train"]
        lines += ["| source | documents | MB |", "|---|---|---|"]
        lines += [
            f"| {_source(source)} | {source.get('documents', 0):,} | {source.get('bytes', 0) / 1e6:,.1f} |"
            for source in manifest.sources
        ]
        lines += ["", f"{sum(shard.tokens for shard in train):,} tokens to train on."]
    else:
        lines.append(f"Shards: {shown_name(shards) or NOT_STATED}; their manifest was not at hand.")
    return "\n".join([*lines, f"Licence of the data: {stated.data_license or NOT_STATED}."])


def _source(source: Mapping[str, Any]) -> str:
    """A name on the hub, or of a path its last part; "." and ".." are those of the current folder."""
    name = str(source.get("source", source.get("kind", "")))
    if name.startswith("hub:"):
        return name
    path = re.sub(r"^(file|line|block):(?=.)", "", name)
    return os.path.basename(os.path.abspath(path)) or name


def _scores(figures: CardFigures | None, stated: Stated) -> str:
    """Those of the run's end, and those that were taken after it."""
    parts = []
    if figures:
        rows = {
            "tokens trained on": f"{figures.tokens:,}",
            **{name: _shown(value) for name, value in figures.heldout.items()},
        }
        parts.append(_table(rows))
    if stated.scores is not None:
        parts.append(_task_table(stated.scores))
    return "\n\n".join(["## Scores", *parts]) if parts else ""


def _task_table(folder: Path) -> str:
    if not folder.is_dir():
        raise UserError(f"--scores {folder}: no such folder")
    if (folder / FILE).exists():
        raise UserError(
            f"--scores {folder}: that is the folder of one task; give {folder.parent}, which holds it"
        )
    found = {path.name: read_scores(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    rows = {
        name: f"{scores['median']['score']:.1f} (median of {len(scores['seeds'])})"
        for name, scores in found.items()
        if scores is not None
    }
    if not rows:
        raise UserError(f"{folder}: no TASK/scores.json in it; give what launch/finetune.py left with --out")
    return _table(rows, ("fine-tuned on", "score"))


def _limits(stated: Stated) -> str:
    languages = ", ".join(stated.languages) or NOT_STATED
    return (
        f"## Limits\n\nLanguage: {languages}. Licence of the weights: {stated.license or NOT_STATED}; those of the "
        "teacher and of the data hold beside it. The model repeats what its text and its teacher say, prejudices "
        "included; it was not examined for harm, nor on languages and subjects other than its text's. It encodes text; "
        "it does not know whether a statement is true."
    )


def _citation(title: str, stated: Stated) -> str:
    where = "" if stated.name == Stated.name else f",\n  howpublished = {{{stated.name}}}"
    return (
        "## How to cite\n\nName this model and its teacher, and the method:\n\n```bibtex\n"
        f"@misc{{model,\n  title = {{{title}}}{where}\n}}\n"
        "@article{sanh2019distilbert,\n  title = {DistilBERT, a distilled version of BERT},\n"
        "  author = {Sanh, Victor and Debut, Lysandre and Chaumond, Julien and Wolf, Thomas},\n"
        "  journal = {arXiv:1910.01108},\n  year = {2019}\n}\n```"
    )


def _shown(value: float | str | None) -> str:
    return format(value, ".4f") if isinstance(value, float) else str(value)


def _table(rows: Mapping[str, Any], heads: tuple[str, str] = ("figure", "value")) -> str:
    lines = [f"| {heads[0]} | {heads[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())])
