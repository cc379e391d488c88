"""What launch/doctor.py asks of the hosts: their facts, and whether their ranks reach each other."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.shard_format.remote import is_remote
from launch.preflight import checks
from launch.preflight.checks import Finding, finding
from launch.preflight.hosts import Host, UnreachableError, ask_all, keep_alive_s
from launch.preflight.probe import CONNECT_TIMEOUT_S
from launch.preflight.recipe_checks import needed_disk_gib
from train.config import Config
from train.environment_file import read_utf8
from train.models.build import teacher_folders

FACTS_TIMEOUT_S = 120.0
ALL_REDUCE_TIMEOUT_S = 90.0
LOOPBACK = "127.0.0.1"


def check_hosts(
    config: Config, hosts: list[Host], ssh: Sequence[str] | None, options: argparse.Namespace
) -> tuple[list[Finding], int]:
    """(findings, number of ranks). Hosts that cannot be reached are one finding, and left out of the others.

    Args:
        ssh: the command that runs another on a host; None for this machine alone.
    """
    run_dir = os.path.abspath(config.run.dir)
    remote_shards = is_remote(config.data.shards)
    shards = config.data.shards if remote_shards else os.path.abspath(config.data.shards)
    words = ["facts", f"--run-dir={run_dir}", f"--shards={shards}", f"--folder={os.getcwd()}"]
    words.append(f"--port={options.master_port}")
    names = [folder.name for folder in teacher_folders(config)]
    words += [f"--teacher={os.path.abspath(name)}" for name in names if Path(name).is_dir()]
    words += [f"--variable={name}" for name in checks.watched_variables(os.environ, remote_shards)]
    with _file_to_see(run_dir) as marker:
        words += [f"--see={marker}"] if isinstance(marker, Path) else []
        found = ask_all(hosts, ssh, lambda host: words, FACTS_TIMEOUT_S)
    findings = _check_reach(found)
    answers = {name: answer for name, answer in found.items() if not isinstance(answer, UnreachableError)}
    if not answers:
        return findings, sum(host.slots for host in hosts)
    if options.hostfile is None and options.num_gpus is None:
        hosts = [replace(hosts[0], slots=_num_gpus(answers[hosts[0].name]) or 1)]
    reached = [host for host in hosts if host.name in answers]
    slots = {host.name: host.slots for host in hosts}
    env_files = read_env_files()
    findings += [
        checks.check_versions(answers),
        checks.check_code(answers),
        checks.check_clocks(answers),
        checks.check_gpus(answers, slots),
        checks.check_torch(answers, slots),
        checks.check_memory(answers, slots),
        checks.check_shards(answers, shards),
        checks.check_teachers(answers),
        checks.check_run_folder(answers, run_dir),
        checks.check_disk(answers, needed_disk_gib(config), run_dir),
        checks.check_env_files(env_files),
    ]
    # For a single host deepspeed uses ssh only to see whether it can; the ranks get this shell's variables.
    if ssh is not None and len(hosts) > 1:
        findings.append(checks.check_variables(os.environ, env_files, answers))
        findings.append(checks.check_keep_alive({name: keep_alive_s(name, ssh) for name in answers}))
        findings.append(checks.check_pdsh(shutil.which("pdsh")))
    if len(reached) > 1:
        findings.append(_check_shared_folder(marker, answers))
    elif options.hostfile is not None:
        hostname = answers[reached[0].name]["hostname"]
        findings.append(checks.check_single_host(reached[0].name, hostname, socket.gethostname()))
    findings += check_network(reached, ssh, answers, options)
    return findings, sum(host.slots for host in hosts)


def _num_gpus(answer: Mapping[str, Any]) -> int:
    """GPUs that a run on this host would compute on."""
    facts = answer["torch"]
    return len(facts["devices"]) if facts.get("kind") == "cuda" else 0


def _check_reach(found: Mapping[str, Any]) -> list[Finding]:
    """A finding for every host that does not answer, or one that all do."""
    there = f"{sys.executable} and this folder must be there under the same path"
    faults = [
        Finding(
            "reach",
            False,
            f"{name}: {answer}",
            f"`ssh {name} true` must work without a password (ssh-copy-id {name}), and {there}",
        )
        for name, answer in found.items()
        if isinstance(answer, UnreachableError)
    ]
    return faults or [Finding("reach", True, ", ".join(found))]


def read_env_files() -> dict[str, str]:
    """Text of the files that deepspeed takes variables from (DeepSpeed 0.19, launcher/runner.py)."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    paths = {Path(folder, name).resolve() for folder in (Path.home(), Path.cwd())}
    return {str(path): read_utf8(path, str(path)) for path in sorted(paths) if path.is_file()}


