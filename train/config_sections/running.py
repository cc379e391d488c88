"""Checkpoints, evaluation, the run folder and the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.config_sections.checks import refuse, require_at_most, require_not_negative, require_positive

MAX_TIMEOUT_S = 10_000_000


@dataclass(frozen=True)
class CheckpointConfig:
    """What a killed run can go on from."""

    every_steps: int = 500
    """Steps between checkpoints; the last step is always saved."""

    keep_last: int = 2
    """Newest checkpoints that are kept; of the older ones only milestones and the best by held-out loss stay."""

    milestone_every_steps: int | None = None
    """Checkpoints at multiples of this step are kept for good; null: none."""

    stop_after_failures: int = 3
    """Checkpoints in a row that could not be written (full disk), after which the run stops."""

    allow_changed_config: bool = False
    """Go on from a checkpoint although the configuration has changed since, but for optimizer.name."""

    def __post_init__(self) -> None:
        require_positive(
            self, "checkpoint", "every_steps", "keep_last", "milestone_every_steps", "stop_after_failures"
        )
        milestone = self.milestone_every_steps
        if milestone is not None and milestone % self.every_steps != 0:
            remedy = f"give a multiple of checkpoint.every_steps={self.every_steps}"
            refuse(self, "checkpoint.milestone_every_steps", remedy)


@dataclass(frozen=True)
class EvaluationConfig:
    """Scores on the held-out split while training.

    Always under the same masks, whatever `masking` trains with: 15 % of the positions, each token alike, 80/10/10.
    """

    every_steps: int = 500
    """Steps between evaluations; the first and the last step are always evaluated."""

    max_windows: int = 2048
    """Held-out sequences that are scored, always the same ones."""

    def __post_init__(self) -> None:
        require_positive(self, "evaluation", "every_steps", "max_windows")


@dataclass(frozen=True)
class RunConfig:
    """Where a run leaves what it makes, and what it says meanwhile."""

    dir: str = "runs/distilbert-base"
    """Run folder: configs, metrics, TensorBoard, checkpoints, the student. A run folder that holds a
    checkpoint is continued."""

    log_every_steps: int = 10
    """Steps between rows of metrics.jsonl, TensorBoard points and updates of the progress bar."""

    trackers: tuple[Literal["tensorboard", "mlflow", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where figures are shown beside metrics.jsonl: TensorBoard in the run folder, and services through their own
    libraries and environment variables (requirements-trackers.txt); [] for none."""

    stop_after_non_finite: int = 20
    """Steps in a row with a non-finite gradient after which the run stops."""

    rollback_on_divergence: int = 0
    """So many times a run that diverges goes back to its last checkpoint by itself and leaves out the batches of the
    bad steps; every other step keeps its batch, masks and learning rate. 0: it stops."""

    spike_deviations: float = 6.0
    """A step whose loss is so many standard deviations above the median of the 200 before is reported, with its
    sequences in spikes.jsonl; 0: none."""

    profile_steps: int = 0
    """Steps to trace with torch's profiler, after the first three of this start: RUN/profile/; --profile
    is short for 3."""

    lost_rank_timeout_s: float = 60.0
    """A rank that is not heard of for that long (killed, frozen, cut off) ends the job."""

    hang_timeout_s: float = 1800.0
    """Seconds without progress on any rank after which the job ends."""

    def __post_init__(self) -> None:
        names = ("log_every_steps", "stop_after_non_finite", "lost_rank_timeout_s", "hang_timeout_s")
        require_positive(self, "run", *names)
        require_at_most(self, "run", MAX_TIMEOUT_S, "lost_rank_timeout_s", "hang_timeout_s")
        require_not_negative(self, "run", "spike_deviations", "profile_steps", "rollback_on_divergence")
        try:
            self.dir.encode()
        except UnicodeEncodeError:  # bytes of the command line that are no UTF-8
            refuse(self, "run.dir", "give a path in UTF-8, since tokenizers write to no other")


@dataclass(frozen=True)
class DeepSpeedConfig:
    """The engine."""

    config: str | None = None
    """DeepSpeed JSON; null: ds_configs/fp16.json on GPUs, ds_configs/cpu.json elsewhere (ds_configs/cpu-bf16.json on
    CPUs with fast bf16 products: a run says at its start what they are worth)."""

    log_level: Literal["debug", "info", "warning", "error"] = "error"
    """What DeepSpeed may say."""
