"""Examine the machines of a run before it is started: a table, each failure with its remedy.

    python launch/doctor.py                                    this machine alone
    python launch/doctor.py --hostfile hosts --config R.yaml   every host of a job

Takes the same --config and --section.key=value as launch/pretrain.py. Asks every host of the hostfile (over ssh, this
one too, as deepspeed starts the ranks) for its Python and packages, code, clock, GPUs, memory, disk, shards and run
folder, compares the answers, lets the ranks sum numbers over the network, loads the teacher, makes the student, and
asks whether launch/pretrain.py would take the recipe. It leaves nothing behind.

Exit codes: 0 all well; 1 something failed; 2 bad usage.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.cli import parse_config, run_main
from launch.preflight.checks import (
    Finding,
    check_all_reduce,
    check_keep_alive,
    check_pdsh,
    check_single_host,
    check_variables,
    judge_hosts,
    watched_variables,
)
from launch.preflight.hosts import (
    DEFAULT_SSH,
    Host,
    HostEntry,
    UnreachableError,
    all_reduce,
    keep_alive_s,
    read_hostfile,
    read_ssh,
)
from launch.text_table import text_table
from train.config import Config
from train.environment_file import read_utf8
from train.errors import UserError

ALL_REDUCE_TIMEOUT_S = 90.0


def main(arguments: Sequence[str]) -> int:
    """Parse, ask, judge, print."""
    options, rest = build_parser().parse_known_args(arguments)
    config = parse_config(rest, "")
    if options.num_gpus is not None and options.num_gpus < 1:
        raise UserError(f"--num-gpus {options.num_gpus}: give a number above 0")
    if options.hostfile is not None and options.num_gpus is not None:
        raise UserError(f"--num-gpus {options.num_gpus} has no effect beside --hostfile, whose slots= count")
    if options.hostfile is None and options.ssh is not None:
        raise UserError(
            f"--ssh {options.ssh!r} has no effect without --hostfile: this machine is asked plainly"
        )
    if not 0 < options.master_port < 65536:
        raise UserError(f"--master-port {options.master_port} is no port: give a number from 1 to 65535")
    entries, ssh = [HostEntry("localhost", options.num_gpus or 1)], None
    if options.hostfile is not None:
        entries = read_hostfile(options.hostfile)
        ssh = read_ssh(DEFAULT_SSH if options.ssh is None else options.ssh)
    findings = examine(config, entries, ssh, options)
    print(table_of(findings))
    failed = [finding for finding in findings if not finding.ok]
    warnings = [finding for finding in findings if finding.ok and finding.remedy]
    end = f"{len(failed)} failed" if failed else "all well"
    print(f"{len(findings)} checks, {end}" + (f", {len(warnings)} to look at" if warnings else ""))
    return 1 if failed else 0


def build_parser() -> argparse.ArgumentParser:
    """The flags that are the doctor's own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--hostfile", help="the job's hosts, a line `NAME slots=GPUS` for each; this machine alone without it"
    )
    add("--num-gpus", type=int, help="ranks on this machine, where there is no hostfile; its GPUs by default")
    add("--ssh", help=f"command that runs another on a host ({DEFAULT_SSH})")
    add("--master-port", type=int, default=29500, help="port at which the ranks meet (%(default)s)")
    add("--skip-all-reduce", action="store_true", help="do not start ranks")
    return parser


def examine(
    config: Config, entries: list[HostEntry], ssh: Sequence[str] | None, options: argparse.Namespace
) -> list[Finding]:
    """Every check, the hosts first; those of hosts that cannot be reached are left out."""
    hosts = [Host(entry, ssh) for entry in entries]
    try:
        findings, reached = greet(hosts)
        if reached:
            # For a single host deepspeed uses ssh only to see whether it can; the ranks get this shell's variables.
            examine_hosts(config, reached, ssh if len(hosts) > 1 else None, options, findings)
    except UnreachableError as error:
        findings.append(
            Finding("reach", False, f"a host stopped answering: {error}", "look at its log; try again")
        )
    finally:
        for host in hosts:
            host.close()
    return [*findings, *examine_here(config, sum(host.slots for host in hosts))]


