"""Where figures are looked at: TensorBoard, MLflow, Weights & Biases, Trackio, each through its own library.

`run.trackers` names them. What a library lets its user choose (server, project, login, offline) it reads from its own
environment variables; the names here are for who has set none. All get the resolved configuration and the same figures
under the same names, on rank 0.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from data_prep.shard_format.files import read_json, write_json
from data_prep.shard_format.required_packages import install_command
from train.errors import UserError, one_line
from train.run_folder import RESTORE, flatten

PROJECT = "halfling"
IDS = "trackers.json"
"""In the run folder: the run's id with a service, under which a resumed run goes on."""
# MLflow would try for minutes to reach a server that is gone.
MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
MAX_PARAMETER_LENGTH = 500
"""Of MLflow's stores in older servers."""
SHOWN_AS_METRICS = ("loss/total", "heldout/mlm_loss", "heldout/kl", "speed/tokens_per_s")
"""Beside the hyper-parameters in TensorBoard's table."""


@dataclass(frozen=True)
class Start:
    """What a tracker is opened with."""

    run_dir: Path
    name: str
    resumed_step: int
    """0 for a new run: what a service holds of an earlier start at step 0 stays there, as another run."""
    config: Mapping[str, Any]
    """The resolved configuration, as a tree of sections."""


class TensorBoard:
    """RUN/tensorboard: figures, histograms, the configuration as text and as a row of the table HPARAMS."""

    def __init__(self, start: Start) -> None:
        self._folder = str(start.run_dir / "tensorboard")
        self._writer: Any = self._open(start.resumed_step + 1 if start.resumed_step else 0)
        if start.config:
            text = yaml.safe_dump(dict(start.config), sort_keys=False)
            self._writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))
            self._add_table_row(start.config)

    def _open(self, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._folder, purge_step=purge_step)

    def _add_table_row(self, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in flatten(config).items()
        }
        # SummaryWriter.add_hparams would open a run of its own beside this one.
        for part in hparams(plain, dict.fromkeys(SHOWN_AS_METRICS, 0.0)):
            self._writer.file_writer.add_summary(part)

    def row(self, step: int, values: Mapping[str, float], histograms: Mapping[str, torch.Tensor]) -> None:
        writer, self._writer = self._writer, None  # one that has failed once fails for ever
        writer = writer or self._open(None)
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        for name, tensor in histograms.items():
            numbers = tensor.detach().float().cpu()
            if len(numbers := numbers[torch.isfinite(numbers)]):
                writer.add_histogram(name, numbers, step)
        self._writer = writer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class MLflow:
    """MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME; rows are sent by a thread of its library's."""

    def __init__(self, start: Start) -> None:
        for name, value in MLFLOW_PATIENCE.items():
            os.environ.setdefault(name, value)
        import mlflow

        self._mlflow = mlflow
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
            mlflow.set_experiment(PROJECT)
        known = remembered(start, "mlflow")
        run = mlflow.start_run(run_id=known, run_name=None if known else start.name)
        if known is None:
            mlflow.log_params(
                {key: str(value)[:MAX_PARAMETER_LENGTH] for key, value in flatten(start.config).items()}
            )
            mlflow.log_text(yaml.safe_dump(dict(start.config), sort_keys=False), "config.yaml")
            remember(start, "mlflow", run.info.run_id)

    def row(self, step: int, values: Mapping[str, float], histograms: Mapping[str, torch.Tensor]) -> None:
        self._mlflow.log_metrics(dict(values), step=step, synchronous=False)

    def close(self) -> None:
        try:
            self._mlflow.flush_async_logging()
        finally:
            self._mlflow.end_run()


class Wandb:
    """WANDB_MODE=offline, WANDB_PROJECT, WANDB_API_KEY; its files lie in RUN/wandb."""

    def __init__(self, start: Start) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=start.name,
            dir=str(start.run_dir),
            config=dict(start.config),
            id=remembered(start, "wandb"),
            resume="allow",
            settings=wandb.Settings(console="off"),
        )
        remember(start, "wandb", self._run.id)

    def row(self, step: int, values: Mapping[str, float], histograms: Mapping[str, torch.Tensor]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """TRACKIO_DIR, TRACKIO_SPACE_ID; `trackio show` opens its page."""

    def __init__(self, start: Start) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=start.name,
            config=flatten(start.config),
            resume="allow" if start.resumed_step else "never",
            space_id=os.environ.get("TRACKIO_SPACE_ID"),
            embed=False,
        )

    def row(self, step: int, values: Mapping[str, float], histograms: Mapping[str, torch.Tensor]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


Tracker = TensorBoard | MLflow | Wandb | Trackio
"""One place where figures go."""
TRACKERS: dict[str, Callable[[Start], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": Wandb,
    "trackio": Trackio,
}


def require_trackers(names: Sequence[str]) -> None:
    """UserError where a tracker's library is not installed."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"run.trackers: {' and '.join(missing)} not installed here: pip install {' '.join(missing)} (all "
            f"trackers: {install_command('trackers')}), or take it off the list"
        )


def open_tracker(name: str, start: Start) -> Tracker:
    """One of `TRACKERS`.

    Raises:
        UserError: its library cannot begin: no server, no login, a run that was deleted there.
        OSError: TensorBoard cannot write.
    """
    if name == "tensorboard":
        return TensorBoard(start)
    try:
        return TRACKERS[name](start)
    except Exception as error:  # these libraries have no class in common
        raise UserError(
            f"run.trackers: {name} cannot begin: {one_line(error)}; mend that, or take it off the list"
        ) from error


def remembered(start: Start, name: str) -> str | None:
    """A service's id of the run that is resumed."""
    path = start.run_dir / IDS
    found = read_json(path, RESTORE).get(name) if start.resumed_step and path.exists() else None
    return found if isinstance(found, str) else None


def remember(start: Start, name: str, run_id: str) -> None:
    """Keep a service's id of this run in RUN/trackers.json."""
    path = start.run_dir / IDS
    known = read_json(path, RESTORE) if path.exists() else {}
    write_json(path, {**known, name: run_id})
