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
"""NCCL's ranks of one host exchange data through /dev/shm; containers often have 64 MB of it."""
FORWARDED_PREFIXES = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
"""What deepspeed exports to other hosts by itself (DeepSpeed 0.19, launcher/runner.py; NCCL with GPUs)."""
WATCHED = (
    "DS_ACCELERATOR",
    "HF_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "GLOO_",
    "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
)
"""Variables (by their beginning) that change what a rank does and are not exported by deepspeed."""
WATCHED_FOR_URLS = ("AWS_", "GOOGLE_", "CLOUDSDK_", "AZURE_", "FSSPEC_")
"""The same, where the shards are read from URLs."""

Answers = Mapping[str, Mapping[str, Any]]
"""By host, what launch/preflight/probe.py answered to `facts`; the first one is the reference of what must be equal."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    ok: bool
    result: str
    """What was seen; names the host where that matters."""
    remedy: str = ""
    """What to do, where it is not ok; where it is, a warning: the run would start, but something may cost later."""


def finding(check: str, faults: Sequence[str], well: str, remedy: str) -> Finding:
    """Faults and their remedy, or that all is well."""
    return Finding(check, not faults, "; ".join(faults) or well, remedy if faults else "")


def _faults(answers: Answers, fact: str, fault_of: Callable[[str, Any], str | None]) -> list[str]:
    """What `fault_of(host, fact)` says of every host, where it is not None; a question without an answer is a fault."""
    faults = []
    for host, facts in answers.items():
        value = facts[fact]
        unanswered = isinstance(value, Mapping) and "error" in value
        fault = value["error"] if unanswered else fault_of(host, value)
        if fault is not None:
            faults.append(f"{host}: {fault}")
    return faults


def _first(answers: Answers, fact: str) -> tuple[str, Any]:
    return next((host, facts[fact]) for host, facts in answers.items())


def check_versions(answers: Answers) -> Finding:
    """Python and packages: present, and the same as on the first host."""
    first = _first(answers, "versions")[1]

    def fault(host: str, versions: Mapping[str, str]) -> str | None:
        wrong = [
            f"{name} {found}" + (f" (first host: {first.get(name)})" if found != first.get(name) else "")
            for name, found in versions.items()
            if found == "missing" or found != first.get(name)
        ]
        return ", ".join(wrong) or None

    well = ", ".join(f"{name} {first.get(name)}" for name in ("python", "torch", "deepspeed"))
    remedy = "install the same environment there: pip install -r requirements.txt with the same Python"
    return finding("python and packages", _faults(answers, "versions", fault), well, remedy)


def check_code(answers: Answers) -> Finding:
    host, first = _first(answers, "code")
    faults = _faults(answers, "code", lambda _, code: None if code == first else f"{code}, on {host} {first}")
    well = f"{first} on every host" if len(answers) > 1 else str(first)
    remedy = "copy this folder to it (git pull, rsync): every host runs its own copy"
    return finding("code", faults, well, remedy)


def check_clocks(answers: Answers) -> Finding:
    """Is any clock surely too far from this host's? The slower a host answers, the less is sure."""
    bounds = {host: facts["clock_ahead_s"] for host, facts in answers.items()}
    faults = [
        f"{host}: {min(lowest, highest, key=abs):+.1f} s"
        for host, (lowest, highest) in bounds.items()
        if lowest > MAX_CLOCK_OFFSET_S or highest < -MAX_CLOCK_OFFSET_S
    ]
    # The answer's way back is the shorter one: ssh and Python were already there.
    largest = max(abs(lowest) for lowest, _ in bounds.values())
    remedy = "set the clock there: systemctl enable --now chronyd (or systemd-timesyncd)"
    return finding("clock", faults, f"about {largest:.1f} s off at most", remedy)


def check_gpus(answers: Answers, slots: Mapping[str, int]) -> Finding:
    """The same GPUs and drivers everywhere, as many as slots; none anywhere is well (gloo)."""
    first = _first(answers, "gpus")[1]
    reference = [] if isinstance(first, Mapping) else first

    def describe(gpus: Sequence[Mapping[str, str]]) -> str:
        kinds = sorted({f"{gpu['name']}, {gpu['memory']}, driver {gpu['driver']}" for gpu in gpus})
        return f"{len(gpus)} x {' and '.join(kinds)}" if gpus else "no GPU"

    def fault(host: str, gpus: Sequence[Mapping[str, str]]) -> str | None:
        kinds = [{(gpu["name"], gpu["driver"]) for gpu in each} for each in (gpus, reference)]
        if gpus and len(gpus) < slots[host]:
            return f"{describe(gpus)} for {slots[host]} slots"
        return None if kinds[0] == kinds[1] else f"{describe(gpus)}; first host: {describe(reference)}"

    well = describe(reference) + ("" if reference else ": ranks compute on the CPU in fp32, over gloo")
    remedy = (
        "use hosts with equal GPUs and drivers, with slots= not above their number (nvidia-smi shows them)"
    )
    return finding("GPUs and drivers", _faults(answers, "gpus", fault), well, remedy)


