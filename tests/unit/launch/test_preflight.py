"""launch/doctor.py on this machine alone, and its judgements of made-up answers."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import logging as hub_logging

from data_prep.shard_format.manifest import Manifest
from launch import doctor
from launch.cli import parse_config
from launch.preflight import probe
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
from launch.preflight.host_checks import check_network, read_env_files
from launch.preflight.hosts import Host, UnreachableError, ask, keep_alive_s, read_hostfile
from launch.preflight.recipe_checks import (
    CPU_TOKENS,
    check_recipe,
    check_teacher,
    check_tokenizer,
    needed_disk_gib,
)
from tests.distributed.pretraining import small_settings
from tests.paths import ROOT
from train.distributed.rendezvous import free_port

GPU = {"name": "NVIDIA A100", "driver": "550.54", "memory": "81920 MiB", "used": "0 MiB"}
DEVICE = {"name": "NVIDIA A100", "memory_gib": 79.2, "capability": "8.0", "fault": None}
BROKEN = {**DEVICE, "fault": "out of memory"}
TORCH = {
    "torch": "2.13.0+cu130",
    "kind": "cuda",
    "asked": "",
    "why": "",
    "nccl": "2.27",
    "devices": [DEVICE] * 2,
}
ON_CPU: dict[str, Any] = {
    "torch": "2.13.0+cpu",
    "kind": "cpu",
    "asked": "",
    "why": "it is built without CUDA",
}
ON_CPU |= {"nccl": None, "devices": [{"name": "CPU", "fault": None}]}
HEALTHY: dict[str, Any] = {
    "versions": {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8"},
    "code": "0123456789ab",
    "memory": {"total_gib": 100.0, "free_gib": 90.0, "shm_gib": 50.0},
    "gpus": [GPU, GPU],
    "torch": TORCH,
    "run_folder": {"free_gib": 100.0},
    "shards": {"digest": "aaaa", "shards": 3},
    "teachers": {"/t": "bbbb"},
    "variables": {},
    "clock_ahead_s": (-0.01, 0.4),
}
SLOTS = {"a": 2, "b": 2}


def hosts(**changed: Any) -> dict[str, dict[str, Any]]:
    """Two healthy hosts, the second with some answers changed."""
    return {"a": copy.deepcopy(HEALTHY), "b": {**copy.deepcopy(HEALTHY), **changed}}


def judge(name: str, answers: dict[str, dict[str, Any]]) -> Finding:
    return {
        "versions": lambda: check_versions(answers),
        "code": lambda: check_code(answers),
        "gpus": lambda: check_gpus(answers, SLOTS),
        "torch": lambda: check_torch(answers, SLOTS),
        "memory": lambda: check_memory(answers, SLOTS),
        "shards": lambda: check_shards(answers, "/shards"),
        "teachers": lambda: check_teachers(answers),
        "run_folder": lambda: check_run_folder(answers, "/run"),
        "disk": lambda: check_disk(answers, 5.0, "/run"),
        "clock_ahead_s": lambda: check_clocks(answers),
    }[name]()


def test_healthy() -> None:
    for check in (
        "versions",
        "code",
        "gpus",
        "torch",
        "memory",
        "shards",
        "teachers",
        "run_folder",
        "clock_ahead_s",
    ):
        found = judge(check, hosts())
        assert (found.ok, found.remedy) == (True, "")
        assert found.result
    disk = judge("disk", hosts())
    assert (disk.ok, disk.result) == (True, "100.0 GiB free, 5.0 needed")


@pytest.mark.parametrize(
    ("check", "changed", "seen", "remedy"),
    [
        (
            "versions",
            {"versions": {**HEALTHY["versions"], "torch": "missing"}},
            "b: torch missing",
            "pip install",
        ),
        (
            "versions",
            {"versions": {**HEALTHY["versions"], "python": "3.10.1"}},
            "first host: 3.11.7",
            "Python",
        ),
        ("code", {"code": "ffff"}, "b: ffff, on a 0123456789ab", "copy this folder to it"),
        ("clock_ahead_s", {"clock_ahead_s": (-3.5, -2.5)}, "b: -2.5 s", "chronyd"),
        ("clock_ahead_s", {"clock_ahead_s": (3.0, 4.0)}, "b: +3.0 s", "chronyd"),
        ("gpus", {"gpus": [GPU]}, "b: 1 x NVIDIA A100, 81920 MiB, driver 550.54 for 2 slots", "nvidia-smi"),
        ("gpus", {"gpus": [{**GPU, "driver": "535.1"}] * 2}, "driver 535.1; first host: 2 x", "drivers"),
        ("gpus", {"gpus": []}, "b: no GPU; first host", "equal GPUs"),
        ("gpus", {"gpus": {"error": "driver mismatch"}}, "b: driver mismatch", "nvidia-smi"),
        (
            "torch",
            {"torch": ON_CPU},
            "b: nvidia-smi shows 2 GPUs, but torch 2.13.0+cpu cannot use them: it is built without CUDA. Ranks would",
            "DS_ACCELERATOR=cpu (cluster.env)",
        ),
        (
            "torch",
            {"torch": {**TORCH, "devices": [DEVICE]}},
            "1 x NVIDIA A100, 79.2 GiB, capability 8.0",
            "install",
        ),
        ("torch", {"torch": {**TORCH, "nccl": None}}, "b: torch 2.13.0+cu130 has no NCCL", "install"),
        (
            "torch",
            {"torch": {**TORCH, "nccl": "2.20"}},
            "NCCL 2.20; first host: torch 2.13.0+cu130: 2 x",
            "install",
        ),
        (
            "torch",
            {"torch": {**TORCH, "devices": [DEVICE, BROKEN]}},
            "b: device 1 (NVIDIA A100): out of mem",
            "DS_",
        ),
        ("torch", {"torch": {"error": "No module named 'torch'"}}, "b: No module named 'torch'", "install"),
        (
            "memory",
            {"memory": {"total_gib": 4, "free_gib": 1.5, "shm_gib": 9}},
            "1.5 GiB free for 2 ranks",
            "slots=",
        ),
        (
            "memory",
            {"memory": {"total_gib": 99, "free_gib": 90, "shm_gib": 0.0625}},
            "/dev/shm",
            "--shm-size",
        ),
        ("shards", {"shards": {"digest": "cccc", "shards": 3}}, "b: manifest cccc, on a aaaa", "/shards"),
        ("shards", {"shards": {"error": "gone"}}, "b: gone", "mount or copy"),
        ("teachers", {"teachers": {"/t": "cccc"}}, "b: differ from those on a", "same folder"),
        ("run_folder", {"run_folder": {"error": "Read-only file system"}}, "b: Read-only", "--run.dir"),
        ("disk", {"run_folder": {"free_gib": 1.25}}, "b: 1.25 GiB free", "free 5.0 GiB"),
    ],
)
def test_faults(check: str, changed: dict[str, Any], seen: str, remedy: str) -> None:
    finding = judge(check, hosts(**changed))
    assert not finding.ok
    assert seen in finding.result
    assert remedy in finding.remedy


def test_first_host_at_fault() -> None:
    """What the first host lacks is its fault, and does not hide what the others have."""
    answers = {"a": {**HEALTHY, "shards": {"error": "no manifest"}}, "b": HEALTHY}
    assert "a: no manifest" in judge("shards", answers).result
    assert "data_prep/write_shards.py" in judge("shards", {"a": answers["a"]}).remedy


def test_an_answer_too_slow_to_judge_a_clock_by() -> None:
    assert judge("clock_ahead_s", hosts(clock_ahead_s=(-4.0, 0.5))).ok


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 8\n", "line 1: 'a 8' is not `NAME slots=GPUS`"),
        ("a slots=0\n", "is not `NAME"),
        ("a slots=1\na slots=2\n", "names a twice"),
        ("# none\n", "names no host"),
        ("\ufeffa slots=1\n", "begins with a byte order mark"),
        ("# all\na[1-2] slots=1\n", r"line 2: deepspeed takes 'a\[1-2\]' for one host; give each a line"),
        ("a slots=2x\n", "is not `NAME"),
        ("a slots= 2\n", "is not `NAME"),
    ],
)
def test_hostfiles_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_hostfile(str(tmp_path / "hosts"))


def test_hostfile(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# mine\n\na slots=8\nb slots=4 # smaller\n")
    assert read_hostfile(str(tmp_path / "hosts")) == [Host("a", 8), Host("b", 4)]
    (tmp_path / "windows").write_bytes(
        b"a\tslots=8\r\n\r\n  10.0.0.2   slots=4 max_slots=8\r\nfd00::3 slots=1#c"
    )
    assert read_hostfile(str(tmp_path / "windows")) == [
        Host("a", 8),
        Host("10.0.0.2", 4),
        Host("fd00::3", 1),
    ]
    with pytest.raises(ValueError, match="No such file"):
        doctor.main(["--hostfile", str(tmp_path / "none")])
    with pytest.raises(ValueError, match="has no effect beside --hostfile"):
        doctor.main(["--hostfile", str(tmp_path / "hosts"), "--num-gpus", "2"])
    (tmp_path / "utf-16").write_bytes("a slots=8\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"--hostfile .*/utf-16 is not UTF-8 .*; save it as UTF-8"):
        doctor.main(["--hostfile", str(tmp_path / "utf-16")])


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--ssh", "'x", '--ssh "\'x": no closing quotation; give a command'),
        ("--ssh", "", "--ssh '' is empty; give a command"),
        ("--master-port", "0", "--master-port 0 is no port: give a number from 1 to 65535"),
        ("--master-port", "65536", "--master-port 65536 is no port"),
        ("--master-port", "-1", "--master-port -1 is no port"),
    ],
)
def test_flags_refused(flag: str, value: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=8\nb slots=8\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        doctor.main(["--hostfile", str(tmp_path / "hosts"), f"{flag}={value}"])


def test_ssh_without_a_hostfile_is_refused() -> None:
    with pytest.raises(ValueError, match="--ssh 'ssh -p 7' has no effect without --hostfile"):
        doctor.main(["--ssh", "ssh -p 7"])


def test_env_file_that_is_no_text_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "variables").write_bytes(b"A=\xff\n")
    monkeypatch.setenv("DS_ENV_FILE", str(tmp_path / "variables"))
    with pytest.raises(ValueError, match=r"/variables is not UTF-8 \(byte 0xff at offset 2\)"):
        read_env_files()


@pytest.mark.parametrize(
    "changed",
    [
        "data_prep/write_shards.py",
        "train/lamb/native.c",
        "train/finetuning/__init__.py",
        "launch/reporting/page.html",
        "launch/pretrain.py",
        "launch/recipes/distilbert-base.yaml",
        "ds_configs/fp16.json",
    ],
)
def test_code_is_all_that_a_run_needs(changed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A byte more in any of them is other code; what Python leaves beside them is not."""
    for name in ("data_prep", "train", "launch", "ds_configs"):
        shutil.copytree(probe.ROOT / name, tmp_path / name)
    before = probe.code_digest()
    monkeypatch.setattr(probe, "ROOT", tmp_path)
    (tmp_path / "train" / "left.pyc").write_bytes(b"compiled")
    assert probe.code_digest() == before
    with (tmp_path / changed).open("a") as file:
        file.write("\n")
    assert probe.code_digest() != before


