"""launch/doctor.py on two hosts that a stand-in for ssh plays on this machine: all well, and planted faults."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from launch.common.cli import parse_config
from launch.preflight.recipe_checks import check_run
from tests.distributed.pretraining import finish, small_settings
from tests.distributed.ranks.forked import Forked, run_script
from tests.paths import ROOT
from train.distributed.rendezvous import free_port

STAND_IN = f"{sys.executable} {ROOT / 'tests' / 'distributed' / 'ranks' / 'stand_in_ssh.py'}"


def prepare(
    folder: Path, hosts: str, recipe: list[str], faults: dict[str, Any], *more: str
) -> tuple[list[str], dict[str, str]]:
    """The command, to be typed in `folder`, and its environment; a pdsh is there that nobody calls."""
    (folder / "bin").mkdir()
    (folder / "bin" / "pdsh").touch(mode=0o755)
    (folder / "hosts").write_text(hosts)
    words = [str(ROOT / "launch" / "doctor.py"), "--hostfile", str(folder / "hosts"), "--ssh", STAND_IN]
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "FAULTS": json.dumps(faults), "OMP_NUM_THREADS": "1"}
    return [*words, *more, *recipe], environment


def run_doctor(
    folder: Path, hosts: str, recipe: list[str], faults: dict[str, Any], *more: str
) -> tuple[int, str]:
    """Exit code and all output."""
    words, environment = prepare(folder, hosts, recipe, faults, *more)
    return finish(Forked(run_script, *words, environment=environment, folder=folder))


@pytest.fixture
def recipe(teacher_folder: str, shards_folder: str, tmp_path: Path) -> list[str]:
    return [*small_settings(shards_folder, teacher_folder), f"--run.dir={tmp_path / 'runs' / 'mine'}"]


def rows(output: str) -> dict[str, str]:
    """Check -> what its row says, words joined by single spaces; a table's lines belong to the row before."""
    found: dict[str, str] = {}
    name = ""
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if len(cells) == 3:
            name = cells[0] or name
            found[name] = f"{found.get(name, '')} {cells[1]} {cells[2]}".strip()
    return {name: " ".join(text.split()) for name, text in found.items()}


def test_two_hosts_all_well(recipe: list[str], tmp_path: Path) -> None:
    """The variable arrives by the file alone that lies where the command is typed."""
    (tmp_path / "cluster.env").write_text("HF_HUB_DISABLE_TELEMETRY=1\n")
    faults = {name: {"forget": ["HF_HUB_DISABLE_TELEMETRY"]} for name in ("localhost", "hostb")}
    port = str(free_port())
    hosts = "localhost slots=1\nhostb slots=1  # by stand-in\n"
    words, environment = prepare(tmp_path, hosts, recipe, faults, "--master-port", port)
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    table = rows(done.stdout)
    assert all(text.startswith("ok ") for text in table.values()), done.stdout
    assert "localhost, hostb" in table["reach"]
    assert "2 ranks, right" in table["all-reduce (gloo)"]
    assert "32 = 8 x 2 x 2 ranks" in table["batch arithmetic"]
    assert "MLM head; float16 against fp32" in table["teacher"]
    assert "seen by every host" in table["shared run folder"]
    assert "ServerAliveInterval is at most 15 s" in table["ssh keep-alive"]
    assert "cpu.json (the default here): ZeRO stage 2, fp32" in table["engine"]
    assert "24, " in table["steps"]
    assert "distilbert, 2 layers of width 32" in table["student"]
    assert re.match(r"ok .*… is new|ok .*mine is new", table["run"])  # a long path is shortened
    assert re.match(
        r"ok torch 2\S+ computes on the CPU; a matrix product on each device is right",
        table["torch's devices"],
    )
    assert len(table) == 26
    assert not (tmp_path / "runs").exists()  # it leaves nothing behind
    assert not done.stderr.strip()


def test_own_host_must_be_reached_over_ssh(recipe: list[str], tmp_path: Path) -> None:
    """`deepspeed` with several hosts starts nothing on its own host otherwise."""
    hosts = "localhost slots=1\nhostb slots=1\n"
    port = str(free_port())
    more = ("--skip-all-reduce", "--master-port", port)
    code, output = run_doctor(tmp_path, hosts, recipe, {"localhost": "unreachable"}, *more)
    assert code == 1, output
    table = rows(output)
    assert table["reach"].startswith("FAILED localhost: ssh: connect to host localhost port 22: No route")
    assert "ssh-copy-id localhost" in table["reach"]
    assert "ssh keep-alive" in table
    assert "1 failed" in output


