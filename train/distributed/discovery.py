"""Which rank this process is and where their rendezvous is, from the variables that launchers set.

    deepspeed, torchrun     RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
    srun                    SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NUM_TASKS; the first host of the step's list; a
                            port made of the job's id
    mpirun                  OMPI_COMM_WORLD_*, or PMI_* and MPI_LOCALRANKID (Hydra: MPICH, Intel MPI); rank 0's address
                            and a free port of its host, broadcast through mpi4py
    none                    one rank

No torch here: an error message must know its rank at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from train.errors import RankError

ADVICE = (
    "start with `deepspeed launch/pretrain.py`, `srun python ...` or `mpirun python ...` (docs/CLUSTER.md)"
)
# Above the range from which Linux gives ports to outgoing connections (32768-60999) lie too few: take below it.
FIRST_JOB_PORT, NUM_JOB_PORTS = 20_000, 10_000
INTERACTIVE_STEP = "4294967290"
"""SLURM_STEP_ID of the shell that salloc opens on a node (LaunchParameters=use_interactive_step): slurm.h's
SLURM_INTERACTIVE_STEP. It has one task, whatever the job has."""


@dataclass(frozen=True)
class Ranks:
    """One process's place in its job; `launcher` is deepspeed, torchrun, environment, srun, mpirun or none."""

    rank: int
    local_rank: int
    world_size: int
    local_size: int
    launcher: str


@dataclass(frozen=True)
class _Source:
    launcher: str
    rank: str
    local_rank: str
    world_size: str
    local_size: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, str, str]:
        return self.rank, self.local_rank, self.world_size


_TORCH = _Source("environment", "RANK", "LOCAL_RANK", "WORLD_SIZE", ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"))
_OPEN_MPI = _Source(
    "mpirun",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_SIZE",
    ("OMPI_COMM_WORLD_LOCAL_SIZE",),
)
_HYDRA = _Source("mpirun", "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", ("MPI_LOCALNRANKS",))
_SRUN = _Source("srun", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")


def discover_ranks(environment: Mapping[str, str]) -> Ranks:
    """This process's place in the job.

    A launcher that runs below another one counts: torchrun, started once per host by srun, owns the ranks, and so
    does mpirun in a batch job. RANK, LOCAL_RANK and WORLD_SIZE set by hand beside srun or mpirun must say the same.

    Raises:
        RankError: variables are missing, no numbers, or contradict each other.
    """
    marked = _marked_launcher(environment)
    source = _source(environment, marked)
    if source is None:
        _refuse_batch_script_without_srun(environment)
        return Ranks(0, 0, 1, 1, "none")
    missing = [name for name in source.names if name not in environment]
    if missing:
        given = {name: environment[name] for name in source.names if name in environment}
        raise RankError(f"the launcher set {given} but not {', '.join(missing)}: {ADVICE}")
    rank, local_rank, world_size = (_number(environment, name) for name in source.names)
    local_size = _local_size(environment, source, world_size)
    # A local rank may lie above the rank: mpirun may deal the ranks out to a host in any order.
    if not (0 <= rank < world_size and 0 <= local_rank < local_size <= world_size):
        names = [name for name in (*source.names, *source.local_size) if name in environment]
        given = {name: environment[name] for name in names}
        needed = f"0 <= {source.rank} < {source.world_size} and 0 <= {source.local_rank} < {local_size}"
        raise RankError(
            f"{given}: needs {needed}, the ranks of this host, <= {source.world_size}; unset what an earlier job left"
        )
    if source is not _TORCH:
        _refuse_contradictions(environment, source)
    return Ranks(rank, local_rank, world_size, local_size, marked or source.launcher)


def probable_rank(environment: Mapping[str, str]) -> int:
    """The rank as far as it is known; 0 where the variables are wrong: somebody must print the error."""
    source = _source(environment, _marked_launcher(environment))
    value = environment.get(source.rank, "") if source else ""
    return int(value) if value.isdecimal() else 0


def slurm_rendezvous(environment: Mapping[str, str]) -> tuple[str, int]:
    """Host of rank 0 and a port, the same on every rank of a job step and another for the next step.

    Raises:
        RankError: Slurm did not say which hosts or which job.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes or "SLURM_JOB_ID" not in environment:
        raise RankError(
            f"SLURM_PROCID is set but not SLURM_JOB_NODELIST and SLURM_JOB_ID, which say where rank 0 is: {ADVICE}"
        )
    job = _number(environment, "SLURM_JOB_ID")
    step = _number({"SLURM_STEP_ID": "0", **environment}, "SLURM_STEP_ID")
    return first_host(nodes), FIRST_JOB_PORT + (job + 7 * step) % NUM_JOB_PORTS


def first_host(nodes: str) -> str:
    """First name of a Slurm host list: "gpu[07-09,12],login1" -> "gpu07" (as `scontrol show hostnames` prints)."""
    return re.sub(r"\[(\d+)[^]]*]", r"\1", re.split(r",(?![^[]*])", nodes)[0])


def _marked_launcher(environment: Mapping[str, str]) -> str | None:
    """torchrun and DeepSpeed's launcher say who they are; RANK alone may come from anywhere."""
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun"
    return "deepspeed" if "CROSS_RANK" in environment and "RANK" in environment else None


def _source(environment: Mapping[str, str], marked: str | None) -> _Source | None:
    if marked:
        return _TORCH
    if "OMPI_COMM_WORLD_RANK" in environment:
        return _OPEN_MPI
    if "PMI_RANK" in environment and "MPI_LOCALRANKID" in environment:
        return _HYDRA
    # Slurm sets SLURM_PROCID in the batch script too, and in salloc's shell, which are no ranks of anything.
    is_step = "SLURM_STEP_NUM_TASKS" in environment and environment.get("SLURM_STEP_ID") != INTERACTIVE_STEP
    if "SLURM_PROCID" in environment and is_step:
        return _SRUN
    return _TORCH if any(name in environment for name in _TORCH.names) else None


def _refuse_batch_script_without_srun(environment: Mapping[str, str]) -> None:
    if _number({"SLURM_NTASKS": "1", **environment}, "SLURM_NTASKS") > 1:
        raise RankError(
            f"this Slurm job has SLURM_NTASKS={environment['SLURM_NTASKS']} tasks, but this process was not started by "
            "srun and would train alone: `srun python launch/pretrain.py`, or `unset SLURM_NTASKS` to mean it"
        )


def _refuse_contradictions(environment: Mapping[str, str], source: _Source) -> None:
    for name, other in zip(_TORCH.names, source.names, strict=True):
        if name in environment and _number(environment, name) != _number(environment, other):
            raise RankError(
                f"{name}={environment[name]} but {other}={environment[other]}: two launchers contradict each other; "
                f"unset {name} if an earlier job or the job script left it, or start with one launcher"
            )


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise RankError(f"{name}={environment[name]!r} is no whole number: {ADVICE}") from None


def _local_size(environment: Mapping[str, str], source: _Source, world_size: int) -> int:
    for name in source.local_size:
        if name in environment:
            return _number(environment, name)
    if source is _SRUN:
        tasks = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)))
        node = _number({"SLURM_NODEID": "0", **environment}, "SLURM_NODEID")
        return tasks[node] if 0 <= node < len(tasks) else world_size
    return world_size


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form, by node: "2(x3),1" -> [2, 2, 2, 1]."""
    tasks = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        tasks += [int(number)] * int(times or 1)
    return tasks