def test_a_host_without_packages_still_answers(tmp_path: Path) -> None:
    """Every fact is there: had, missing, or why it could not be had."""
    words = ["-S", "-m", "launch.preflight.probe", "facts", "--port", str(free_port())]
    words += [word for flag in ("--run-dir", "--shards", "--folder") for word in (flag, str(tmp_path))]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    answered = json.loads(done.stdout)
    more = {"address", "hostname", "port", "seen", "started_at", "ended_at"}
    assert answered.keys() == (HEALTHY.keys() - {"clock_ahead_s"}) | more
    assert answered["versions"]["torch"] == "missing"
    assert "No module named" in answered["variables"]["error"]
    assert answered["port"] == {}


def test_a_port_in_use_and_one_that_no_host_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "CONNECT_TIMEOUT_S", 0.3)
    with socket.create_server(("", 0)) as busy:
        assert probe.check_free(busy.getsockname()[1]) == {"error": "Address already in use"}
    port = free_port()
    assert probe.check_free(port) == {}
    assert probe.connect("127.0.0.1", port) == ("Connection refused", False)
    assert not probe.accept_all(port, 1)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(probe.accept_all, port, 2)
        others = [pool.submit(probe.connect, "127.0.0.1", port) for _ in range(2)]
        assert first.result()
        assert [other.result() for other in others] == [(None, True)] * 2
        # The third does not come.
        first = pool.submit(probe.accept_all, port, 2)
        assert probe.connect("127.0.0.1", port) == (None, False)
        assert not first.result()


