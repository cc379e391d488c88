"""What launch/doctor.py runs on every host, over ssh: it prints one JSON object on one line and ends.

    python -m launch.preflight.probe facts --run-dir RUN --shards SHARDS --folder FOLDER ...
    python -m launch.preflight.probe ranks --address A --port P --ranks 8 --first-rank 0 --world-size 16 ...

Needs nothing but Python to start: what is missing on a host is an answer, not a crash. Whatever libraries print
goes to the standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from train.distributed.device import gpus_of_driver, kind_here
from train.versions import installed_versions

STARTED_AT = time.time()
ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
CODE = ("data_prep", "train", "launch", "ds_configs")
CODE_SUFFIXES = (".py", ".c", ".h", ".json", ".yaml", ".html")
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
CONNECT_TIMEOUT_S = 20.0
"""For all hosts to reach the first: they start within some seconds of each other."""


def main() -> None:
    """Parse, look, answer."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    options = build_parser().parse_args()
    environment = dict(os.environ)
    os.environ.update(QUIET)
    answer = facts(options, environment) if options.what == "facts" else ranks(options)
    print(json.dumps({**answer, "started_at": STARTED_AT, "ended_at": time.time()}), file=output, flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    add = commands.add_parser("facts").add_argument
    add("--run-dir", required=True)
    add("--shards", required=True)
    add("--folder", type=Path, required=True, help="where the job is started")
    add("--teacher", action="append", default=[], help="a local folder")
    add("--variable", action="append", default=[], help="a name")
    add("--port", type=int, required=True, help="is it free?")
    add("--see", type=Path, help="does this file exist?")
    add = commands.add_parser("ranks").add_argument
    add("--address", required=True, help="of the first host")
    add("--port", type=int, required=True)
    add("--wait-for", type=int, help="other hosts; on the first host alone")
    add("--ranks", type=int, default=0, help="to start here")
    add("--first-rank", type=int, default=0)
    add("--world-size", type=int, default=0)
    add("--backend", default="gloo")
    add("--timeout-s", type=float, default=90.0)
    return parser


def facts(options: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, Any]:
    """Everything that is looked at on every host; {"error": ...} where a fact could not be had."""
    questions: dict[str, Callable[[], Any]] = {
        "hostname": socket.gethostname,
        "address": address,
        "versions": installed_versions,
        "code": code_digest,
        "memory": memory,
        "gpus": gpus_of_driver,
        "torch": torch_devices,
        "run_folder": lambda: run_folder(options.run_dir),
        "shards": lambda: shards(options.shards),
        "teachers": lambda: {folder: teacher(folder) for folder in options.teacher},
        "variables": lambda: variables(options.variable, options.folder, environment),
        "port": lambda: check_free(options.port),
        "seen": lambda: options.see and options.see.exists(),
    }
    answers = {}
    for name, question in questions.items():
        try:
            answers[name] = question()
        except Exception as error:  # a host may lack anything; that is what is asked about
            answers[name] = {"error": f"{error or type(error).__name__}"}
    return answers


def address() -> str:
    """Where `deepspeed --hostfile` has the ranks look for rank 0, if this is the first host: what `hostname -I` names
    first (deepspeed/launcher/runner.py), on some hosts of another network than the default route's."""
    with contextlib.suppress(OSError):
        if named := subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split():
            return named[0]
    from train.distributed.rendezvous import own_address  # psutil may be missing

    return own_address()


def code_digest() -> str:
    """Of every file of this repository that a run executes, compiles or reads; twelve hex digits."""
    digest = hashlib.sha256()
    for path in sorted(p for name in CODE for p in (ROOT / name).rglob("*") if p.suffix in CODE_SUFFIXES):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def memory() -> dict[str, float]:
    """GiB: free in the machine, free in /dev/shm."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free_gib = int(lines["MemAvailable"].split()[0]) * 1024 / GIB
    return {"free_gib": free_gib, "shm_gib": shutil.disk_usage("/dev/shm").free / GIB}


def torch_devices() -> dict[str, Any]:
    """What a run here would compute on, by torch, each device tried with a matrix product.

    Returns:
        torch: its version; asked: DS_ACCELERATOR; kind: "cuda" or "cpu"; why: what torch says where it sees no GPU;
        nccl: its version, None without; devices: name, memory_gib, capability, and fault (None where all is well).
    """
    import torch  # may be missing

    kind = kind_here()
    found: dict[str, Any] = {"torch": torch.__version__, "kind": kind, "why": "", "nccl": None}
    found["asked"] = os.environ.get("DS_ACCELERATOR", "")
    if kind == "cpu":
        found["why"] = "it sees one" if torch.cuda.is_available() else _why_no_gpu(torch)
        return {**found, "devices": [{"name": "CPU", "fault": _fault_of_product(torch, "cpu")}]}
    if torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    devices = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        devices.append(
            {
                "name": facts.name,
                "memory_gib": round(facts.total_memory / GIB, 1),
                "capability": f"{facts.major}.{facts.minor}",
                "fault": _fault_of_product(torch, f"cuda:{number}"),
            }
        )
    return {**found, "devices": devices}


def _why_no_gpu(torch: Any) -> str:
    if torch.version.cuda is None:
        return "it is built without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:  # of the driver, in its own words
        return f"it is built for CUDA {torch.version.cuda}: {' '.join(str(error).split())[:200]}"
    return "it sees none"


def _fault_of_product(torch: Any, device: str) -> str | None:
    """What is wrong with a product of small whole numbers, which every number format holds; None where it is right."""
    left = torch.arange(512 * 512).view(512, 512) % 3 - 1
    right = torch.arange(512 * 512).view(512, 512) % 5 - 2
    try:
        for dtype in (torch.float32, torch.float16) if device != "cpu" else (torch.float32,):
            product = left.to(device, dtype) @ right.to(device, dtype)
            if not torch.equal(product.cpu().double(), left.double() @ right.double()):
                return f"a matrix product in {dtype} is wrong"
    except RuntimeError as error:  # no memory, a kernel that is not built for this GPU
        return " ".join(str(error).split())[:200]
    return None


def run_folder(path: str) -> dict[str, Any]:
    """Whether checkpoints can be written there, by writing where it would be made; free space there."""
    made = next(p for p in (Path(path), *Path(path).parents) if p.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=made, prefix=".doctor-") as file:
            file.write(b"\0" * 2**20)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return {"error": f"{made}: {error.strerror or error}"}
    return {"free_gib": shutil.disk_usage(made).free / GIB}


def shards(location: str) -> dict[str, Any]:
    """Digest of the manifest; what is wrong with the shards beside it, by their sizes."""
    from data_prep.shard_format.manifest import Manifest  # webdataset may be missing
    from train.data.shard_checks import check_shards

    manifest = Manifest.load(location)
    check_shards(location, manifest)
    return {"digest": manifest.digest()[:12], "shards": sum(map(len, manifest.splits.values()))}


def teacher(folder: str) -> str:
    """Digest of a local teacher's config and of its files' sizes; twelve hex digits."""
    files = [path for path in Path(folder).iterdir() if path.suffix in (".safetensors", ".bin")]
    sizes = sorted((path.name, path.stat().st_size) for path in files)
    content = Path(folder, "config.json").read_bytes() + json.dumps(sizes).encode()
    return hashlib.sha256(content).hexdigest()[:12]


def variables(names: list[str], folder: Path, environment: Mapping[str, str]) -> dict[str, str | None]:
    """What a rank in `folder` would find in its environment: cluster.env counts where the shell says nothing."""
    from train.environment_file import load_environment_file  # python-dotenv may be missing

    given = dict(environment)
    load_environment_file(given, folder)
    return {name: given.get(name) for name in names}


def check_free(port: int) -> dict[str, str]:
    """Empty where a process can listen at the port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # No listen(): a host that has two names in the hostfile may be asked twice at once.
            listener.bind(("", port))
        except OSError as error:
            return {"error": error.strerror or str(error)}
    return {}


def ranks(options: argparse.Namespace) -> dict[str, Any]:
    """Do all hosts reach the first one's port? If they do, the ranks of this host.

    Returns:
        port: what went wrong; None where nothing did.
        ranks: exit code and output of each; empty where another host did not come, or none were asked for.
    """
    if options.wait_for is None:
        error, all_came = connect(options.address, options.port)
    else:
        error, all_came = None, accept_all(options.port, options.wait_for)
    return {"port": error, "ranks": run_ranks(options) if all_came else []}


def accept_all(port: int, hosts: int) -> bool:
    """Wait for as many hosts, then release them together; False where one does not come."""
    if hosts == 0:
        return True
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    both = socket.has_dualstack_ipv6()  # as the ranks' store listens
    family = socket.AF_INET6 if both else socket.AF_INET
    listening = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    with contextlib.ExitStack() as opened, listening as server:
        connections = []
        try:
            for _ in range(hosts):
                server.settimeout(max(0.1, deadline - time.monotonic()))
                connections.append(opened.enter_context(server.accept()[0]))
        except TimeoutError:
            return False
        for connection in connections:
            connection.sendall(b"1")
            connection.recv(1)  # closed there first, so that the port is free at once for the ranks
    return True


def connect(address: str, port: int) -> tuple[str | None, bool]:
    """(what went wrong, whether all other hosts reached the first one too)."""
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            connection = socket.create_connection((address, port), max(0.1, deadline - time.monotonic()))
            break
        except OSError as error:
            # The first host may not listen yet.
            if not isinstance(error, ConnectionRefusedError) or time.monotonic() > deadline:
                return error.strerror or str(error), False
        time.sleep(0.2)
    with connection, contextlib.suppress(OSError):
        connection.settimeout(2 * CONNECT_TIMEOUT_S)
        return None, connection.recv(1) == b"1"
    return None, False


def _end_of_output(output: str) -> str:
    """The rank's figures come last: with NCCL_DEBUG=INFO, NCCL goes on printing after them."""
    figures = [line for line in output.splitlines() if line.startswith('{"right"')]
    return "\n".join([output.strip()[-1000:], *figures[-1:]])


def run_ranks(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Exit code and the end of the output of launch/preflight/allreduce.py on every rank of this host."""
    common = {
        "WORLD_SIZE": str(options.world_size),
        "MASTER_ADDR": options.address,
        "MASTER_PORT": str(options.port),
        "DOCTOR_BACKEND": options.backend,
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "launch.preflight.allreduce"],
            cwd=ROOT,
            env={**os.environ, **common, "RANK": str(options.first_rank + local), "LOCAL_RANK": str(local)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for local in range(options.ranks)
    ]
    deadline, results = time.monotonic() + options.timeout_s, []
    for rank in started:
        try:
            output = rank.communicate(timeout=max(0.1, deadline - time.monotonic()))[0]
        except subprocess.TimeoutExpired:
            rank.kill()
            output = rank.communicate()[0] + f"\nno end within {options.timeout_s:.0f} s"
        results.append({"code": rank.returncode, "output": _end_of_output(output)})
    return results


if __name__ == "__main__":
    main()