def test_one_host_in_the_hostfile(recipe: list[str], tmp_path: Path) -> None:
    """`deepspeed` wants ssh to it, but starts its ranks without, with the variables that are set here."""
    os.environ["HF_PLANTED"] = "1"
    faults: dict[str, Any] = {"localhost": {"alive": 0, "forget": ["HF_PLANTED"]}}
    more = ("--skip-all-reduce", "--master-port", str(free_port()))
    try:
        code, output = run_doctor(tmp_path, "localhost slots=1\n", recipe, faults, *more)
    finally:
        del os.environ["HF_PLANTED"]
    assert code == 0, output
    assert "all well\n" in output
    table = rows(output)
    assert not {"forwarded variables", "ssh keep-alive"} & set(table)
    assert table["single host"] == "ok localhost is this machine"


def test_a_hub_that_does_not_answer_is_asked_once(shards_folder: str, tmp_path: Path) -> None:
    """Not six times with 23 s of waiting, and no word but the table's."""
    asked = []

    class Unwell(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_error(503)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Unwell) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "launch/doctor.py", "--skip-all-reduce", "--master-port", str(free_port())]
        command += [f"--data.shards={shards_folder}", "--model.teacher=some/teacher"]
        command += [f"--run.dir={tmp_path / 'run'}"]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=environment, timeout=240)
        server.shutdown()
    assert done.returncode == 1, done.stdout + done.stderr
    assert not done.stderr.strip()
    assert asked == ["/some/teacher/resolve/main/config.json"] * 2  # for the tokenizer and for the teacher
    table = rows(done.stdout)
    for check in ("teacher", "tokenizer and shards"):
        assert (
            "FAILED model.teacher='some/teacher': no folder of that name here, not in the hub's cache, and "
            in (table[check])
        )
        assert endpoint in table[check]
        assert (
            "-> give a folder, or download it where there is internet: hf download some/teacher"
            in table[check]
        )


