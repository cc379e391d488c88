"""Which rank am I, and where is their rendezvous: the launchers' variables."""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nvidia_smi import A100, stand_in
from tests.paths import ROOT
from train.distributed.discovery import (
    Ranks,
    discover_ranks,
    first_host,
    probable_rank,
    slurm_rendezvous,
    tasks_per_node,
)
from train.distributed.rendezvous import interface_towards, own_address, rendezvous
from train.distributed.world import (
    COLLECTIVE_TIMEOUT,
    World,
    _num_threads,
    _set_torch_variables,
    import_deepspeed,
    set_deepspeed_log_level,
)

TORCH = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_PROCID": "0"}
BATCH_SCRIPT |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SRUN = BATCH_SCRIPT | {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_NODEID": "1"}
SRUN |= {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
SRUN |= {"SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
# salloc with LaunchParameters=use_interactive_step.
INTERACTIVE_SHELL = BATCH_SCRIPT | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NODELIST": "gpu07"}
INTERACTIVE_SHELL |= {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}


def test_no_launcher_is_one_rank() -> None:
    assert discover_ranks({}) == Ranks(0, 0, 1, 1, "none")
    assert rendezvous({}, discover_ranks({}))[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        (TORCH, "environment"),
        (TORCH | {"CROSS_RANK": "1"}, "deepspeed"),
        (TORCH | {"TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
        (OPEN_MPI, "mpirun"),
        (HYDRA, "mpirun"),
        (SRUN, "srun"),
        (SRUN | TORCH, "srun"),
        (OPEN_MPI | TORCH, "mpirun"),
    ],
)
def test_every_launcher_gives_the_same_ranks(environment: dict[str, str], launcher: str) -> None:
    assert discover_ranks(environment) == Ranks(5, 1, 8, 4, launcher)
    assert probable_rank(environment) == 5


@pytest.mark.parametrize("local_ranks", [(0, 2, 1, 3), (0, 2, 4, 6, 1, 3, 5, 7)])
def test_mpirun_may_deal_the_ranks_out_in_another_order(local_ranks: tuple[int, ...]) -> None:
    """As Open MPI 5 did with --oversubscribe."""
    size = str(len(local_ranks))
    given = OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": size, "OMPI_COMM_WORLD_LOCAL_SIZE": size}
    for rank, local_rank in enumerate(local_ranks):
        given |= {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(local_rank)}
        ranks = discover_ranks(given)
        assert (ranks.rank, ranks.local_rank) == (rank, local_rank)


@pytest.mark.parametrize("node", ["-3", "7"])
def test_a_node_that_is_not_in_the_list_has_all_tasks(node: str) -> None:
    assert discover_ranks(SRUN | {"SLURM_NODEID": node}).local_size == 8


def test_between_hosts_gloo_is_told_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", TORCH | {"MASTER_ADDR": own_address(), "MASTER_PORT": "29500"})
    ranks = discover_ranks(os.environ)
    _set_torch_variables(World(5, 1, 8, 4, "cpu"), ranks)
    assert os.environ["GLOO_SOCKET_IFNAME"] == interface_towards(own_address())
    os.environ["GLOO_SOCKET_IFNAME"] = "ib0"
    _set_torch_variables(World(5, 1, 8, 4, "cpu"), ranks)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    del os.environ["GLOO_SOCKET_IFNAME"]
    _set_torch_variables(World(5, 5, 8, 8, "cpu"), ranks)
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_local_world_size_of_torchrun() -> None:
    given = {name: value for name, value in TORCH.items() if name != "LOCAL_SIZE"}
    assert discover_ranks({**given, "LOCAL_WORLD_SIZE": "2"}).local_size == 2


@pytest.mark.parametrize(
    "environment",
    [
        # torchrun, once per host under srun: SLURM_PROCID counts hosts.
        SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"} | TORCH | {"TORCHELASTIC_RUN_ID": "x"},
        # deepspeed in a batch script.
        BATCH_SCRIPT | {"SLURM_NTASKS": "8"} | TORCH | {"CROSS_RANK": "1"},
        # mpirun in a batch job starts its daemons by srun.
        SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"} | OPEN_MPI,
        SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"} | HYDRA,
    ],
)
def test_the_inner_launcher_counts(environment: dict[str, str]) -> None:
    ranks = discover_ranks(environment)
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.local_size) == (5, 1, 8, 4)
    assert ranks.launcher != "srun"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "set {'RANK': '0'} but not LOCAL_RANK, WORLD_SIZE: start with"),
        ({"WORLD_SIZE": "2"}, "but not RANK, LOCAL_RANK"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "x"}, "OMPI_COMM_WORLD_RANK='x' is no whole number"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "but not OMPI_COMM_WORLD_LOCAL_RANK, OMPI_COMM_WORLD_SIZE"),
        (
            TORCH | {"RANK": "8"},
            "'LOCAL_SIZE': '4'}: needs 0 <= RANK < WORLD_SIZE and 0 <= LOCAL_RANK < 4, the ranks",
        ),
        (TORCH | {"RANK": "-1"}, "needs 0 <= RANK < WORLD_SIZE"),
        (TORCH | {"LOCAL_RANK": "4"}, "0 <= LOCAL_RANK < 4, the ranks of this host, <= WORLD_SIZE; unset"),
        (TORCH | {"LOCAL_RANK": "-1"}, "0 <= LOCAL_RANK < 4"),
        (TORCH | {"LOCAL_SIZE": "0", "LOCAL_RANK": "0"}, "0 <= LOCAL_RANK < 0"),
        (TORCH | {"LOCAL_SIZE": "9"}, "0 <= LOCAL_RANK < 9, the ranks of this host, <= WORLD_SIZE"),
        (
            SRUN | {"SLURM_PROCID": "9"},
            "needs 0 <= SLURM_PROCID < SLURM_STEP_NUM_TASKS and 0 <= SLURM_LOCALID < 4",
        ),
        (SRUN | {"RANK": "3"}, "RANK=3 but SLURM_PROCID=5: two launchers contradict each other"),
        (SRUN | {"LOCAL_RANK": "3"}, "LOCAL_RANK=3 but SLURM_LOCALID=1"),
        (OPEN_MPI | {"WORLD_SIZE": "2"}, "WORLD_SIZE=2 but OMPI_COMM_WORLD_SIZE=8"),
        (BATCH_SCRIPT | {"SLURM_NTASKS": "8"}, "was not started by srun and would train alone"),
        (INTERACTIVE_SHELL | {"SLURM_NTASKS": "8"}, "was not started by srun and would train alone"),
        (BATCH_SCRIPT | {"SLURM_NTASKS": ""}, "SLURM_NTASKS='' is no whole number"),
        (SRUN | {"SLURM_NODEID": "n1"}, "SLURM_NODEID='n1' is no whole number"),
    ],
)
def test_missing_or_contradicting_variables_are_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        discover_ranks(environment)
    assert message in str(refused.value)
    assert isinstance(probable_rank(environment), int)


