"""What study.json remembers of runs whose folders are gone: a study goes on with it on another machine.

A record counts where its settings are those of the run that is asked for; the teacher and the corpus go by their
contents, so that neither's path matters. Scores count by their fine-tuning settings.
"""

from __future__ import annotations

import contextlib
import datetime
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.shard_format.files import read_json, write_json
from launch.common.figure_files import read_figures
from launch.common.machine import hardware
from launch.experiments.run_folders import FREE_TO_DIFFER
from launch.experiments.study_results import Scores, StudiedModel, StudyFile, TriedRate
from train.config import Config
from train.data.corpus import read_corpus_digests
from train.distributed.device import kind_here
from train.errors import UserError
from train.finetuning.results import FILE as SCORES
from train.run_folder import RESTORE, as_tree, flatten, provenance

FILE, MADE = "study.json", "made.json"


@contextlib.contextmanager
def noted(folders: Sequence[Path], state: Callable[[Path], Any]) -> Iterator[None]:
    """When, with which code and on what figures were taken: in made.json of those of `folders` whose `state` becomes
    another one in between, also where that ends early."""
    before = [state(folder) for folder in folders]
    try:
        yield
    finally:
        changed = [folder for folder, was in zip(folders, before, strict=True) if state(folder) != was]
        if changed:
            today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
            made = {"date": today, "commit": provenance()["commit"], "hardware": hardware(kind_here())}
        for folder in changed:
            write_json(folder / MADE, made)


def made_of(folder: Path) -> dict[str, str]:
    """What `noted` has left in a folder; empty where it has left nothing."""
    path = folder / MADE
    return read_json(path, RESTORE) if path.exists() else {}


@dataclass
class Records:
    """study.json as it was found.

    Args:
        models: by name, the teacher among them.
        finetuning: the settings of every task that is scored now.
        seeds: how many are asked for.
        names: what stands for a path in settings: the teacher's digest, for example.
    """

    models: Mapping[str, StudiedModel]
    rates: list[TriedRate]
    finetuning: Mapping[str, Mapping[str, Any]]
    seeds: int
    names: dict[str, str]
    path: Path
    corpus: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        out: Path,
        finetuning: Mapping[str, Mapping[str, Any]],
        seeds: int,
        names: dict[str, str],
    ) -> Records:
        """Those in `out`; none where it has no study.json.

        Raises:
            UserError: the file is no such file, or its scores were taken with other settings.
        """
        path = out / FILE
        found = read_figures(path, StudyFile) if path.exists() else None
        models = {} if found is None else {model.name: model for model in found.models}
        for model in models.values():
            for task, settings in finetuning.items():
                if task in model.scores and (before := model.scores[task].settings) != settings:
                    raise _other_settings(f"{path} holds {task} of {model.name}, scored", before, settings)
        return cls(models, [] if found is None else found.rates, finetuning, seeds, names, path)

    def of_teacher(self, teacher: str) -> dict[str, Any]:
        """The settings of the teacher's own record."""
        return {"weights": self.names[teacher]}

    def settings(self, config: Config) -> dict[str, Any]:
        """What a run's result depends on: the keys that are not at their defaults, paths as what lies there."""
        tree, defaults = flatten(as_tree(config)), flatten(as_tree(Config()))
        self.corpus = self.corpus or read_corpus_digests(config.data.shards)
        kept = {
            key: self.names.get(value, value) if isinstance(value, str) else value
            for key, value in tree.items()
            if value != defaults.get(key) and not key.startswith(FREE_TO_DIFFER) and key != "data.shards"
        }
        if "deepspeed.config" in kept:
            kept["deepspeed.config"] = Path(kept["deepspeed.config"]).name
        return {**kept, **self.corpus}

    def model(self, name: str, settings: Mapping[str, Any]) -> StudiedModel | None:
        """The record of a run; None where there is none.

        Raises:
            UserError: there is one of a run with other settings.
        """
        found = self.models.get(name)
        if found is not None and found.settings != settings:
            raise _other_settings(f"{self.path} holds {name}, trained", found.settings, settings)
        return found

    def scores(self, name: str) -> dict[str, Scores]:
        """Those that need not be taken again, by task: of as many seeds as are asked for, or tasks that are not."""
        found = self.models[name].scores if name in self.models else {}
        return {
            task: scores
            for task, scores in found.items()
            if task not in self.finetuning or len(scores.seeds) >= self.seeds
        }

    def tried(self, settings: Mapping[str, Any]) -> TriedRate | None:
        """The record of a short run of the search."""
        return next((rate for rate in self.rates if rate.settings == settings), None)


def _other_settings(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> UserError:
    changes = [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    return UserError(
        f"{what} with other settings:\n  " + "\n  ".join(changes) + "\ngive those again, or another --out"
    )


def remove_state(run_dir: Path) -> None:
    """Of a run that is trained and scored: its checkpoints and the fine-tuned weights. The model and scores stay."""
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    for scored in run_dir.glob(f"scores/*/seed-*/{SCORES}"):
        for path in scored.parent.iterdir():
            if path != scored:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