def plant(folder: Path, teacher_folder: str, shards_folder: str) -> dict[str, Any]:
    """A teacher without head, other shards, a file of variables that DeepSpeed cannot read; and the hosts' faults."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    BertModel(BertConfig.from_pretrained(teacher_folder)).save_pretrained(folder / "headless")
    other_shards = shutil.copytree(shards_folder, folder / "other-shards")
    manifest = json.loads((other_shards / "manifest.json").read_text())
    manifest["sources"] = []
    (other_shards / "manifest.json").write_text(json.dumps(manifest))
    (folder / "deepspeed_env").write_text("# a comment\nA=1\n")
    of_b: dict[str, Any] = {"shards": str(other_shards), "clock": -120, "package": ["torch", "2.0.0"]}
    of_b |= {"disk": 0.01, "blind": True, "alive": 0}
    return {"localhost": {"alive": 0, "forget": ["HF_PLANTED"]}, "hostb": of_b, "hostc": "unreachable"}


def test_planted_faults(recipe: list[str], tmp_path: Path, teacher_folder: str, shards_folder: str) -> None:
    """Eleven at once, each reported with its remedy."""
    faults = plant(tmp_path, teacher_folder, shards_folder)
    # As a user may have them; the stand-in passes them on.
    os.environ.update(GLOO_SOCKET_IFNAME="lo", HF_PLANTED="1")
    recipe = [*recipe, f"--model.teacher={tmp_path / 'headless'}"]
    try:
        os.environ["DS_ENV_FILE"] = str(tmp_path / "deepspeed_env")
        with socket.socket() as busy:
            busy.bind(("", 0))
            busy.listen()
            port = str(busy.getsockname()[1])
            hosts = "localhost slots=1\nhostb slots=1\nhostc slots=1\n"
            code, output = run_doctor(tmp_path, hosts, recipe, faults, "--master-port", port)
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"], os.environ["HF_PLANTED"], os.environ["DS_ENV_FILE"]
    assert code == 1, output
    table = rows(output)
    expected = {
        "reach": ("hostc: ssh: connect to host hostc port 22: No route to host", "ssh-copy-id hostc"),
        "python and packages": ("hostb: torch 2.0.0 (first host: 2.13", "pip install -r requirements.txt"),
        "clock": ("hostb: -11", "chronyd"),  # 120 s less what ssh and Python take to start
        "shards": ("hostb: manifest", "every host must see the same shards"),
        "disk": ("hostb: 0.01 GiB free", "free 1.0 GiB for checkpoints"),
        "shared run folder": ("hostb cannot see", "must be one folder"),
        "port": ("Address already in use", "--master_port"),
        ".deepspeed_env": ("line 1: '# a comment'", "NAME=VALUE lines alone"),
        "forwarded variables": ("HF_PLANTED on localhost ", "into cluster.env"),
        "batch arithmetic": ("a world size of 3 does not fit", "use a world size of 1, 2, 4"),
        "teacher": ("has no MLM head", "saved with its masked-language-model head"),
    }
    for check, (seen, remedy) in expected.items():
        assert table[check].startswith("FAILED "), check
        for words in (seen, remedy):
            assert words.replace(" ", "") in table[check].replace(" ", ""), (check, table[check])
    well = ("code", "memory", "run folder", "GPUs and drivers", "tokenizer and shards", "teacher's files")
    well += ("torch's devices",)
    assert [name for name in well if not table[name].startswith("ok")] == []
    assert table["ssh keep-alive"].startswith(
        "look ServerAliveInterval is 0 for localhost, hostb: `deepspeed` would wait"
    ), table
    assert "ServerAliveInterval 5" in table["ssh keep-alive"]
    assert set(table) == {
        *expected,
        *well,
        "ssh keep-alive",
        "pdsh",
        "run",
    }  # no ranks where the port is taken
    assert "11 failed, 1 to look at" in output


def test_a_run_folder_that_is_there_is_compared(
    undisturbed: Path, settings: list[str], tmp_path: Path
) -> None:
    """As launch/pretrain.py would: changed settings and shards are refused, a finished run has nothing to train."""
    words = [*settings, f"--run.dir={undisturbed}"]
    found = check_run(parse_config(words, ""))
    assert found.ok
    assert found.result == f"{undisturbed} is finished"
    assert "give another run.dir" in found.remedy
    changed = check_run(parse_config([*words, "--optimizer.lr=0.125"], ""))
    assert not changed.ok
    assert "optimizer.lr: " in changed.result
    assert "-> 0.125" in changed.result
    assert check_run(
        parse_config([*words, "--optimizer.lr=0.125", "--checkpoint.allow_changed_config=true"], "")
    ).ok
    engine = tmp_path / "engine.json"
    engine.write_text('{"zero_optimization": {"stage": 1}}')
    assert (
        "other contents of deepspeed.config"
        in check_run(parse_config([*words, f"--deepspeed.config={engine}"], "")).result
    )
    longer = [*words, "--training.max_steps=28", "--checkpoint.allow_changed_config=true"]
    goes_on = check_run(parse_config(longer, ""))
    assert goes_on.ok
    assert "goes on from step 24, with another configuration:\ntraining.max_steps: 24 -> 28" in goes_on.result
    assert not goes_on.remedy
    begun = shutil.copytree(undisturbed, tmp_path / "begun")
    (begun / "summary.json").unlink()
    words[-1] = f"--run.dir={begun}"
    assert re.fullmatch(rf"{begun} goes on from step \d+", check_run(parse_config(words, "")).result)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.yaml", "a: [", "config.yaml is damaged"),
        ("config.yaml", "", "config.yaml is damaged"),
        ("inputs.json", "{", "inputs.json is damaged"),
        ("summary.json", "{", "summary.json is damaged"),
        ("summary.json", "[]", "summary.json is damaged"),
    ],
)
def test_a_damaged_run_folder_is_one_line_of_the_table(
    name: str, content: str, expected: str, undisturbed: Path, settings: list[str], tmp_path: Path
) -> None:
    run_dir = shutil.copytree(undisturbed, tmp_path / "run")
    (run_dir / name).write_text(content)
    found = check_run(parse_config([*settings, f"--run.dir={run_dir}"], ""))
    assert not found.ok
    assert expected in found.result
    assert found.remedy == "restore it, or give another run.dir"


@pytest.mark.parametrize("content", ["{", "[]", '{"files": {}}'])
def test_damaged_checkpoints_are_told(
    content: str, undisturbed: Path, settings: list[str], tmp_path: Path
) -> None:
    run_dir = shutil.copytree(undisturbed, tmp_path / "run")
    (run_dir / "summary.json").unlink()
    newest, *others = sorted((run_dir / "checkpoints").glob("step-*/complete.json"), reverse=True)
    newest.write_text(content)
    found = check_run(parse_config([*settings, f"--run.dir={run_dir}"], ""))
    assert found.ok
    assert found.result == f"{run_dir} goes on from step {int(others[0].parent.name[5:])}"
    assert f"{newest.parent} is passed over" in found.remedy
