"""The stages of launch/study.py: learning rates, the teacher's head, every run, the scores, the tables."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.shard_format.files import write_json, write_text
from launch.experiments.job import Job
from launch.experiments.run_folders import is_finished, refuse_other_runs, summary_of
from launch.experiments.study_figure import plot
from launch.experiments.study_results import EQUAL_TIME, Scores, StudiedModel, StudyFile, TriedRate, tables_of
from launch.experiments.study_runs import HEAD, Study, StudyRun
from launch.experiments.variant import Variant
from launch.tables import text_table
from train.errors import UserError
from train.finetuning.results import read_scores
from train.models.build import TeacherFolder, count_parameters
from train.run_folder import final_model, provenance

TEACHER = "teacher"


@dataclass
class StudyJob:
    """A study while it runs.

    Args:
        only: the one run that is trained and scored; None for all.
    """

    job: Job
    study: Study
    only: str | None = None
    rates: list[TriedRate] = field(default_factory=list)
    made: list[StudyRun] = field(default_factory=list)
    """Every student, in the order of the tables."""

    def run(self) -> int:
        """Everything that is not finished; the exit code.

        Raises:
            StoppedError: a signal came.
            UserError: `only` names no run.
        """
        study, job = self.study, self.job
        names = [run.variant.name for run in study.runs({each.name: 0.0 for each in study.objectives})]
        if self.only and self.only not in names:
            raise UserError(f"--only {self.only}: no such run; there are {', '.join(names)}")
        if study.needs_head:
            rate = self.best_rate(HEAD, study.search(study.head()), "heldout_mlm_loss")
            self.train([study.head(rate)])
            if HEAD in job.failed:
                print("without the teacher's head nothing of the rest can be trained", file=sys.stderr)
                return 1
        first = study.students[0]
        rates = {
            each.name: self.best_rate(each.name, study.search(study.run(first, each)), each.selects)
            for each in study.objectives
        }
        self.made = study.runs(rates)
        if self.only:
            self.made = [run for run in self.made if run.variant.name == self.only]
        self.train([run.variant for run in self.made])
        if self.only is None:
            self.made += self.equal_time(rates)
            self.train([run.variant for run in self.made if run.variant.name.endswith(EQUAL_TIME)])
            self.write()  # what is known is worth keeping before the hours of fine-tuning
        self.score()
        if self.only is None:
            print("\n" + self.write(), flush=True)
        for name, reason in job.failed.items():
            print(f"FAILED: {name} ({reason})", file=sys.stderr)
        return 1 if job.failed else 0

    def train(self, runs: Sequence[Variant]) -> None:
        """`Job.train`, after a look at what their folders hold already."""
        refuse_other_runs(self.job.out, runs, self.job.config_of)
        self.job.train(runs)

    def best_rate(self, objective: str, runs: Sequence[Variant], key: str) -> float:
        """The learning rate of the run with the lowest held-out loss; without runs there is only one."""
        if not runs:
            return self.study.rates[0]
        self.train(runs)
        tried = {}
        for rate, run in zip(self.study.rates, runs, strict=True):
            if run.name in self.job.failed:
                continue
            figures = _numbers(summary_of(self.job.out / run.name)["heldout"])
            if key in figures:
                tried[rate] = figures[key]
            else:
                self.job.fail(run.name, f"its {key} is no number")
        if not tried:
            raise UserError(
                f"every learning rate of {objective} has failed; see above, and give other --rates"
            )
        best = min(tried, key=lambda rate: tried[rate])
        self.rates += [
            TriedRate(objective=objective, rate=rate, key=key, heldout=value, chosen=rate == best)
            for rate, value in tried.items()
        ]
        return best

    def equal_time(self, rates: Mapping[str, float]) -> list[StudyRun]:
        """Relations for as long as the triple loss takes on this machine, by the tokens/s of the runs of the budget."""
        compared, found = ("triple", "relations"), []
        objectives = {each.name: each for each in self.study.objectives if each.name in compared}
        for student in self.study.students if len(objectives) == len(compared) else ():
            folders = [self.job.out / f"{student.name}-{name}" for name in compared]
            if not all(map(is_finished, folders)):
                continue
            slow, fast = (summary_of(folder)["tokens_per_s"] or 0.0 for folder in folders)
            if fast <= slow or not slow:
                continue
            tokens = round(self.study.scale.budget * fast / slow)
            run = self.study.run(student, objectives["relations"], rates["relations"], tokens, EQUAL_TIME)
            found.append(StudyRun(run, student.name, "relations"))
        return found

    def score(self) -> None:
        """Fine-tune the teacher and every student."""
        names = [run.variant.name for run in self.made if run.variant.name not in self.job.failed]
        students = {name: str(final_model(self.job.out / name)) for name in names}
        self.job.finetune(students if self.only else {TEACHER: self.study.teacher, **students})

    def write(self) -> str:
        """study.json, study.md and study.png of what is finished; the tables for the screen."""
        study, out = self.result(), self.job.out
        tables = tables_of(study)
        write_json(out / "study.json", study.model_dump())
        parts = [
            f"# {study.teacher}: what each way of distilling it is worth",
            "![mean score of every model, and over tokens](study.png)",
            *(f"## {table.title}\n\n{table.as_markdown()}" for table in tables),
        ]
        write_text(out / "study.md", "\n\n".join(parts) + "\n")
        plot(study, out / "study.png")
        files = {"figure": "study.png", "tables": "study.md", "figures": "study.json"}
        lines = [f"{what + ':':<9}{out / name}" for what, name in files.items()]
        return "\n\n".join([*(table.as_text() for table in tables), "\n".join(lines)])

    def result(self) -> StudyFile:
        """What is finished so far."""
        teacher = TeacherFolder(self.study.teacher, needs_head=False)
        models = [
            StudiedModel(
                name=TEACHER,
                title=self.study.teacher,
                parameters=count_parameters(teacher.model),
                scores=self.scores_of(TEACHER),
            )
        ]
        for made in self.made:
            run = made.variant
            if not is_finished(self.job.out / run.name):
                continue
            figures = summary_of(self.job.out / run.name)
            heldout = {name: _numbers(figures[name]) for name in ("heldout_before", "heldout")}
            models.append(
                StudiedModel(
                    name=run.name,
                    title=run.title,
                    student=made.student,
                    objective=made.objective,
                    parameters=figures["parameters"]["student"],
                    changed=run.changed,
                    tokens=figures["tokens"],
                    tokens_per_s=figures["tokens_per_s"],
                    scores=self.scores_of(run.name),
                    **heldout,
                )
            )
        return StudyFile(
            teacher=self.study.teacher,
            tasks=self.job.tasks,
            budget=self.study.scale.budget,
            finetuning=" ".join(self.job.finetuning),
            models=models,
            rates=self.rates,
            versions=provenance(),
        )

    def scores_of(self, name: str) -> dict[str, Scores]:
        """Of the tasks that are scored, by task."""
        found = {task: read_scores(self.job.out / name / "scores" / task) for task in self.job.tasks}
        return {
            task: Scores(seeds=[float(seed["score"]) for seed in scores["seeds"].values()])
            for task, scores in found.items()
            if scores is not None
        }


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a held-out row: a divergence from a teacher that overflows has none."""
    return {key: value for key, value in row.items() if isinstance(value, float) and math.isfinite(value)}


def listed(study: Study) -> str:
    """What would be trained; learning rates and the runs of equal time are found on the way."""
    rows = [(run.name, run.changed.replace(" ", "\n"), run.title) for run in study.listed()]
    return text_table(("run", "changes", "what it is"), rows, right=False)
