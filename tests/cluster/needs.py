"""What a cluster test needs of its machine. A laptop without it skips the test; CI, which has it, fails."""

from __future__ import annotations

import os
import shutil

import pytest

# Set by .ci/run, which installs the packages: there a missing daemon is a fault, not a reason to skip.
REQUIRED = "HALFLING_REQUIRE_CLUSTER_TESTS"
PACKAGES = {
    "ip": "iproute2",
    "tc": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "srun": "slurm-client",
    "munged": "munge",
}


def need(*commands: str) -> None:
    """Skip, or fail where REQUIRED is set, unless this is root and has the commands."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    absent = [command for command in commands if shutil.which(command, path=path) is None]
    if absent:
        _refuse(f"no {', '.join(absent)}: apt-get install {' '.join(sorted({PACKAGES[c] for c in absent}))}")
    if os.geteuid() != 0:
        _refuse("starting hosts and daemons of one's own needs root")


def _refuse(reason: str) -> None:
    if os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set, but: {reason}")
    pytest.skip(reason)
