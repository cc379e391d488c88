"""A whole Slurm on two hosts (tests/cluster/hosts.py): munged, slurmctld and two slurmd, their files in one folder.

Debian's Slurm is built without --enable-multiple-slurmd; in network namespaces of their own, two run side by side.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from tests.cluster.hosts import Hosts
from tests.paths import ROOT

SBIN = os.pathsep.join(["/usr/sbin", "/sbin", os.environ.get("PATH", "")])

MPI_AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

# cred_expire is also how long a requeued job waits before it may start; less than 5 means the default, 120.
CONFIGURATION = """
ClusterName=halfling
SlurmctldHost={first}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=interval=2,sched_interval=2
SlurmdParameters=config_overrides
MpiDefault=none
KillWait=1
ReturnToService=2
GresTypes=gpu
"""
NODE = "NodeName={name} NodeAddr={address} CPUs=4 Gres=gpu:4 State=UNKNOWN\n"
PARTITION = "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"


class Slurm:
    """Its daemons run while the context is open; each host says it has four cores and four GPUs.

    Commands are typed on the first host, where the controller runs.
    """

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        nodes = dict(zip(hosts.names, hosts.addresses, strict=True))
        text = CONFIGURATION.format(first=hosts.names[0], address=hosts.addresses[0], folder=folder)
        text += "".join(NODE.format(name=name, address=address) for name, address in nodes.items())
        folder.mkdir(parents=True)
        folder.chmod(0o755)
        for name in ("state", *(f"spool-{name}" for name in hosts.names)):
            (folder / name).mkdir()
        (folder / "slurm.conf").write_text(text + PARTITION)
        devices = ("null", "zero", "full", "random")  # Slurm wants any device file for a GPU
        lines = "".join(f"Name=gpu File=/dev/{name}\n" for name in devices)
        (folder / "gres.conf").write_text("AutoDetect=off\n" + lines)
        (folder / "munge.key").write_bytes(secrets.token_bytes(256))
        (folder / "munge.key").chmod(0o600)
        self.environment = {
            **os.environ,
            "PATH": SBIN,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            **MPI_AS_ROOT,
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        munge = [f"--{name}={self.folder}/munge.{name}" for name in ("socket", "key-file", "pid-file")]
        munge = [word.replace("munge.key-file", "munge.key") for word in munge]
        munge += [f"--{name}-file={self.folder}/munge.{name}" for name in ("log", "seed")]
        first = self.hosts.names[0]
        try:
            self._start(first, "munged", "--foreground", "--force", *munge)
            _wait(lambda: (self.folder / "munge.socket").exists(), self.logs)
            self._start(first, "slurmctld", "-D", "-c")
            for name in self.hosts.names:
                self._start(name, "slurmd", "-D", "-N", name)
            ready = f"{len(self.hosts.names)} idle"
            _wait(lambda: ready in self.type("sinfo", "--noheader", "--format=%D %t").stdout, self.logs)
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
            with suppress(psutil.NoSuchProcess):  # killed with another one of them
                process.kill()
        psutil.wait_procs(left, timeout=10)

    def type(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command typed on the first host, with environment `variables` beside the usual ones."""
        return subprocess.run(
            self.hosts.command(self.hosts.names[0], *words),
            cwd=ROOT,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def run(self, *words: str) -> str:
        """Output of a Slurm command that must succeed."""
        done = self.type(*words)
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

    def _start(self, host: str, name: str, *words: str) -> None:
        command = self.hosts.command(host, str(shutil.which(name, path=SBIN)), *words)
        with (self.folder / f"{name}-{host}.out.log").open("wb") as log:
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
