"""Hostfiles, hosts that do not answer, ports: what launch/doctor.py asks of others."""

from __future__ import annotations

import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launch import doctor
from launch.preflight import probe
from launch.preflight.host_checks import check_network, read_env_files
from launch.preflight.hosts import Host, UnreachableError, ask, read_hostfile
from train.distributed.rendezvous import free_port


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
    assert read_hostfile(str(tmp_path / "windows")) == [Host("a", 8), Host("10.0.0.2", 4), Host("fd00::3", 1)]
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
        if socket.has_dualstack_ipv6():
            first = pool.submit(probe.accept_all, port, 1)
            assert probe.connect("::1", port) == (None, True)
            assert first.result()
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
