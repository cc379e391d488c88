"""What the hosts answered, judged: pure functions from answers to findings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_CLOCK_OFFSET_S = 2.0
"""Beyond it the newest file is not the newest, rows of different ranks do not line up, and signed URLs fail."""
MIN_MEMORY_GIB_PER_RANK = 1.0
MIN_SHM_GIB_WITH_GPUS = 0.25
"""NCCL's ranks of one host talk through /dev/shm; containers often have 64 MB of it."""
FORWARDED_PREFIXES = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
"""What deepspeed exports to other hosts by itself (DeepSpeed 0.19, launcher/runner.py; NCCL with GPUs)."""
WATCHED = ("HF_", "HTTP_PROXY", "HTTPS_PROXY", "GLOO_", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")
"""Variables (by their beginning) that change what a rank does and are not exported by deepspeed."""
WATCHED_FOR_URLS = ("AWS_", "GOOGLE_", "CLOUDSDK_", "AZURE_", "FSSPEC_")
"""The same, where the shards are read from URLs."""

Answers = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    ok: bool
    result: str
    """What was seen; names the host where that matters."""
    remedy: str = ""
    """What to do, where it is not ok; where it is, a warning: the run would start, but something may cost later."""


def judge_hosts(
    answers: Answers,
    *,
    slots: Mapping[str, int],
    offsets: Mapping[str, tuple[float, float]],
    needed_disk_gib: float,
    run_dir: str,
    shards: str,
) -> list[Finding]:
    """Findings on what every host answered to `facts` (launch/preflight/probe.py).

    Args:
        answers: by host, the first one the reference of what must be equal.
        offsets: (seconds ahead, uncertainty) of each host's clock.
    """
    return [
        *check_versions(answers),
        check_equal(
            answers, "code", "code", "copy this folder to it (git pull, rsync): every host runs its own copy"
        ),
        check_clocks(offsets),
        *check_gpus(answers, slots),
        check_memory(answers, slots),
        check_shards(answers, shards),
        check_teachers(answers),
        check_run_folder(answers, run_dir),
        check_disk(answers, needed_disk_gib, run_dir),
    ]


def _faults(
    name: str, answers: Answers, fault_of: Callable[[str, Any], str | None], fact: str, well: str, remedy: str
) -> Finding:
    """One finding of the hosts at which `fault_of(host, fact)` is not None; an unanswered question is a fault."""
    faults = []
    for host, facts in answers.items():
        value = facts[fact]
        failed = isinstance(value, Mapping) and "error" in value
        fault = value["error"] if failed else fault_of(host, value)
        if fault is not None:
            faults.append(f"{host}: {fault}")
    return Finding(name, not faults, "; ".join(faults) or well, remedy if faults else "")


def check_versions(answers: Answers) -> list[Finding]:
    """Python and packages: present, and the same as on the first host."""
    first = next(iter(answers.values()))["versions"]
    remedy = "install the same environment there: pip install -r requirements.txt with the same Python"

    def fault(host: str, versions: Mapping[str, str]) -> str | None:
        wrong = [
            f"{name} {found}" + (f" (first host: {first.get(name)})" if found != first.get(name) else "")
            for name, found in versions.items()
            if found == "missing" or found != first.get(name)
        ]
        return ", ".join(wrong) or None

    listed = ", ".join(f"{name} {first.get(name)}" for name in ("python", "torch", "deepspeed"))
    return [_faults("python and packages", answers, fault, "versions", listed, remedy)]


def check_equal(answers: Answers, fact: str, name: str, remedy: str) -> Finding:
    """A fact that must be the same everywhere."""
    host, first = next((host, facts[fact]) for host, facts in answers.items())
    return _faults(
        name,
        answers,
        lambda _, value: None if value == first else f"{value}, on {host} {first}",
        fact,
        f"{first} on every host" if len(answers) > 1 else str(first),
        remedy,
    )


def check_clocks(offsets: Mapping[str, tuple[float, float]]) -> Finding:
    wrong = [
        f"{host}: {ahead:+.1f} s"
        for host, (ahead, uncertain) in offsets.items()
        if abs(ahead) - uncertain > MAX_CLOCK_OFFSET_S
    ]
    largest = max((abs(ahead) for ahead, _ in offsets.values()), default=0.0)
    return Finding(
        "clock",
        not wrong,
        "; ".join(wrong) or f"at most {largest:.3f} s off",
        "set the clock there: systemctl enable --now chronyd (or systemd-timesyncd)" if wrong else "",
    )


def check_gpus(answers: Answers, slots: Mapping[str, int]) -> list[Finding]:
    """The same GPUs and drivers everywhere, as many as slots; none anywhere is well (gloo)."""
    first = next(iter(answers.values()))["gpus"]
    reference = [] if isinstance(first, Mapping) else first

    def describe(gpus: Sequence[Mapping[str, str]]) -> str:
        kinds = sorted({f"{gpu['name']}, {gpu['memory']}, driver {gpu['driver']}" for gpu in gpus})
        return f"{len(gpus)} x {' and '.join(kinds)}" if gpus else "no GPU"

    def fault(host: str, gpus: Sequence[Mapping[str, str]]) -> str | None:
        kinds = [{(gpu["name"], gpu["driver"]) for gpu in each} for each in (gpus, reference)]
        if gpus and len(gpus) < slots[host]:
            return f"{describe(gpus)} for {slots[host]} slots"
        if kinds[0] != kinds[1]:
            return f"{describe(gpus)}; first host: {describe(reference)}"
        return None

    well = describe(reference) + ("" if reference else ": ranks compute on the CPU in fp32, over gloo")
    remedy = (
        "use hosts with equal GPUs and drivers, with slots= not above their number (nvidia-smi shows them)"
    )
    return [_faults("GPUs and drivers", answers, fault, "gpus", well, remedy)]


def check_memory(answers: Answers, slots: Mapping[str, int]) -> Finding:
    def fault(host: str, memory: Mapping[str, float]) -> str | None:
        needed = MIN_MEMORY_GIB_PER_RANK * slots[host]
        if memory["free_gib"] < needed:
            return f"{memory['free_gib']:.1f} GiB free for {slots[host]} ranks"
        gpus = answers[host]["gpus"]
        if gpus and not isinstance(gpus, Mapping) and memory["shm_gib"] < MIN_SHM_GIB_WITH_GPUS:
            return f"{memory['shm_gib']:.2f} GiB in /dev/shm"
        return None

    sizes = [facts["memory"].get("free_gib", 0.0) for facts in answers.values()]
    remedy = "stop what else runs there, or lower slots=; for /dev/shm start the container with --shm-size=8g"
    return _faults("memory", answers, fault, "memory", f"at least {min(sizes):.1f} GiB free", remedy)


def check_shards(answers: Answers, location: str) -> Finding:
    host, first = next((host, facts["shards"]) for host, facts in answers.items())
    remedy = f"every host must see the same shards at {location}: mount or copy the folder, then try again"
    if "error" in first and len(answers) == 1:
        remedy = "make shards with data_prep/write_shards.py, or give --data.shards"

    def fault(_: str, value: Mapping[str, Any]) -> str | None:
        if value["digest"] == first.get("digest"):
            return None
        return f"manifest {value['digest']}, on {host} {first.get('digest', 'none')}"

    well = f"{first.get('shards')} shards, manifest {first.get('digest')}"
    return _faults("shards", answers, fault, "shards", well, remedy)


def check_teachers(answers: Answers) -> Finding:
    host, first = next((host, facts["teachers"]) for host, facts in answers.items())
    return _faults(
        "teacher's files",
        answers,
        lambda _, value: None if value == first else f"differ from those on {host}",
        "teachers",
        "the same on every host" if first and len(answers) > 1 else "there" if first else "no local folder",
        "every host must see the same folder at the same path (model.teacher): mount or copy it",
    )


def check_run_folder(answers: Answers, run_dir: str) -> Finding:
    remedy = f"give --run.dir, a folder that every host can write to (it is {run_dir})"
    return _faults(
        "run folder", answers, lambda *_: None, "run_folder", f"{run_dir} can be written to", remedy
    )


def check_disk(answers: Answers, needed_gib: float, run_dir: str) -> Finding:
    def fault(_: str, folder: Mapping[str, float]) -> str | None:
        return None if folder["free_gib"] >= needed_gib else f"{folder['free_gib']:.2f} GiB free at {run_dir}"

    known = {host: facts for host, facts in answers.items() if "free_gib" in facts["run_folder"]}
    if not known:
        return Finding("disk", False, "not known: no run folder", "mend the run folder first")
    free = min(facts["run_folder"]["free_gib"] for facts in known.values())
    remedy = f"free {needed_gib:.1f} GiB for checkpoints, lower --checkpoint.keep_last, or move --run.dir"
    return _faults(
        "disk", known, fault, "run_folder", f"{free:.1f} GiB free, {needed_gib:.1f} needed", remedy
    )


def check_variables(
    own: Mapping[str, str], env_files: Mapping[str, str], answers: Answers, remote: Sequence[str]
) -> list[Finding]:
    """Do the hosts' ranks get the variables that are set here?

    Args:
        own: environment of this process.
        env_files: text of each .deepspeed_env that deepspeed reads, by path.
        remote: names of the hosts that ranks are started on over ssh.
    """
    bad = [
        f"{path}, line {number}: {line.strip()!r}"
        for path, text in env_files.items()
        for number, line in enumerate(text.splitlines(), 1)
        if "=" not in line or line.lstrip().startswith("#")
    ]
    findings = [
        Finding(
            ".deepspeed_env",
            not bad,
            "; ".join(bad) or (", ".join(env_files) or "none"),
            "deepspeed cannot read such a line: keep NAME=VALUE lines alone, or use cluster.env (docs/CLUSTER.md)"
            if bad
            else "",
        )
    ]
    if remote:
        listed = {line.partition("=")[0].strip() for text in env_files.values() for line in text.splitlines()}
        broken = [host for host in remote if "error" in answers[host]["variables"]]
        lost = [f"{host}: {answers[host]['variables']['error']}" for host in broken] + [
            f"{name} on {host}"
            for host in remote
            if host not in broken
            for name, value in answers[host]["variables"].items()
            if name in own and name not in listed and value != own[name]
        ]
        remedy = "put NAME=VALUE lines for these into cluster.env in this folder on every host, or unset them"
        findings.append(
            Finding(
                "forwarded variables", not lost, "; ".join(lost) or "all that matter", remedy if lost else ""
            )
        )
    return findings


def check_keep_alive(intervals: Mapping[str, int | None]) -> Finding:
    """Would the launcher's ssh notice that a host has gone silent? A warning where it would not.

    Args:
        intervals: ServerAliveInterval by host, seconds; 0 is never, None is not known.
    """
    never = [host for host, interval in intervals.items() if interval == 0]
    known = [interval for interval in intervals.values() if interval]
    seen = f"ServerAliveInterval is at most {max(known)} s" if known else "not known: --ssh is no OpenSSH"
    if never:
        seen = f"ServerAliveInterval is 0 for {', '.join(never)}: `deepspeed` would wait for ever for a dead host"
    remedy = "two lines for ~/.ssh/config on this host: `Host *` and `    ServerAliveInterval 5`"
    return Finding("ssh keep-alive", True, seen, remedy if never else "")


def check_single_host(name: str, its_hostname: Any, hostname: str) -> Finding:
    """A warning where the hostfile's one host is another machine: `deepspeed` starts the ranks of one host here.

    Args:
        name: what the hostfile calls it.
        its_hostname, hostname: of that host, and of this one.
    """
    seen = (
        f"{name} is this machine" if its_hostname == hostname else f"{name} is {its_hostname}, not {hostname}"
    )
    remedy = f"`deepspeed` starts the ranks of a single host where you type it: type it on {name}, or add --force_multi"
    return Finding("single host", True, seen, "" if its_hostname == hostname else remedy)


def check_pdsh(path: str | None) -> Finding:
    """A warning where the command is missing with which deepspeed starts the ranks of several hosts."""
    seen = path or "not found: `deepspeed` starts the ranks of several hosts with it"
    return Finding(
        "pdsh", True, seen, "" if path else "install it (apt install pdsh), or start with srun or mpirun"
    )


def watched_variables(environment: Mapping[str, str], remote_shards: bool) -> list[str]:
    """Variables that are set and matter, and that deepspeed does not export by itself."""
    watched = (*WATCHED, *WATCHED_FOR_URLS) if remote_shards else WATCHED
    return sorted(n for n in environment if n.startswith(watched) and not n.startswith(FORWARDED_PREFIXES))


def check_all_reduce(results: Sequence[Mapping[str, Any]], name: str, several_hosts: bool) -> Finding:
    """The ranks' results; the slowest rank's rate counts."""
    remedy = "the ranks did not find each other: " + (
        "open all ports between the hosts, and set NCCL_SOCKET_IFNAME / GLOO_SOCKET_IFNAME to the right interface"
        if several_hosts
        else "is 127.0.0.1 up, is a GPU in use by another job? NCCL_DEBUG=INFO says more"
    )
    failed = [
        f"rank {i}: {r['output'].splitlines()[-1:] or ['']}" for i, r in enumerate(results) if r["code"] != 0
    ]
    if failed:
        return Finding(name, False, "; ".join(failed)[:400], remedy)
    measured = [json.loads(result["output"].splitlines()[-1]) for result in results]
    wrong = [f"rank {index} got a wrong sum" for index, each in enumerate(measured) if not each["right"]]
    if wrong:
        return Finding(name, False, "; ".join(wrong), "a broken link, memory or driver: test each host alone")
    rate, size = min(each["gb_per_s"] for each in measured), measured[0]["megabytes"]
    return Finding(name, True, f"{len(results)} ranks, right; {rate:.2f} GB/s a rank with {size:.0f} MB")
