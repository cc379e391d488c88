"""In ssh's place: runs the command on this machine, as another host, and answers falsely where FAULTS (JSON, by host)
says so.

{"hostb": {"shards": "/other", "clock": 120, "package": ["torch", "2.0.0"], "disk": 0.01}, "hostc": "unreachable"}
{"hostb": {"blind": true}}                  it does not see a file that is written elsewhere
{"hostb": {"alive": 0}}                     ServerAliveInterval by `ssh -G`
{"hostb": {"forget": ["HF_TOKEN"]}}         variables that do not arrive, as with sshd; all others do
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
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
    if "shards" in faults:
        command = re.sub(r"--shards=\S+", f"--shards={faults['shards']}", command)
    environment = {name: value for name, value in os.environ.items() if name not in faults.get("forget", [])}
    done = subprocess.run(["sh", "-c", command], text=True, stdout=subprocess.PIPE, env=environment)
    print("Welcome to", host)  # as a login shell may
    for line in done.stdout.splitlines():
        print(json.dumps(altered(json.loads(line), faults)))
    return done.returncode


def altered(answer: dict[str, Any], faults: dict[str, Any]) -> dict[str, Any]:
    for stamp in ("started_at", "ended_at"):
        answer[stamp] += faults.get("clock", 0)
    if "versions" in answer:
        answer["seen"] = answer["seen"] and not faults.get("blind", False)
        answer["versions"].update([faults["package"]] if "package" in faults else [])
        if "disk" in faults and "free_gib" in answer["run_folder"]:
            answer["run_folder"]["free_gib"] = faults["disk"]
    return answer


if __name__ == "__main__":
    sys.exit(main())