@contextlib.contextmanager
def _file_to_see(run_dir: str) -> Iterator[Path | OSError]:
    """A file where the run folder is, or would be, or why there is none; gone afterwards."""
    folder = next(path for path in (Path(run_dir), *Path(run_dir).parents) if path.is_dir())
    marker = folder / f".doctor-{uuid.uuid4().hex}"
    try:
        marker.touch()
    except OSError as error:
        yield error
        return
    try:
        yield marker
    finally:
        marker.unlink()


def _check_shared_folder(marker: Path | OSError, answers: checks.Answers) -> Finding:
    """Does every host see a file that was written here? A checkpoint's parts come from all of them."""
    if isinstance(marker, OSError):
        reason = f"{Path(str(marker.filename)).parent}: {marker.strerror}"
        return Finding("shared run folder", False, reason, "give another --run.dir")
    blind = [host for host, facts in answers.items() if facts["seen"] is not True]
    faults = [f"{', '.join(blind)} cannot see a file written here"] if blind else []
    remedy = f"{marker.parent} must be one folder that all hosts share (NFS, Lustre): give a --run.dir on one"
    return finding("shared run folder", faults, "seen by every host", remedy)


def check_network(
    hosts: Sequence[Host], ssh: Sequence[str] | None, answers: checks.Answers, options: argparse.Namespace
) -> list[Finding]:
    """Is the port of rank 0 free, does every host reach it, and do the ranks sum rightly?

    The ranks are one per slot of every host; where that is one rank, two on its CPU.
    """
    first, port = hosts[0], options.master_port
    free = f"{port} is free on {first.name}"
    taken = answers[first.name]["port"]
    if taken:
        remedy = (
            f"another job may be running there; choose another port: deepspeed --master_port N (it is {port})"
        )
        return [Finding("port", False, f"{port} on {first.name}: {taken['error']}", remedy)]
    if len(hosts) == 1 and options.skip_all_reduce:
        return [Finding("port", True, free)]
    # As deepspeed does, the ranks find rank 0 by an address of the first host, else by its name.
    own = answers[first.name]["address"]
    address = LOOPBACK if len(hosts) == 1 else own if isinstance(own, str) else first.name
    backend = "nccl" if _num_gpus(answers[first.name]) else "gloo"
    ranks = {host.name: host.slots for host in hosts}
    if list(ranks.values()) == [1]:
        backend, ranks = "gloo", {first.name: 2}
    if options.skip_all_reduce:
        ranks = dict.fromkeys(ranks, 0)
    names = list(ranks)

    def words(host: Host) -> list[str]:
        first_rank = sum(ranks[name] for name in names[: names.index(host.name)])
        numbers = {
            "port": port,
            "ranks": ranks[host.name],
            "first-rank": first_rank,
            "world-size": sum(ranks.values()),
            "timeout-s": ALL_REDUCE_TIMEOUT_S,
            **({"wait-for": len(hosts) - 1} if host == first else {}),
        }
        words = [f"--{name}={number}" for name, number in numbers.items()]
        return ["ranks", f"--address={address}", f"--backend={backend}", *words]

    found = ask_all(hosts, ssh, words, ALL_REDUCE_TIMEOUT_S + 2 * CONNECT_TIMEOUT_S + 30)
    faults, results = [], []
    for name, answer in found.items():
        if isinstance(answer, UnreachableError):
            faults.append(f"{name}: {answer}")
        else:
            faults += [f"{name} to {address}, port {port}: {answer['port']}"] if answer["port"] else []
            results += answer["ranks"]
    remedy = f"open all ports between the hosts (firewall, security group); {address} is where rank 0 listens"
    findings = [finding("port", faults, free, remedy)]
    if findings[0].ok and not options.skip_all_reduce:
        findings.append(checks.check_all_reduce(results, f"all-reduce ({backend})", len(hosts) > 1))
    return findings
