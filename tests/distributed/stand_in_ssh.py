"""In ssh's place: runs the command on this machine, as another host, and lies where FAULTS (JSON, by host) says so.

{"hostb": {"shards": "/other", "clock": 120, "package": ["torch", "2.0.0"], "disk": 0.01}, "hostc": "unreachable"}
{"hostb": {"alive": 0}}                     what `ssh -G` says of ServerAliveInterval
{"hostb": {"forget": ["HF_TOKEN"]}}         variables that do not arrive, as with sshd; all others do
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from typing import Any


def main() -> int:
    question = sys.argv[1] == "-G"
    host, command = [*sys.argv[2:], ""] if question else sys.argv[1:]
    faults = json.loads(os.environ.get("FAULTS", "{}")).get(host, {})
    if faults == "unreachable":
        print(f"ssh: connect to host {host} port 22: No route to host", file=sys.stderr)
        return 255
    if question:
        print(f"user root\nserveraliveinterval {faults.get('alive', 15)}")
        return 0
    process = subprocess.Popen(
        ["sh", "-c", command],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=1,
        env={name: value for name, value in os.environ.items() if name not in faults.get("forget", [])},
    )
    asked: list[dict[str, Any]] = []
    threading.Thread(target=forward, args=(process, faults, asked), daemon=True).start()
    assert process.stdout is not None
    print("Welcome to", host, flush=True)  # as a login shell may
    for line in process.stdout:
        answer = json.loads(line)
        if asked and "answer" in answer:
            answer["answer"] = lie(asked.pop(0)["do"], answer["answer"], faults)
        print(json.dumps(answer), flush=True)
    return process.wait()


def forward(process: subprocess.Popen[str], faults: dict[str, Any], asked: list[dict[str, Any]]) -> None:
    assert process.stdin is not None
    for line in sys.stdin:
        request = json.loads(line)
        asked.append(request)
        if request["do"] == "facts" and "shards" in faults:
            request["shards"] = faults["shards"]
        print(json.dumps(request), file=process.stdin, flush=True)
    process.stdin.close()


def lie(question: str, answer: Any, faults: dict[str, Any]) -> Any:
    if question == "time":
        return answer + faults.get("clock", 0)
    if question == "see":
        return answer and not faults.get("blind", False)
    if question == "facts":
        if "package" in faults:
            name, version = faults["package"]
            answer["versions"][name] = version
        if "disk" in faults and "free_gib" in answer["run_folder"]:
            answer["run_folder"]["free_gib"] = faults["disk"]
    return answer


if __name__ == "__main__":
    sys.exit(main())