def test_rendezvous_of_each_launcher() -> None:
    given = TORCH | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert rendezvous(given, discover_ranks(given)) == ("10.0.0.1", 29500)
    with pytest.raises(ValueError, match="RANK is set but not MASTER_ADDR and MASTER_PORT"):
        rendezvous(TORCH, discover_ranks(TORCH))
    with pytest.raises(ValueError, match="MASTER_PORT='http' is no port"):
        rendezvous(given | {"MASTER_PORT": "http"}, discover_ranks(given))
    ranks = discover_ranks(SRUN)
    assert rendezvous(SRUN, ranks) == ("gpu07", 20_000 + 4711)
    assert rendezvous(SRUN | {"MASTER_ADDR": "ib0"}, ranks) == ("ib0", 20_000 + 4711)
    one_host = SRUN | {"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_NODEID": "0"}
    assert rendezvous(one_host, discover_ranks(one_host))[0] == "127.0.0.1"
    ranks = discover_ranks(OPEN_MPI)
    assert rendezvous(OPEN_MPI, ranks, broadcast=lambda mine: ("n0", 4) if mine is None else mine) == (
        "n0",
        4,
    )
    first = OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    address, port = rendezvous(first, discover_ranks(first), broadcast=lambda mine: mine)
    assert not address.startswith("127.")
    assert 0 < port < 65536


def test_slurm_without_a_host_list_is_refused() -> None:
    bare = {name: value for name, value in SRUN.items() if "NODELIST" not in name}
    with pytest.raises(ValueError, match="not SLURM_JOB_NODELIST and SLURM_JOB_ID"):
        slurm_rendezvous(bare)


def test_steps_of_one_job_meet_at_different_ports() -> None:
    ports = {slurm_rendezvous(SRUN | {"SLURM_STEP_ID": str(step)})[1] for step in range(100)}
    assert len(ports) == 100
    assert all(20_000 <= port < 30_000 for port in ports)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("gpu[07-09,12],login1", "gpu07"), ("a,b[1-2]", "a"), ("r[1-2]n[3-4]", "r1n3")],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_hosts_with_different_numbers_of_tasks() -> None:
    """srun --ntasks=7 on nodes of 4, 2 and 1 GPUs, dealt out in turn (--distribution=cyclic)."""
    given = SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4,2,1", "SLURM_STEP_NUM_TASKS": "7"}
    for node, rank, local_rank, local_size in ((1, 4, 1, 2), (0, 6, 3, 4), (2, 2, 0, 1)):
        place = {"SLURM_NODEID": str(node), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local_rank)}
        assert discover_ranks(given | place) == Ranks(rank, local_rank, 7, local_size, "srun")


