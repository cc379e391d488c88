"""Examine the machines of a run before it is started: a table, each failure with its remedy.

    python launch/doctor.py                                    this machine alone
    python launch/doctor.py --hostfile hosts --config R.yaml   every host of a job

Takes the same --config and --section.key=value as launch/pretrain.py. Asks every host of the hostfile (over ssh, this
one too, as deepspeed starts the ranks) for its Python and packages, code, clock, GPUs and what torch sees of them,
memory, disk, shards and run folder, compares the answers, lets the ranks sum numbers over the network, loads the
teacher, makes the student, and asks whether launch/pretrain.py would take the recipe. It leaves nothing behind.

Exit codes: 0 all well; 1 something failed; 2 bad usage.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.shard_format.required_packages import require_packages

require_packages()

from launch.common.cli import command_parser, parse_config, run_main
from launch.common.tables import text_table
from launch.preflight.checks import Finding
from launch.preflight.hosts import DEFAULT_SSH, Host, read_hostfile, read_ssh
from train.distributed.device import kind_here
from train.errors import UserError


def main(arguments: Sequence[str]) -> int:
    """Parse, ask, judge, print."""
    options, rest = build_parser().parse_known_args(arguments)
    config = parse_config(rest, "")
    refuse_impossible(options)
    hosts, ssh = [Host("localhost", options.num_gpus or 1)], None
    if options.hostfile is not None:
        hosts = read_hostfile(options.hostfile)
        ssh = read_ssh(DEFAULT_SSH if options.ssh is None else options.ssh)
    # Only now the seconds that these take to import.
    from huggingface_hub.utils import logging as hub_logging

    from launch.preflight.host_checks import check_hosts
    from launch.preflight.recipe_checks import check_here
    from train.distributed.world import quiet_libraries

    quiet_libraries()
    hub_logging.set_verbosity_error()  # else a line for every question that it repeats
    findings, world_size = check_hosts(config, hosts, ssh, options)
    os.environ["DS_ACCELERATOR"] = kind_here()  # deepspeed would say that it found none
    findings += check_here(config, world_size)
    print(table_of(findings))
    failed = [finding for finding in findings if not finding.ok]
    warnings = [finding for finding in findings if finding.ok and finding.remedy]
    end = f"{len(failed)} failed" if failed else "all well"
    print(f"{len(findings)} checks, {end}" + (f", {len(warnings)} to look at" if warnings else ""))
    return 1 if failed else 0


def build_parser() -> argparse.ArgumentParser:
    """The flags that are the doctor's own."""
    parser = command_parser(__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--hostfile", help="the job's hosts, a line `NAME slots=GPUS` for each; this machine alone without it"
    )
    add("--num-gpus", type=int, help="ranks on this machine, where there is no hostfile; its GPUs by default")
    add("--ssh", help=f"command that runs another on a host ({DEFAULT_SSH})")
    add("--master-port", type=int, default=29500, help="port of rank 0 (%(default)s)")
    add("--skip-all-reduce", action="store_true", help="do not start ranks")
    return parser


def refuse_impossible(options: argparse.Namespace) -> None:
    """UserError for flags that cannot be, or have no effect."""
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