def test_a_host_behind_a_firewall_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks are not waited for."""
    found = {
        "a": {"port": None, "ranks": []},
        "b": {"port": "No route to host", "ranks": []},
        "c": UnreachableError("gone"),
    }
    monkeypatch.setattr("launch.preflight.host_checks.ask_all", lambda *_: found)
    options = doctor.build_parser().parse_args([])
    facts = {"a": {"port": {}, "address": "10.0.0.1", "gpus": [], "torch": {"error": "none"}}}
    (port,) = check_network([Host(name, 1) for name in found], ["ssh"], facts, options)
    assert (port.check, port.ok) == ("port", False)
    assert port.result == "b to 10.0.0.1, port 29500: No route to host; c: gone"
    assert "open all ports between the hosts" in port.remedy


def test_disk_is_for_every_checkpoint_that_is_kept(tmp_path: Path) -> None:
    """fp16 weights, an fp32 master and two moments in each, and one in the making; the student in fp32 once."""
    from transformers import BertConfig, DistilBertConfig, DistilBertForMaskedLM

    BertConfig().save_pretrained(tmp_path)
    with torch.device("meta"):
        student = DistilBertForMaskedLM(DistilBertConfig())
    parameters = student.num_parameters()
    for keep_last in (1, 5):
        config = parse_config([f"--model.teacher={tmp_path}", f"--checkpoint.keep_last={keep_last}"], "")
        expected = parameters * (14 * (keep_last + 1) + 4) / 2**30
        assert needed_disk_gib(config) == pytest.approx(expected, rel=1e-6)


def test_disk_is_for_the_student_that_the_recipe_makes(tmp_path: Path) -> None:
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)

    def needed(*settings: str) -> float:
        return needed_disk_gib(
            parse_config([f"--model.teacher={tmp_path}", "--checkpoint.keep_last=9", *settings], "")
        )

    all_layers = f"--model.layer_map={list(range(12))}"
    assert needed(all_layers) == needed("--model.layer_map=random", "--model.student_layers=12")
    assert needed(all_layers) > needed()
    assert (
        needed("--model.layer_map=random", "--model.student_width=384", "--objective.projection=true")
        < needed()
    )


def test_teacher_that_overflows_at_a_late_token(teacher_folder: str, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(teacher_folder)
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight[CPU_TOKENS - 1] = 1e6
    model.save_pretrained(tmp_path)
    (finding,) = check_teacher(parse_config([f"--model.teacher={tmp_path}", "--data.sequence_length=32"], ""))
    assert not finding.ok
    assert "infinite or NaN logits in float16" in finding.result


def test_a_teacher_without_head_is_well_where_no_term_predicts_tokens(
    shards_folder: str, teacher_folder: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForMaskedLM

    shutil.copytree(teacher_folder, tmp_path / "bare")
    AutoModelForMaskedLM.from_pretrained(teacher_folder).base_model.save_pretrained(tmp_path / "bare")
    words = [*small_settings(shards_folder, teacher_folder), f"--model.teacher={tmp_path}/bare"]
    (finding,) = check_teacher(parse_config(words, ""))
    assert not finding.ok
    assert "has no MLM head" in finding.result + finding.remedy
    relations = [f"--objective.{term}_weight=0" for term in ("kd", "mlm", "cosine")]
    config = parse_config([*words, *relations, "--objective.relation_weight=1"], "")
    findings = [*check_teacher(config), check_tokenizer(config), *check_recipe(config, 2)]
    assert all(finding.ok for finding in findings), findings
    assert "no MLM head; float16 against fp32: 1 - cos" in findings[0].result
    words += ["--model.teacher=null", f"--model.start_from={tmp_path}/bare", "--objective.kd_weight=0"]
    words += ["--objective.cosine_weight=0", "--model.layer_map=distilbert"]
    for more, expected in ((["--model.new_head=true"], True), ([], False)):
        student = check_recipe(parse_config([*words, *more], ""), 2)[-1]
        assert student.ok == expected
    assert student.remedy == "give --model.new_head=true to put a new one on it"


def test_cluster_env_counts_as_a_ranks_environment(tmp_path: Path) -> None:
    (tmp_path / "cluster.env").write_text("# for all hosts\nexport HF_HOME=/there\nHF_TOKEN=file\n")
    found = probe.variables(["HF_HOME", "HF_TOKEN", "HF_NONE"], tmp_path, {"HF_TOKEN": "shell"})
    assert found == {"HF_HOME": "/there", "HF_TOKEN": "shell", "HF_NONE": None}


def test_this_machine_with_a_run_folder_in_a_file(
    teacher_folder: str, shards_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The probe as a plain subprocess; every check is well but the planted one."""
    (tmp_path / "file").write_text("in the way")
    words = [
        f"--data.shards={shards_folder}",
        f"--model.teacher={teacher_folder}",
        "--data.sequence_length=32",
    ]
    words += [
        "--model.layer_map=every_other",
        "--training.global_batch_size=32",
        "--training.micro_batch_size=8",
    ]
    words += [f"--run.dir={tmp_path / 'file' / 'run'}", "--skip-all-reduce", f"--master-port={free_port()}"]
    hub_logging.set_verbosity_warning()
    assert doctor.main(words) == 1
    assert hub_logging.get_verbosity() == hub_logging.ERROR  # no line for every question that is repeated
    said = capsys.readouterr().out
    failed = [line for line in said.splitlines() if "FAILED" in line]
    assert [line.split("│")[1].strip() for line in failed] == ["run folder", "disk"]
    assert "Not a directory" in " ".join(said.replace("│", " ").split())  # it may be broken in two lines
    assert "give --run.dir" in said
    assert "21 checks, 2 failed" in said