def greet(hosts: Sequence[Host]) -> tuple[list[Finding], list[Host]]:
    """(a finding for every host that does not answer, or one that all do; those that do)."""
    findings, reached = [], []
    for host in hosts:
        try:
            host.start()
            reached.append(host)
        except UnreachableError as error:
            remedy = (
                f"`ssh {host.name} true` must work without a password (ssh-copy-id {host.name}), and {sys.executable} "
                "and this folder must be there under the same path"
            )
            findings.append(Finding("reach", False, f"{host.name}: {error}", remedy))
    if not findings:
        findings.append(Finding("reach", True, ", ".join(host.name for host in hosts)))
    return findings, reached


def examine_hosts(
    config: Config,
    hosts: list[Host],
    ssh: Sequence[str] | None,
    options: argparse.Namespace,
    findings: list[Finding],
) -> None:
    """Add what the hosts say of themselves, and whether they hear each other, to `findings`.

    Args:
        ssh: the command that ranks are started with on every host; None where they start without.
    """
    from data_prep.shard_format.manifest import is_remote
    from launch.preflight.local_checks import needed_disk_gib
    from train.models.build import teacher_names

    run_dir = os.path.abspath(config.run.dir)
    shards = config.data.shards if is_remote(config.data.shards) else os.path.abspath(config.data.shards)
    request: dict[str, Any] = {
        "run_dir": run_dir,
        "shards": shards,
        "teachers": [os.path.abspath(name) for name in teacher_names(config) if Path(name).is_dir()],
        "variables": watched_variables(os.environ, is_remote(config.data.shards)),
        "folder": os.getcwd(),
    }
    with ThreadPoolExecutor(len(hosts)) as pool:
        asked = {host.name: pool.submit(host.ask, "facts", **request) for host in hosts}
        answers = {name: future.result() for name, future in asked.items()}
    offsets = {host.name: host.clock_offset() for host in hosts}
    if (
        options.hostfile is None
        and options.num_gpus is None
        and isinstance(answers[hosts[0].name]["gpus"], list)
    ):
        hosts[0].slots = max(1, len(answers[hosts[0].name]["gpus"]))
    findings += judge_hosts(
        answers,
        slots={host.name: host.slots for host in hosts},
        offsets=offsets,
        needed_disk_gib=needed_disk_gib(config),
        run_dir=run_dir,
        shards=shards,
    )
    remote = [host.name for host in hosts] if ssh else []
    findings += check_variables(os.environ, read_env_files(), answers, remote)
    if ssh:
        findings.append(check_keep_alive({name: keep_alive_s(name, ssh) for name in remote}))
        findings.append(check_pdsh(shutil.which("pdsh")))
    if len(hosts) > 1:
        findings.append(check_shared_folder(run_dir, hosts))
    elif options.hostfile is not None:
        its_hostname = answers[hosts[0].name]["hostname"]
        findings.append(check_single_host(hosts[0].name, its_hostname, socket.gethostname()))
    address = meeting_address(hosts, answers)
    findings.append(check_port(hosts, address, options.master_port))
    # Ranks that cannot meet would only fail late.
    if findings[-1].ok and not options.skip_all_reduce:
        findings += check_sums(hosts, answers, address, options.master_port)


