"""What launch/doctor.py runs on every host: answers questions, one JSON object a line, about where it runs.

    python -m launch.preflight.probe        # then a request a line on its standard input, an answer a line back

Needs nothing but Python to start: what is missing on a host is an answer, not a crash. Whatever libraries print
goes to the standard error.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.environment_file import load_environment_file
from train.versions import installed_versions

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
CODE = ("data_prep", "train", "launch", "ds_configs")
CODE_SUFFIXES = (".py", ".c", ".json", ".yaml", ".html")
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def code_digest() -> str:
    """Of every file of this repository that a run executes, compiles or reads; twelve hex digits."""
    digest = hashlib.sha256()
    for path in sorted(p for name in CODE for p in (ROOT / name).rglob("*") if p.suffix in CODE_SUFFIXES):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def memory() -> dict[str, float]:
    """GiB: of the machine, free in it, free in /dev/shm."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    sizes = {name: int(lines[name].split()[0]) * 1024 / GIB for name in ("MemTotal", "MemAvailable")}
    return {
        "total_gib": sizes["MemTotal"],
        "free_gib": sizes["MemAvailable"],
        "shm_gib": shutil.disk_usage("/dev/shm").free / GIB,
    }


def gpus() -> list[dict[str, str]]:
    """Name, driver and memory of each, as nvidia-smi tells; none where it is not installed."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,memory.used",
        "--format=csv,noheader",
    ]
    text = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    names = ("name", "driver", "memory", "used")
    return [
        dict(zip(names, map(str.strip, line.split(",")), strict=True)) for line in text.splitlines() if line
    ]


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
    from data_prep.shard_format.manifest import Manifest
    from train.data.shard_checks import check_shards

    manifest = Manifest.load(location)
    check_shards(location, manifest)
    return {"digest": manifest.digest()[:12], "shards": sum(map(len, manifest.splits.values()))}


def teacher(folder: str) -> str:
    """Digest of a local teacher's config and of its files' sizes; twelve hex digits."""
    sizes = sorted(
        (p.name, p.stat().st_size) for p in Path(folder).iterdir() if p.suffix in (".safetensors", ".bin")
    )
    content = Path(folder, "config.json").read_bytes() + json.dumps(sizes).encode()
    return hashlib.sha256(content).hexdigest()[:12]


def variables(names: list[str], folder: Path) -> dict[str, str | None]:
    """What a rank in `folder` would find in its environment: cluster.env counts where the shell says nothing."""
    given = dict(os.environ)
    load_environment_file(given, folder)
    return {name: given.get(name) for name in names}


def address() -> str:
    """An address of this host that others can reach."""
    from train.distributed.rendezvous import own_address

    return own_address()


def facts(request: dict[str, Any]) -> dict[str, Any]:
    """Everything that is looked at on every host; {"error": ...} where a fact could not be had.

    Args:
        request: run_dir, shards; teachers (local folders); variables (names); folder (where the job is started).
    """
    questions: dict[str, Callable[[], Any]] = {
        "hostname": socket.gethostname,
        "address": address,
        "versions": installed_versions,
        "code": code_digest,
        "memory": memory,
        "gpus": gpus,
        "run_folder": lambda: run_folder(request["run_dir"]),
        "shards": lambda: shards(request["shards"]),
        "teachers": lambda: {folder: teacher(folder) for folder in request["teachers"]},
        "variables": lambda: variables(request["variables"], Path(request["folder"])),
    }
    answers = {}
    for name, question in questions.items():
        try:
            answers[name] = question()
        except Exception as error:  # a host may lack anything; that is what is asked about
            answers[name] = {"error": f"{error or type(error).__name__}"}
    return answers


class Listener:
    """A port that other hosts try to reach."""

    def __init__(self) -> None:
        self.socket: socket.socket | None = None

    def open(self, port: int) -> dict[str, Any]:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.socket.bind(("", port))
        except OSError as error:
            return {"error": error.strerror}
        except OverflowError:
            return {"error": "no port: give a number from 1 to 65535"}
        self.socket.listen(64)
        return {"port": self.socket.getsockname()[1]}

    def close(self) -> dict[str, Any]:
        if self.socket is not None:
            self.socket.close()
        return {}


def connect(address: str, port: int) -> dict[str, Any]:
    """Open a TCP connection; empty where that works."""
    try:
        socket.create_connection((address, port), timeout=10).close()
    except OSError as error:
        return {"error": error.strerror or str(error)}
    return {}


def run_ranks(environments: list[dict[str, str]], timeout_s: float) -> list[dict[str, Any]]:
    """Exit code and the end of the output of launch/preflight/allreduce.py under each environment."""
    command = [sys.executable, "-m", "launch.preflight.allreduce"]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for environment in environments
    ]
    deadline, results = time.monotonic() + timeout_s, []
    for rank in ranks:
        try:
            output = rank.communicate(timeout=max(0.1, deadline - time.monotonic()))[0]
        except subprocess.TimeoutExpired:
            rank.kill()
            output = rank.communicate()[0] + f"\nno end within {timeout_s:.0f} s"
        results.append({"code": rank.returncode, "output": output.strip()[-1000:]})
    return results


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.update(QUIET)
    listener = Listener()
    actions: dict[str, Callable[[dict[str, Any]], Any]] = {
        "time": lambda request: time.time(),
        "facts": facts,
        "listen": lambda request: listener.open(request["port"]),
        "close": lambda request: listener.close(),
        "connect": lambda request: connect(request["address"], request["port"]),
        "see": lambda request: Path(request["path"]).exists(),
        "ranks": lambda request: run_ranks(request["environments"], request["timeout_s"]),
    }
    print(json.dumps({"ready": platform.node()}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps({"answer": actions[request["do"]](request)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