@pytest.mark.parametrize(
    ("script", "limit_s", "message"),
    [
        ("echo Permission denied >&2; exit 255", 30, "Permission denied"),
        ("exit 3", 30, "ended with code 3"),
        ("echo '{broken'; echo what >&2", 30, "what"),
        ("exec 1<&-; exec sleep 30", 1, "no answer within 1 s"),  # it outlives its probe
    ],
)
def test_a_host_without_an_answer(script: str, limit_s: float, message: str, tmp_path: Path) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(f"#!/bin/sh\n{script}\n")
    ssh.chmod(0o755)
    with pytest.raises(UnreachableError, match=message):
        ask("node1", [str(ssh)], ["facts"], limit_s)
    with pytest.raises(UnreachableError, match="no-such-ssh: No such file"):
        ask("node1", ["no-such-ssh"], ["facts"], limit_s)


@pytest.mark.parametrize(
    ("settings", "check", "message"),
    [
        (["--model.layer_map=[0,99]"], "student", r"names layers \[99\] that the teacher does not have"),
        (["--model.layer_map=distilbert"], "student", "of a 12-layer teacher"),
        (
            ["--model.student_width=33"],
            "student",
            "must be a multiple of its heads. width",
        ),
        (["--data.sequence_length=65"], "student", "positions for 64 tokens"),
        (
            ["--objective.layer_cosine_weight=1", "--objective.layer_pairs=[[1, 9]]"],
            "student",
            r"layer.*9|9.*layer",
        ),
        (["--deepspeed.config=/none.json"], "engine", "/none.json': no such file"),
        (["--training.global_batch_size=65536"], "steps", "fewer than one batch of 65536"),
        (["--schedule.warmup_steps=99999", "--training.max_steps=null"], "steps", "more than the run's"),
    ],
)
def test_a_recipe_that_would_be_refused(
    settings: list[str], check: str, message: str, shards_folder: str, teacher_folder: str
) -> None:
    words = [*small_settings(shards_folder, teacher_folder), *settings]
    assert needed_disk_gib(parse_config(words, "")) >= 1  # another check refuses it
    findings = {finding.check: finding for finding in check_recipe(parse_config(words, ""), 1)}
    assert [name for name, finding in findings.items() if not finding.ok] == [check]
    assert re.search(message, f"{findings[check].result}; {findings[check].remedy}")