def check_torch(answers: Answers, slots: Mapping[str, int]) -> Finding:
    """Does torch see the driver's GPUs, one for every slot, the same everywhere, and multiply rightly on each?"""
    first = _first(answers, "torch")[1]

    def describe(facts: Mapping[str, Any]) -> str:
        devices = facts.get("devices", [])
        if facts.get("kind") != "cuda":
            return f"torch {facts.get('torch')} computes on the CPU"
        kinds = sorted({f"{d['name']}, {d['memory_gib']} GiB, capability {d['capability']}" for d in devices})
        return f"torch {facts['torch']}: {len(devices)} x {' and '.join(kinds)}, NCCL {facts['nccl']}"

    def fault(host: str, facts: Mapping[str, Any]) -> str | None:
        devices, gpus = facts["devices"], answers[host]["gpus"]
        if facts["kind"] == "cpu" and facts["asked"] != "cpu" and gpus and not isinstance(gpus, Mapping):
            return (
                f"nvidia-smi shows {len(gpus)} GPUs, but torch {facts['torch']} cannot use them: {facts['why']}. Ranks "
                "would compute on the CPU, in fp32"
            )
        if facts["kind"] == "cuda" and len(devices) < slots[host]:
            return f"{describe(facts)}, for {slots[host]} slots"
        if facts["kind"] == "cuda" and facts["nccl"] is None:
            return f"torch {facts['torch']} has no NCCL"
        wrong = [f"{number} ({d['name']}): {d['fault']}" for number, d in enumerate(devices) if d["fault"]]
        if wrong:
            return f"device {'; '.join(wrong)}"
        seen, reference = describe(facts), describe(first)
        return None if seen == reference else f"{seen}; first host: {reference}"

    well = f"{describe(first)}; a matrix product on each device is right"
    remedy = (
        "install a torch that is built for the driver's CUDA (in the corner of nvidia-smi's table; "
        "pytorch.org/get-started) on every host, or mean the CPU with DS_ACCELERATOR=cpu (cluster.env)"
    )
    found = finding("torch's devices", _faults(answers, "torch", fault), well, remedy)
    idle = [host for host, facts in answers.items() if facts["gpus"] and facts["torch"].get("asked") == "cpu"]
    if found.ok and idle:
        seen = f"DS_ACCELERATOR=cpu: the GPUs of {', '.join(idle)} are left alone"
        return Finding(found.check, True, seen, "unset DS_ACCELERATOR to compute on them")
    return found


def check_memory(answers: Answers, slots: Mapping[str, int]) -> Finding:
    def fault(host: str, memory: Mapping[str, float]) -> str | None:
        if memory["free_gib"] < MIN_MEMORY_GIB_PER_RANK * slots[host]:
            return f"{memory['free_gib']:.1f} GiB free for {slots[host]} ranks"
        gpus = answers[host]["gpus"]
        if gpus and not isinstance(gpus, Mapping) and memory["shm_gib"] < MIN_SHM_GIB_WITH_GPUS:
            return f"{memory['shm_gib']:.2f} GiB in /dev/shm"
        return None

    sizes = [facts["memory"].get("free_gib", 0.0) for facts in answers.values()]
    remedy = "stop what else runs there, or lower slots=; for /dev/shm start the container with --shm-size=8g"
    faults = _faults(answers, "memory", fault)
    return finding("memory", faults, f"at least {min(sizes):.1f} GiB free", remedy)


def check_shards(answers: Answers, location: str) -> Finding:
    host, first = _first(answers, "shards")
    remedy = f"every host must see the same shards at {location}: mount or copy the folder, then try again"
    if "error" in first and len(answers) == 1:
        remedy = "make shards with data_prep/write_shards.py, or give --data.shards"

    def fault(_: str, value: Mapping[str, Any]) -> str | None:
        if value["digest"] == first.get("digest"):
            return None
        return f"manifest {value['digest']}, on {host} {first.get('digest', 'none')}"

    well = f"{first.get('shards')} shards, manifest {first.get('digest')}"
    return finding("shards", _faults(answers, "shards", fault), well, remedy)


