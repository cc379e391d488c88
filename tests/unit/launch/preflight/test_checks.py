"""The doctor's judgements of made-up answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.preflight.checks import (
    Finding,
    check_all_reduce,
    check_clocks,
    check_code,
    check_disk,
    check_env_files,
    check_gpus,
    check_keep_alive,
    check_memory,
    check_pdsh,
    check_run_folder,
    check_shards,
    check_teachers,
    check_torch,
    check_variables,
    check_versions,
    watched_variables,
)
from launch.preflight.hosts import keep_alive_s
from tests.unit.launch.preflight.answers import BROKEN, DEVICE, GPU, HEALTHY, ON_CPU, SLOTS, TORCH, hosts

JUDGES: dict[str, Callable[[dict[str, dict[str, Any]]], Finding]] = {
    "versions": check_versions,
    "code": check_code,
    "gpus": lambda answers: check_gpus(answers, SLOTS),
    "torch": lambda answers: check_torch(answers, SLOTS),
    "memory": lambda answers: check_memory(answers, SLOTS),
    "shards": lambda answers: check_shards(answers, "/shards"),
    "teachers": check_teachers,
    "run_folder": lambda answers: check_run_folder(answers, "/run"),
    "clock_ahead_s": check_clocks,
}


def check_space(answers: dict[str, dict[str, Any]]) -> Finding:
    return check_disk(answers, 5.0, "/run")


def test_healthy() -> None:
    for judge in JUDGES.values():
        found = judge(hosts())
        assert (found.ok, found.remedy) == (True, "")
        assert found.result
    disk = check_space(hosts())
    assert (disk.ok, disk.result) == (True, "100.0 GiB free, 5.0 needed")


@pytest.mark.parametrize(
    ("check", "answer", "seen", "remedy"),
    [
        ("versions", {**HEALTHY["versions"], "torch": "missing"}, "b: torch missing", "pip install"),
        ("versions", {**HEALTHY["versions"], "python": "3.10.1"}, "first host: 3.11.7", "Python"),
        ("code", "ffff", "b: ffff, on a 0123456789ab", "copy this folder to it"),
        ("clock_ahead_s", (-3.5, -2.5), "b: -2.5 s", "chronyd"),
        ("clock_ahead_s", (3.0, 4.0), "b: +3.0 s", "chronyd"),
        ("gpus", [GPU], "b: 1 x NVIDIA A100, 81920 MiB, driver 550.54 for 2 slots", "nvidia-smi"),
        ("gpus", [{**GPU, "driver": "535.1"}] * 2, "driver 535.1; first host: 2 x", "drivers"),
        ("gpus", [], "b: no GPU; first host", "equal GPUs"),
        ("gpus", {"error": "driver mismatch"}, "b: driver mismatch", "nvidia-smi"),
        (
            "torch",
            ON_CPU,
            "b: nvidia-smi shows 2 GPUs, but torch 2.13.0+cpu cannot use them: it is built without CUDA. Ranks would",
            "DS_ACCELERATOR=cpu (cluster.env)",
        ),
        ("torch", {**TORCH, "devices": [DEVICE]}, "1 x NVIDIA A100, 79.2 GiB, capability 8.0", "install"),
        ("torch", {**TORCH, "nccl": None}, "b: torch 2.13.0+cu130 has no NCCL", "install"),
        ("torch", {**TORCH, "nccl": "2.20"}, "NCCL 2.20; first host: torch 2.13.0+cu130: 2 x", "install"),
        ("torch", {**TORCH, "devices": [DEVICE, BROKEN]}, "b: device 1 (NVIDIA A100): out of mem", "DS_"),
        ("torch", {"error": "No module named 'torch'"}, "b: No module named 'torch'", "install"),
        ("memory", {"total_gib": 4, "free_gib": 1.5, "shm_gib": 9}, "1.5 GiB free for 2 ranks", "slots="),
        ("memory", {"total_gib": 99, "free_gib": 90, "shm_gib": 0.0625}, "/dev/shm", "--shm-size"),
        ("shards", {"digest": "cccc", "shards": 3}, "b: manifest cccc, on a aaaa", "/shards"),
        ("shards", {"error": "gone"}, "b: gone", "mount or copy"),
        ("teachers", {"/t": "cccc"}, "b: differ from those on a", "same folder"),
        ("run_folder", {"error": "Read-only file system"}, "b: Read-only", "--run.dir"),
    ],
)
def test_faults(check: str, answer: Any, seen: str, remedy: str) -> None:
    finding = JUDGES[check](hosts(**{check: answer}))
    assert not finding.ok
    assert seen in finding.result
    assert remedy in finding.remedy


def test_a_full_disk() -> None:
    finding = check_space(hosts(run_folder={"free_gib": 1.25}))
    assert not finding.ok
    assert "b: 1.25 GiB free" in finding.result
    assert "free 5.0 GiB" in finding.remedy


def test_first_host_at_fault() -> None:
    """What the first host lacks is its fault, and does not hide what the others have."""
    answers = {"a": {**HEALTHY, "shards": {"error": "no manifest"}}, "b": HEALTHY}
    assert "a: no manifest" in JUDGES["shards"](answers).result
    assert "data_prep/write_shards.py" in JUDGES["shards"]({"a": answers["a"]}).remedy


def test_an_answer_too_slow_to_judge_a_clock_by() -> None:
    assert JUDGES["clock_ahead_s"](hosts(clock_ahead_s=(-4.0, 0.5))).ok


def test_variables_that_do_not_arrive() -> None:
    own = {"HF_HOME": "/cache", "NCCL_DEBUG": "INFO", "PATH": "/bin", "GLOO_SOCKET_IFNAME": "eth0"}
    assert watched_variables(own, remote_shards=False) == ["GLOO_SOCKET_IFNAME", "HF_HOME"]
    assert watched_variables({**own, "AWS_PROFILE": "x"}, remote_shards=True)[0] == "AWS_PROFILE"
    answers = hosts(variables={"HF_HOME": "/cache", "GLOO_SOCKET_IFNAME": None})
    over_ssh = {"b": answers["b"]}
    lost = check_variables(own, {}, over_ssh)
    assert lost.result == "GLOO_SOCKET_IFNAME on b"
    assert "cluster.env" in lost.remedy
    assert check_variables(own, {"f": "GLOO_SOCKET_IFNAME=eth0\n"}, over_ssh).ok
    answers["b"]["variables"] = {"error": "/here/cluster.env is a folder"}
    assert check_variables({}, {}, answers).result == "b: /here/cluster.env is a folder"


def test_deepspeeds_own_file_of_variables() -> None:
    assert check_env_files({}).result == "none"
    assert check_env_files({"f": "A=1\n"}) == Finding(".deepspeed_env", True, "f")
    assert check_env_files({"f": "A=1\n\n# why\n"}).result == "f, line 2: ''; f, line 3: '# why'"


def test_ssh_that_does_not_look_is_a_warning(tmp_path: Path) -> None:
    fine = check_keep_alive({"b": 5, "c": 15})
    assert (fine.ok, fine.remedy, fine.result) == (True, "", "ServerAliveInterval is at most 15 s")
    warned = check_keep_alive({"b": 0, "c": 15})
    assert warned.ok
    assert "is 0 for b:" in warned.result
    assert "~/.ssh/config" in warned.remedy
    assert check_keep_alive({"b": None}).remedy == ""
    stand_in = tmp_path / "ssh"
    for says, expected in (("port 22\\nserveraliveinterval 7", 7), ("usage", None)):
        stand_in.write_text(f"#!/bin/sh\nprintf '{says}\\n'\n")
        stand_in.chmod(0o755)
        assert keep_alive_s("b", [str(stand_in), "-o", "X=y"]) == expected
    assert keep_alive_s("b", ["no-such-ssh"]) is None


def test_a_missing_pdsh_is_a_warning() -> None:
    assert check_pdsh("/usr/bin/pdsh").remedy == ""
    warned = check_pdsh(None)
    assert warned.ok
    assert "apt install pdsh" in warned.remedy


def test_all_reduce_results() -> None:
    good = {"code": 0, "output": 'noise\n{"right": true, "gb_per_s": 2.0, "megabytes": 17}'}
    slow = {"code": 0, "output": '{"right": true, "gb_per_s": 0.5, "megabytes": 17}'}
    wrong = {"code": 0, "output": '{"right": false, "gb_per_s": 2.0, "megabytes": 17}'}
    assert "0.50 GB/s" in check_all_reduce([good, slow], "all-reduce", False).result
    assert "rank 1 got a wrong sum" in check_all_reduce([good, wrong], "all-reduce", False).result
    failed = check_all_reduce([good, {"code": 1, "output": "x\nConnection refused"}], "all-reduce", True)
    assert "Connection refused" in failed.result
    assert "NCCL_SOCKET_IFNAME" in failed.remedy


def test_gpus_that_are_not_wanted_are_a_warning() -> None:
    found = check_torch({"a": {"gpus": [GPU], "torch": {**ON_CPU, "asked": "cpu"}}}, {"a": 1})
    assert found.ok
    assert found.result == "DS_ACCELERATOR=cpu: the GPUs of a are left alone"
    assert found.remedy == "unset DS_ACCELERATOR to compute on them"
