"""The stages of launch/study.py: learning rates, the teacher's head, every run, the scores, the tables."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from data_prep.shard_format.files import write_json, write_text
from launch.common.tables import text_table
from launch.experiments.job import Finetuning, Job
from launch.experiments.run_folders import is_finished, refuse_other_runs, summary_of
from launch.experiments.study_figure import plot
from launch.experiments.study_records import FILE, Records, made_of, noted, remove_state
from launch.experiments.study_results import EQUAL_TIME, Scores, StudiedModel, StudyFile, TriedRate, tables_of
from launch.experiments.study_runs import HEAD, Study, StudyRun
from launch.experiments.variant import Variant
from train.errors import UserError
from train.finetuning.results import read_scores
from train.models.build import TeacherFolder, count_parameters
from train.run_folder import MODEL, final_model, provenance

TEACHER = "teacher"


@dataclass
class StudyJob:
    """A study while it runs.

    Args:
        records: what study.json remembers of runs whose folders may be gone.
        only: the one run that is trained and scored; None for all.
        keep: leave checkpoints and fine-tuned weights of what is scored.
    """

    job: Job
    study: Study
    records: Records
    only: str | None = None
    keep: bool = False
    rates: list[TriedRate] = field(default_factory=list)
    made: list[StudyRun] = field(default_factory=list)
    """Every student, in the order of the tables."""

    def run(self) -> int:
        """Everything that is not finished, one run after another trained and scored; the exit code.

        Raises:
            StoppedError: a signal came.
            UserError: `only` names no run, or a record is of other settings.
        """
        study, records = self.study, self.records
        records.model(TEACHER, records.of_teacher(study.teacher))
        searches = {run.variant.name: run for run in study.searches()}
        unrated = {each.name: study.rates[0] for each in study.objectives}
        known = {run.variant.name: run for run in study.runs(unrated)} | searches
        names = [HEAD, *known] if study.needs_head else [*known]
        if self.only and self.only not in names:
            raise UserError(f"--only {self.only}: no such run; there are {', '.join(names)}")
        wanted = study.objectives
        if self.only in known:
            wanted = [each for each in wanted if each.name == known[self.only].objective]
        head_rate = None
        if study.needs_head and any(each.needs_head for each in wanted):
            head_rate = self.best_rate(HEAD, study.search(study.head()), "heldout_mlm_loss")
            head = f"{HEAD} of {records.names[study.teacher]}, learning rate {head_rate:g}"
            records.names[str(study.out / HEAD / MODEL)] = head
        self.head = study.head(head_rate)
        if self.only == HEAD or self.only in searches:
            self.train([self.head if self.only == HEAD else searches[self.only].variant])
            return self.ended()
        rates = dict(unrated)
        for each in wanted:
            tries = [run.variant for run in searches.values() if run.objective == each.name]
            rates[each.name] = self.best_rate(each.name, tries, each.selects)
        self.made = [run for run in study.runs(rates) if self.only in (None, run.variant.name)]
        for run in self.made:
            records.model(run.variant.name, self.settings(run.variant))  # refused before hours, not after
        if self.only is None:
            self.score(TEACHER, study.teacher)
        planned = list(self.made)
        for run in planned:
            self.train_and_score(run)
        if self.only is None:
            for run in self.equal_time(rates):
                self.made.append(run)
                self.train_and_score(run)
            print("\n" + self.write(), flush=True)
        return self.ended()

    def ended(self) -> int:
        """The exit code, after what has failed."""
        for name, reason in self.job.failed.items():
            print(f"FAILED: {name} ({reason})", file=sys.stderr)
        return 1 if self.job.failed else 0

    def settings(self, variant: Variant) -> dict[str, Any]:
        """What the run's result depends on."""
        return self.records.settings(self.job.config_of(variant))

    def train(self, runs: Sequence[Variant]) -> None:
        """`Job.train`, after a look at what their folders hold; the teacher's head first, where one needs it."""
        teacher = str(self.study.out / HEAD / MODEL)
        if any(run.changes["model.teacher"] == teacher for run in runs) and not is_finished(
            self.job.out / HEAD
        ):
            if HEAD not in self.job.failed:
                self.train([self.head])
            if HEAD in self.job.failed:
                for run in runs:
                    self.job.fail(run.name, "without the teacher's head it cannot be trained")
                return
        refuse_other_runs(self.job.out, runs, self.job.config_of)
        with noted([self.job.out / run.name for run in runs], is_finished):
            self.job.train(runs)

    def train_and_score(self, run: StudyRun) -> None:
        """One run, unless all of it is recorded; its bulky state goes."""
        name = run.variant.name
        record = self.records.model(name, self.settings(run.variant))
        if record is not None and not self.unscored(name):
            print(f"{name}: recorded in {self.records.path}", flush=True)
            return
        self.train([run.variant])
        if name in self.job.failed:
            return
        self.save()  # what is known is worth keeping before fine-tuning
        self.score(name, str(final_model(self.job.out / name)))

    def unscored(self, name: str) -> list[str]:
        """The tasks of which there is no record."""
        return [task for task in self.job.finetuning if task not in self.records.scores(name)]

    def score(self, name: str, model: str) -> None:
        """Fine-tune a model on the tasks that are not recorded."""
        if not (tasks := self.unscored(name)):
            return
        with noted([self.job.out / name / "scores" / task for task in tasks], _seeds_of):
            self.job.finetune({name: model}, tasks)
        self.save()
        if not self.keep and name not in self.job.failed:
            remove_state(self.job.out / name)

    def best_rate(self, objective: str, runs: Sequence[Variant], key: str) -> float:
        """The learning rate of the run with the lowest held-out loss; without runs there is only one."""
        if not runs:
            return self.study.rates[0]
        found = []
        for rate, run in zip(self.study.rates, runs, strict=True):
            settings = self.settings(run)
            if (tried := self.records.tried(settings)) is not None:
                found.append(tried)
                continue
            if self.only not in (None, HEAD) and not is_finished(self.job.out / run.name):
                # Another job of the array may be at it, and a rate chosen without it would not be the study's.
                first = HEAD if objective == HEAD else run.name
                raise UserError(
                    f"--only {self.only} needs {run.name}, which is not finished: --only {first} before it (where it "
                    "diverges, leave its rate out of --rates)"
                )
            self.train([run])
            if run.name in self.job.failed:
                continue
            figures = _numbers(summary_of(self.job.out / run.name)["heldout"])
            if key not in figures:
                self.job.fail(run.name, f"its {key} is no number")
                continue
            tried = TriedRate(
                objective=objective,
                rate=rate,
                key=key,
                heldout=figures[key],
                chosen=False,
                settings=settings,
            )
            found.append(tried)
        if not found:
            raise UserError(
                f"every learning rate of {objective} has failed; see above, and give other --rates"
            )
        # What has been trained at the rate that was chosen stays: a rate that failed then may have a figure now.
        before = [tried.rate for tried in found if tried.chosen]
        best = before[0] if before else min(found, key=lambda tried: tried.heldout).rate
        self.rates += [tried.model_copy(update={"chosen": tried.rate == best}) for tried in found]
        self.save()
        return best

    def equal_time(self, rates: Mapping[str, float]) -> list[StudyRun]:
        """Relations for as long as the triple loss takes, by the tokens/s of the runs of the budget on one machine."""
        compared, found = ("triple", "relations"), []
        objectives = {each.name: each for each in self.study.objectives if each.name in compared}
        models = {each.name: each for each in self.result().models}
        for student in self.study.students if len(objectives) == len(compared) else ():
            runs = [models.get(f"{student.name}-{name}") for name in compared]
            slow, fast = (0.0 if run is None else run.tokens_per_s or 0.0 for run in runs)
            machines = {run.made.get("hardware") for run in runs if run is not None}
            known = self.records.models.get(f"{student.name}-relations{EQUAL_TIME}")
            if known is not None:
                tokens = known.tokens
            elif fast > slow > 0 and len(machines) == 1 and None not in machines:
                tokens = round(self.study.scale.budget * fast / slow)
            else:
                continue
            made = self.study.run(student, objectives["relations"], rates["relations"], tokens, EQUAL_TIME)
            found.append(StudyRun(made, student.name, "relations"))
        return found

    def save(self) -> None:
        """study.json of what is finished; the jobs of an array leave it to the call for all."""
        if self.only is None:
            write_json(self.job.out / FILE, self.result().model_dump())

    def write(self) -> str:
        """study.json, study.md and study.png of what is finished; the tables for the screen."""
        study, out = self.result(), self.job.out
        tables = tables_of(study)
        write_json(out / FILE, study.model_dump())
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
        records = self.records
        models = [
            StudiedModel(
                name=TEACHER,
                title=self.study.teacher,
                parameters=self.parameters,
                settings=records.of_teacher(self.study.teacher),
                scores=self.scores_of(TEACHER),
            )
        ]
        for run in self.made:
            variant = run.variant
            name = variant.name
            if (record := records.models.get(name)) is not None:
                models.append(record.model_copy(update={"scores": self.scores_of(name)}))
            elif is_finished(self.job.out / name):
                figures = summary_of(self.job.out / name)
                heldout = {key: _numbers(figures[key]) for key in ("heldout_before", "heldout")}
                models.append(
                    StudiedModel(
                        name=name,
                        title=variant.title,
                        student=run.student,
                        objective=run.objective,
                        parameters=figures["parameters"]["student"],
                        changed=variant.changed,
                        settings=self.settings(variant),
                        made=made_of(self.job.out / name),
                        tokens=figures["tokens"],
                        tokens_per_s=figures["tokens_per_s"],
                        scores=self.scores_of(name),
                        **heldout,
                    )
                )
        names = {model.name for model in models}
        models += [record for name, record in records.models.items() if name not in names]
        tried = [rate.settings for rate in self.rates]
        return StudyFile(
            teacher=self.study.teacher,
            tasks=list(self.job.finetuning),
            budget=self.study.scale.budget,
            finetuning=spelled_flags(self.job.finetuning),
            models=models,
            rates=[*self.rates, *(rate for rate in records.rates if rate.settings not in tried)],
            versions=provenance(),
        )

    @cached_property
    def parameters(self) -> int:
        """Of the teacher."""
        return count_parameters(TeacherFolder(self.study.teacher, needs_head=False).model)

    def scores_of(self, name: str) -> dict[str, Scores]:
        """By task: the recorded ones, and those that were taken here."""
        found = self.records.scores(name)
        for task in self.job.finetuning:
            folder = self.job.out / name / "scores" / task
            if task in found or (scores := read_scores(folder)) is None:
                continue
            seeds = [float(seed["score"]) for seed in scores["seeds"].values()]
            found[task] = Scores(seeds=seeds, settings=scores["settings"], made=made_of(folder))
        return found


def _seeds_of(folder: Path) -> Any:
    """What is scored of a task so far."""
    return (read_scores(folder) or {}).get("seeds")


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a held-out row: a divergence from a teacher that overflows has none."""
    return {key: value for key, value in row.items() if isinstance(value, float) and math.isfinite(value)}


def spelled_flags(by_task: Mapping[str, Finetuning]) -> str:
    """What all tasks share, then what one has beside it: "--seeds 3 --bf16; imdb: --max-length=256"."""
    columns = zip(*(each.flags for each in by_task.values()), strict=False)
    shared = [flags[0] for flags in takewhile(lambda flags: len(set(flags)) == 1, columns)]
    own = {each.task: each.flags[len(shared) :] for each in by_task.values()}
    return "; ".join(
        [" ".join(shared), *(f"{task}: {' '.join(flags)}" for task, flags in own.items() if flags)]
    )


def listed(study: Study) -> str:
    """What would be trained; learning rates and the runs of equal time are found on the way."""
    rows = [(run.name, run.changed.replace(" ", "\n"), run.title) for run in study.listed()]
    return text_table(("run", "changes", "what it is"), rows, right=False)