def read_env_files() -> dict[str, str]:
    """Text of the files that deepspeed takes variables from (DeepSpeed 0.19, launcher/runner.py)."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    paths = {Path(folder, name).resolve() for folder in (Path.home(), Path.cwd())}
    return {str(path): read_utf8(path, str(path)) for path in sorted(paths) if path.is_file()}


def check_shared_folder(run_dir: str, hosts: Sequence[Host]) -> Finding:
    """Does every host see a file that is written here? A checkpoint's parts come from all of them."""
    folder = next(path for path in (Path(run_dir), *Path(run_dir).parents) if path.is_dir())
    marker = folder / f".doctor-{uuid.uuid4().hex}"
    try:
        marker.touch()
    except OSError as error:
        return Finding("shared run folder", False, f"{folder}: {error.strerror}", "give another --run.dir")
    try:
        blind = [host.name for host in hosts if not host.ask("see", path=str(marker))]
    finally:
        marker.unlink()
    remedy = f"{folder} must be one folder that all hosts share (NFS, Lustre): give a --run.dir on one"
    seen = f"{', '.join(blind)} cannot see a file written here" if blind else "seen by every host"
    return Finding("shared run folder", not blind, seen, remedy if blind else "")


def meeting_address(hosts: Sequence[Host], answers: Mapping[str, Mapping[str, Any]]) -> str:
    """Where the ranks of several hosts meet: an address of the first, as deepspeed takes it, else its name."""
    if len(hosts) == 1:
        return "127.0.0.1"
    address = answers[hosts[0].name]["address"]
    return address if isinstance(address, str) else hosts[0].name


def check_port(hosts: Sequence[Host], address: str, port: int) -> Finding:
    """Is the port at which the ranks meet free on the first host, and open to the others?"""
    first = hosts[0]
    opened = first.ask("listen", port=port)
    if "error" in opened:
        remedy = (
            f"another job may be running there; choose another port: deepspeed --master_port N (it is {port})"
        )
        return Finding("port", False, f"{port} on {first.name}: {opened['error']}", remedy)
    shut = []
    for host in hosts[1:]:
        answer = host.ask("connect", address=address, port=port)
        if "error" in answer:
            shut.append(f"{host.name} to {address}, port {port}: {answer['error']}")
    first.ask("close")
    remedy = f"open all ports between the hosts (firewall, security group); {address} is where the ranks meet"
    return Finding(
        "port", not shut, "; ".join(shut) or f"{port} is free on {first.name}", remedy if shut else ""
    )


def check_sums(
    hosts: Sequence[Host], answers: Mapping[str, Mapping[str, Any]], address: str, port: int
) -> list[Finding]:
    """All-reduces: between a rank per slot on every host; where that is one rank, between two on its CPU."""
    gpus = answers[hosts[0].name]["gpus"]
    backend = "nccl" if isinstance(gpus, list) and gpus else "gloo"
    slots = hosts[0].slots
    if len(hosts) == 1 and slots == 1:
        backend, hosts[0].slots = "gloo", 2
    try:
        results = all_reduce(hosts, address, port, backend, ALL_REDUCE_TIMEOUT_S)
    finally:
        hosts[0].slots = slots
    return [check_all_reduce(results, f"all-reduce ({backend})", several_hosts=len(hosts) > 1)]


def examine_here(config: Config, world_size: int) -> list[Finding]:
    """What is the same for every host."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed would say that it found none
    from huggingface_hub.utils import logging as hub_logging

    from launch.preflight.local_checks import check_batch, check_teacher, check_tokenizer
    from launch.preflight.recipe_checks import check_recipe, check_run
    from train.distributed.world import quiet_libraries

    quiet_libraries()
    hub_logging.set_verbosity_error()  # it tells of every question that it repeats
    findings = [check_batch(config, world_size), check_tokenizer(config), *check_teacher(config)]
    if all(finding.ok for finding in findings):  # else it would tell the same again
        findings += check_recipe(config, world_size)
    return [*findings, check_run(config)]


def table_of(findings: Sequence[Finding]) -> str:
    """One row a check; a failure's or a warning's remedy below what was seen."""
    rows = [
        (
            finding.check,
            ("look" if finding.remedy else "ok") if finding.ok else "FAILED",
            finding.result + (f"\n-> {finding.remedy}" if finding.remedy else ""),
        )
        for finding in findings
    ]
    return text_table(("check", "", "seen"), rows, right=False)


if __name__ == "__main__":
    run_main(main)