@pytest.mark.parametrize(
    "settings",
    [
        ["--objective.layer_cosine_weight=1", "--objective.layer_pairs=[[1, 3]]"],
        ["--model.student_width=16", "--objective.projection=true"],
    ],
)
def test_a_recipe_that_would_be_taken(settings: list[str], shards_folder: str, teacher_folder: str) -> None:
    words = [*small_settings(shards_folder, teacher_folder), *settings]
    assert [f.result for f in check_recipe(parse_config(words, ""), 1) if not f.ok] == []


def test_a_corpus_that_holds_nothing_out_is_a_warning(
    shards_folder: str, teacher_folder: str, tmp_path: Path
) -> None:
    settings = small_settings(shards_folder, teacher_folder)
    findings = {finding.check: finding for finding in check_recipe(parse_config(settings, ""), 1)}
    assert re.fullmatch(r"\d+ windows of \d+ tokens", findings["held-out text"].result)
    manifest = Manifest.load(shards_folder)
    without = tmp_path / "shards"
    shutil.copytree(shards_folder, without)
    dataclasses.replace(manifest, splits={**manifest.splits, "heldout": ()}).save(without)
    settings = small_settings(str(without), teacher_folder)
    findings = {finding.check: finding for finding in check_recipe(parse_config(settings, ""), 1)}
    assert findings["held-out text"].ok
    assert "holds out no window of" in findings["held-out text"].result
    assert "--heldout-fraction" in findings["held-out text"].remedy


def test_a_recipe_whose_micro_batch_is_found_on_the_gpus(shards_folder: str, teacher_folder: str) -> None:
    words = [*small_settings(shards_folder, teacher_folder), "--training.micro_batch_size=auto"]
    assert all(finding.ok for finding in check_recipe(parse_config(words, ""), 1))


def test_gpus_that_are_not_wanted_are_a_warning() -> None:
    found = check_torch({"a": {"gpus": [GPU], "torch": {**ON_CPU, "asked": "cpu"}}}, {"a": 1})
    assert found.ok
    assert found.result == "DS_ACCELERATOR=cpu: the GPUs of a are left alone"
    assert found.remedy == "unset DS_ACCELERATOR to compute on them"


def test_what_torch_sees_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    facts = probe.torch_devices()
    assert (facts["kind"], facts["asked"]) == ("cpu", "")
    assert facts["devices"] == [{"name": "CPU", "fault": None}]
    assert facts["why"]
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    assert probe.torch_devices()["devices"][0]["fault"] == "a matrix product in torch.float32 is wrong"
