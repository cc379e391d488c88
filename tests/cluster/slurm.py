"""A whole Slurm on one machine: munged, slurmctld and slurmd with their files in a temporary folder."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.distributed.harness import free_port

ROOT = Path(__file__).resolve().parents[2]
SBIN = os.pathsep.join(["/usr/sbin", "/sbin", os.environ.get("PATH", "")])

MPI_AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

# cred_expire is also how long a requeued job waits before it may start; less than 5 means the default, 120.
CONFIGURATION = """
ClusterName=halfling
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
CredType=cred/munge
SlurmctldPort={controller_port}
SlurmdPort={daemon_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SlurmdParameters=config_overrides
MpiDefault=none
KillWait={kill_wait_s}
ReturnToService=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 Gres=gpu:4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Its daemons run while the context is open; the node says it has four cores and GPUs."""

    def __init__(self, folder: Path, kill_wait_s: int = 1) -> None:
        self.folder = folder
        configuration = CONFIGURATION.format(
            host=platform.node(),
            folder=folder,
            controller_port=free_port(),
            daemon_port=free_port(),
            kill_wait_s=kill_wait_s,
        )
        folder.mkdir(parents=True)
        folder.chmod(0o755)
        for name in ("state", "spool"):
            (folder / name).mkdir()
        (folder / "slurm.conf").write_text(configuration)
        devices = ("null", "zero", "full", "random")  # Slurm wants any device file for a GPU
        lines = "".join(f"Name=gpu File=/dev/{name}\n" for name in devices)
        (folder / "gres.conf").write_text("AutoDetect=off\n" + lines)
        (folder / "munge.key").write_bytes(secrets.token_bytes(256))
        (folder / "munge.key").chmod(0o600)
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            **MPI_AS_ROOT,
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        munge = [f"--{name}={self.folder}/munge.{name}" for name in ("socket", "key-file", "pid-file")]
        munge = [word.replace("munge.key-file", "munge.key") for word in munge]
        munge += [f"--{name}-file={self.folder}/munge.{name}" for name in ("log", "seed")]
        try:
            self._start("munged", "--foreground", "--force", *munge)
            _wait(lambda: (self.folder / "munge.socket").exists(), self.logs)
            self._start("slurmctld", "-D", "-c")
            self._start("slurmd", "-D")
            _wait(lambda: "idle" in self._ask("sinfo", "--noheader"), self.logs)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()
        own = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()
        left = [process for process in psutil.process_iter() if own in _environment(process)]
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=10)

    def run(self, *words: str) -> str:
        """Output of a Slurm command that must succeed."""
        done = subprocess.run(
            words, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, output: Path, *words: str) -> str:
        """Number of the job that `sbatch words` makes."""
        return self.run("sbatch", "--parsable", f"--output={output}", *words)

    def state(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows: JobState, Restarts, ExitCode and so on."""
        return dict(
            word.split("=", 1) for word in self.run("scontrol", "show", "job", job).split() if "=" in word
        )

    def wait_for_state(self, job: str, *states: str, timeout_s: float = 150) -> dict[str, str]:
        """Wait until the job is in one of `states`."""
        _wait(lambda: self.state(job)["JobState"] in states, lambda: str(self.state(job)), timeout_s)
        return self.state(job)

    def logs(self) -> str:
        """Of the daemons, for a failure's message."""
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("*log")))

    def _ask(self, *words: str) -> str:
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False).stdout

    def _start(self, name: str, *words: str) -> None:
        command = [str(shutil.which(name, path=SBIN)), *words]
        with (self.folder / f"{name}.out.log").open("wb") as log:
            self._daemons.append(
                subprocess.Popen(
                    command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            )


def _wait(ready: Callable[[], bool], explain: Callable[[], str], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.1)


def _environment(process: psutil.Process) -> list[bytes]:
    try:
        return Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
