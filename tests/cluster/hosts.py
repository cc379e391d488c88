"""Two hosts on one machine: network namespaces with a link between them, own names, addresses, processes, sshd.

Nothing outside a temporary folder is touched, the user's ~/.ssh least of all: an `ssh` that comes first in PATH
reads the folder's own configuration, keys and known hosts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.paths import ROOT

SSHD = shutil.which("sshd", path="/usr/sbin:/sbin:" + os.environ.get("PATH", "")) or "sshd"
SECONDS_TO_START = 20


class Hosts:
    """host-a (10.213.0.1) and host-b (10.213.0.2), while the context is open."""

    names = ("host-a", "host-b")
    addresses = ("10.213.0.1", "10.213.0.2")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hostfile = folder / "hosts"
        self._spaces = [f"halfling-{os.getpid()}-{name}" for name in self.names]
        self._boots: dict[str, subprocess.Popen[bytes]] = {}
        self._device = "eth0"

    def __enter__(self) -> Hosts:
        self.folder.mkdir(parents=True)
        try:
            self._write_ssh_files()
            for space in self._spaces:
                _run("ip", "netns", "add", space)
            self._connect()
            for name in self.names:
                self.start(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._boots):
            self.kill_processes(name)
        for space in self._spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)

    def command(self, name: str, *words: str) -> list[str]:
        """`words` as a command on that host."""
        (init,) = psutil.Process(self._boots[name].pid).children()
        enter = ["nsenter", "--target", str(init.pid), "--net", "--uts", "--pid", "--mount"]
        return ["taskset", "--cpu-list", self._core(name), *enter, "--", "env", "--chdir", str(ROOT), *words]

    def environment(self) -> dict[str, str]:
        """A user's environment on any of the hosts; nothing of it reaches the others by itself."""
        path = os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"], "/usr/sbin", "/sbin"])
        return {"PATH": path, "HOME": str(self.folder / "home")}

    def cut(self, name: str) -> None:
        """Pull the host's cable."""
        self.link(name, "down")

    def kill(self, name: str) -> None:
        """Power off: the host answers nobody any more, and all its processes end."""
        self.cut(name)
        self.kill_processes(name)

    def kill_processes(self, name: str) -> None:
        """All of the host's processes end, sshd among them; its address still answers (that nobody listens)."""
        boot = self._boots.pop(name)
        for init in psutil.Process(boot.pid).children():
            init.kill()  # a process namespace's first process takes all others with it
        boot.wait()

    def start(self, name: str) -> None:
        """Power on."""
        self.link(name, "up")
        space = self._space(name)
        boot = f"hostname {name} && mount --bind {self.folder}/{name}.etc_hosts /etc/hosts && "
        boot += "mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && "  # sshd wants it; systemd makes it elsewhere
        boot += f"exec {SSHD} -D -e -f {self.folder}/{name}.sshd_config"
        own = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", boot]
        log = (self.folder / f"{name}.log").open("ab")
        self._boots[name] = subprocess.Popen(
            # Not `ip netns exec`: it mounts a new /sys, without the control groups that slurmd looks for.
            ["taskset", "--cpu-list", self._core(name), "nsenter", f"--net=/run/netns/{space}", *own],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        log.close()
        deadline = time.monotonic() + SECONDS_TO_START
        ssh = [str(self.folder / "bin" / "ssh"), name, "true"]
        while subprocess.run(
            ["ip", "netns", "exec", space, *ssh], capture_output=True, check=False
        ).returncode:
            assert time.monotonic() < deadline, (self.folder / f"{name}.log").read_text()
            time.sleep(0.1)

    def link(self, name: str, state: str) -> None:
        """Set the host's link up or down."""
        space = self._space(name)
        _run("ip", "-n", space, "link", "set", self._device, state)

    @contextmanager
    def slow_link(self, delay_s: float, rate: str) -> Iterator[None]:
        """A cable with that delay each way and that rate (in tc's words: "50mbit") in place of the fast link."""
        words = [sys.executable, "-m", "tests.cluster.cable", *self._spaces, str(delay_s)]
        cable = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE)
        try:
            assert cable.stdout is not None
            assert cable.stdout.readline() == b"ready\n"
            self._use("cable0", instead_of="eth0")
            for space in self._spaces:
                limit = ["tbf", "rate", rate, "burst", "32kb", "latency", "400ms"]
                _run("tc", "-n", space, "qdisc", "add", "dev", "cable0", "root", *limit)
            yield
        finally:
            self._use("eth0", instead_of="cable0")
            cable.kill()
            cable.wait()

    def _use(self, device: str, instead_of: str) -> None:
        self._device = device
        for space, address in zip(self._spaces, self.addresses, strict=True):
            _run("ip", "-n", space, "address", "flush", "dev", instead_of)
            _run("ip", "-n", space, "address", "add", f"{address}/24", "dev", device)
            _run("ip", "-n", space, "link", "set", device, "up")

    def _core(self, name: str) -> str:
        return str(self.names.index(name) % (os.cpu_count() or 1))

    def _space(self, name: str) -> str:
        return self._spaces[self.names.index(name)]

    def _connect(self) -> None:
        a, b = self._spaces
        _run("ip", "-n", a, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", b)
        for space, address in zip(self._spaces, self.addresses, strict=True):
            _run("ip", "-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", space, "link", "set", "lo", "up")

    def _write_ssh_files(self) -> None:
        folder = self.folder
        _keygen(folder / "user_key")
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        known, client = "", ""
        for name, address in zip(self.names, self.addresses, strict=True):
            _keygen(folder / f"{name}.key")
            # As Debian's installer writes it: a host's own name leads to a loopback address.
            others = "".join(
                f"{a} {n}\n" for n, a in zip(self.names, self.addresses, strict=True) if n != name
            )
            (folder / f"{name}.etc_hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{others}")
            known += f"{address} {(folder / f'{name}.key.pub').read_text()}"
            client += f"Host {name}\n    HostName {address}\n"
            (folder / f"{name}.sshd_config").write_text(
                f"ListenAddress {address}\nHostKey {folder}/{name}.key\nPidFile none\n"
                f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
                f"PermitRootLogin prohibit-password\nPasswordAuthentication no\nSetEnv HOME={folder}/home\n"
            )
        (folder / "known_hosts").write_text(known)
        client += f"Host *\n    IdentityFile {folder}/user_key\n    IdentitiesOnly yes\n    BatchMode yes\n"
        client += f"    UserKnownHostsFile {folder}/known_hosts\n    StrictHostKeyChecking yes\n"
        client += "    ConnectTimeout 5\n    User root\n"
        # pdsh waits for an ssh whose host has gone silent, unless ssh looks (docs/CLUSTER.md).
        client += "    ServerAliveInterval 2\n    ServerAliveCountMax 2\n"
        (folder / "ssh_config").write_text(client)
        (folder / "bin").mkdir()
        (folder / "home").mkdir()
        wrapper = folder / "bin" / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)
        self.hostfile.write_text("".join(f"{name} slots=1\n" for name in self.names))


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


def _keygen(path: Path) -> None:
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path))
