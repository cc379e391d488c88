"""What a host finds out about itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.preflight import probe
from launch.preflight.checks import check_all_reduce
from tests.paths import ROOT
from tests.unit.launch.preflight.answers import HEALTHY
from train.distributed.rendezvous import free_port, own_address


@pytest.mark.parametrize(
    "changed",
    [
        "data_prep/write_shards.py",
        "train/lamb/native.c",
        "train/objective/vectors.h",
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


def test_the_address_is_the_one_that_deepspeed_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of `hostname -I`, whatever the default route's is."""
    (tmp_path / "hostname").write_text("#!/bin/sh\necho '10.1.0.7 10.2.0.7 '\n")
    (tmp_path / "hostname").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}")
    assert probe.address() == "10.1.0.7"
    monkeypatch.setenv("PATH", "")
    assert probe.address() == own_address()


def test_cluster_env_counts_as_a_ranks_environment(tmp_path: Path) -> None:
    (tmp_path / "cluster.env").write_text("# for all hosts\nexport HF_HOME=/there\nHF_TOKEN=file\n")
    found = probe.variables(["HF_HOME", "HF_TOKEN", "HF_NONE"], tmp_path, {"HF_TOKEN": "shell"})
    assert found == {"HF_HOME": "/there", "HF_TOKEN": "shell", "HF_NONE": None}


def test_figures_of_a_rank_come_last_whatever_nccl_prints_after_them() -> None:
    figures = '{"right": true, "gb_per_s": 2.0, "megabytes": 268.4}'
    nccl = "host:7:7 [0] NCCL INFO comm 0x55d5 rank 0 nranks 8 cudaDev 0 - Destroy COMPLETE"
    for after in ([], [nccl], [nccl] * 30):
        output = probe._end_of_output("\n".join(["NCCL version 2.27", figures, *after]) + "\n")
        assert "2.00 GB/s" in check_all_reduce([{"code": 0, "output": output}], "all-reduce", False).result
    assert probe._end_of_output("x" * 2000 + "\nConnection refused\n").endswith("x\nConnection refused")


def test_what_torch_sees_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    facts = probe.torch_devices()
    assert (facts["kind"], facts["asked"]) == ("cpu", "")
    assert facts["devices"] == [{"name": "CPU", "fault": None}]
    assert facts["why"]
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    assert probe.torch_devices()["devices"][0]["fault"] == "a matrix product in torch.float32 is wrong"