def test_an_interactive_shell_of_salloc_starts_deepspeed_by_hand() -> None:
    """The allocation's variables are there, and DeepSpeed's own count."""
    shell = {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "8",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "gpu[07-08]",
    }
    started = shell | TORCH | {"CROSS_RANK": "1", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
    ranks = discover_ranks(started)
    assert ranks == Ranks(5, 1, 8, 4, "deepspeed")
    assert rendezvous(started, ranks) == ("10.0.0.7", 29500)


def test_tasks_per_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]


def test_the_interface_is_never_the_loopback() -> None:
    names = {name for _, name in socket.if_nameindex()}
    for address in (own_address(), "127.0.0.1", "no-such-host.invalid"):
        assert interface_towards(address) in names - {"lo"}


@pytest.mark.parametrize(
    ("asked", "local_size", "threads"),
    [
        (None, 1, 4),
        (None, 2, 3),
        (None, 8, 1),
        ("1", 1, 1),
        ("2", 2, 2),
        ("9", 2, 9),
        ("0", 2, 3),
        ("2,4", 2, 2),
        ("many", 2, 3),
    ],
)
def test_threads_of_a_rank(
    asked: str | None, local_size: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six cores, four of which Slurm has bound this rank to."""
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert _num_threads(World(0, 0, local_size, local_size, "cpu")) == threads


LEVELS = ["debug", "info", "warning", "error"]


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """Levels of the messages that DeepSpeed's logger lets through."""
    found: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.levelname.lower())

    logger, ear = logging.getLogger("DeepSpeed"), Ear()
    logger.addHandler(ear)
    yield found
    logger.removeHandler(ear)
    set_deepspeed_log_level("error")


@pytest.mark.parametrize("log_level", LEVELS)
def test_deepspeed_says_what_it_was_let_say(log_level: str, heard: list[str]) -> None:
    """From then on: whatever imports it later does not say otherwise."""
    import_deepspeed(log_level)
    import_deepspeed()
    for level in LEVELS:
        logging.getLogger("DeepSpeed").log(getattr(logging, level.upper()), "a message of the test's")
    assert heard == LEVELS[LEVELS.index(log_level) :]


def test_no_op_of_deepspeeds_is_tried_where_a_gpu_is() -> None:
    """The table of what compiles tries a builder each, and prints about those that lack a CUDA toolkit."""
    script = (
        "import torch; torch.cuda.is_available = lambda: True; torch.cuda.device_count = lambda: 1; "
        "from train.distributed.world import import_deepspeed; import_deepspeed(); "
        "import deepspeed; print(deepspeed.get_accelerator().device_name(), "
        "'__compatible_ops__' in vars(deepspeed.ops))"
    )
    environment = {**os.environ, "DS_ACCELERATOR": "cuda"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("cuda False\n", 0), done.stderr


def test_what_is_set_inside_torch_and_deepspeed_takes_effect(tmp_path: Path) -> None:
    """None of it has a public way: DeepSpeed's own level is overruled when it is imported, gloo has patience after the
    ranks have met, an op is not compiled, and torch's compiler is not loaded by what an engine asks of its optimizer.

    Here the driver shows a GPU that this build of torch cannot use.
    """
    stand_in(tmp_path, A100)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("DS_ACCELERATOR", None)
    script = (
        "import logging; from train.distributed.world import import_deepspeed, join_world; import_deepspeed('info'); "
        "print('say', logging.getLogger('DeepSpeed').isEnabledFor(logging.INFO)); "
        "import torch, torch.distributed as dist; join_world(); "
        "group = dist.distributed_c10d._get_default_group(); "
        "print('say', group._get_backend(torch.device('cpu')).options._timeout.total_seconds()); "
        "from deepspeed.ops import __compatible_ops__; from deepspeed.ops.op_builder.all_ops import ALL_OPS; "
        "print('say', 'deepspeed_shm_comm' in ALL_OPS, __compatible_ops__['deepspeed_shm_comm']); "
        "import os, sys; from deepspeed.runtime.zero.utils import is_zero_supported_optimizer as ask; ask(None); "
        "found = ['deepspeed.runtime.zero.muon.muon_optimizer', 'torch._inductor.compile_fx']; "
        "print('say', *(name in sys.modules for name in found), 'TORCHDYNAMO_DISABLE' in os.environ)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("say")]
    assert said == [
        ["True"],
        [str(COLLECTIVE_TIMEOUT.total_seconds())],
        ["True", "False"],
        ["True", "False", "False"],
    ]
    assert re.search(r"^warning: \S+: nvidia-smi shows 1 x NVIDIA A100.* cannot use a GPU", done.stderr, re.M)