def check_teachers(answers: Answers) -> Finding:
    host, first = _first(answers, "teachers")
    faults = _faults(
        answers, "teachers", lambda _, value: None if value == first else f"differ from those on {host}"
    )
    well = "the same on every host" if first and len(answers) > 1 else "there" if first else "no local folder"
    remedy = (
        "every host must see the same folder at the same path (model.teacher or start_from): mount or copy it"
    )
    return finding("teacher's files", faults, well, remedy)


def check_run_folder(answers: Answers, run_dir: str) -> Finding:
    faults = _faults(answers, "run_folder", lambda *_: None)
    remedy = f"give --run.dir, a folder that every host can write to (it is {run_dir})"
    return finding("run folder", faults, f"{run_dir} can be written to", remedy)


def check_disk(answers: Answers, needed_gib: float, run_dir: str) -> Finding:
    free = {host: facts["run_folder"].get("free_gib") for host, facts in answers.items()}
    known = {host: gib for host, gib in free.items() if gib is not None}
    if not known:
        return Finding("disk", False, "not known: no run folder", "mend the run folder first")
    faults = [f"{host}: {gib:.2f} GiB free at {run_dir}" for host, gib in known.items() if gib < needed_gib]
    well = f"{min(known.values()):.1f} GiB free, {needed_gib:.1f} needed"
    remedy = f"free {needed_gib:.1f} GiB for checkpoints, lower --checkpoint.keep_last, or move --run.dir"
    return finding("disk", faults, well, remedy)


def check_env_files(env_files: Mapping[str, str]) -> Finding:
    """Can deepspeed read its own files of variables?

    Args:
        env_files: text of each .deepspeed_env that it reads, by path.
    """
    faults = [
        f"{path}, line {number}: {line.strip()!r}"
        for path, text in env_files.items()
        for number, line in enumerate(text.splitlines(), 1)
        if "=" not in line or line.lstrip().startswith("#")
    ]
    remedy = (
        "deepspeed cannot read such a line: keep NAME=VALUE lines alone, or use cluster.env (docs/CLUSTER.md)"
    )
    return finding(".deepspeed_env", faults, ", ".join(env_files) or "none", remedy)


def check_variables(own: Mapping[str, str], env_files: Mapping[str, str], answers: Answers) -> Finding:
    """Do ranks that are started over ssh get the variables that are set here (`own`)?"""
    listed = {line.partition("=")[0].strip() for text in env_files.values() for line in text.splitlines()}
    broken = [host for host, facts in answers.items() if "error" in facts["variables"]]
    faults = [f"{host}: {answers[host]['variables']['error']}" for host in broken] + [
        f"{name} on {host}"
        for host, facts in answers.items()
        if host not in broken
        for name, value in facts["variables"].items()
        if name in own and name not in listed and value != own[name]
    ]
    remedy = "put NAME=VALUE lines for these into cluster.env in this folder on every host, or unset them"
    return finding("forwarded variables", faults, "all that matter", remedy)


def watched_variables(environment: Mapping[str, str], remote_shards: bool) -> list[str]:
    """Variables that are set and matter, and that deepspeed does not export by itself."""
    watched = (*WATCHED, *WATCHED_FOR_URLS) if remote_shards else WATCHED
    return sorted(n for n in environment if n.startswith(watched) and not n.startswith(FORWARDED_PREFIXES))


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
    if its_hostname == hostname:
        return Finding("single host", True, f"{name} is this machine")
    remedy = f"`deepspeed` starts the ranks of a single host where you type it: type it on {name}, or add --force_multi"
    return Finding("single host", True, f"{name} is {its_hostname}, not {hostname}", remedy)


def check_pdsh(path: str | None) -> Finding:
    """A warning where the command is missing with which deepspeed starts the ranks of several hosts."""
    if path:
        return Finding("pdsh", True, path)
    seen = "not found: `deepspeed` starts the ranks of several hosts with it"
    return Finding("pdsh", True, seen, "install it (apt install pdsh), or start with srun or mpirun")


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
    rate, size = min(each["gb_per_s"] for each in measured), measured[0]["megabytes"]
    well = f"{len(results)} ranks, right; {rate:.2f} GB/s a rank with {size:.0f} MB"
    return finding(name, wrong, well, "a broken link, memory or driver: test each host alone")
