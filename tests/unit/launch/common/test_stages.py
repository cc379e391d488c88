"""Commands that start others: DeepSpeed's launcher is a module, and a Ctrl-C reaches the ranks, not the launcher."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import pty
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from launch.common import stages
from tests.paths import ROOT

LAUNCHER = {
    "runner": """
        import subprocess, sys
        started = subprocess.Popen([sys.executable, "-u", "-m", "deepspeed.launcher.launch", *sys.argv[1:]])
        sys.exit(started.wait())
    """,
    "launch": """
        import subprocess, sys
        ranks = [subprocess.Popen([sys.executable, "-u", sys.argv[-1], str(rank)]) for rank in range(2)]
        sys.exit(max(rank.wait() for rank in ranks))
    """,
}
"""As DeepSpeed's two processes are, without its six seconds."""
RANK = """
import signal, sys, time
def save(number, frame):
    time.sleep(0.1)
    if sys.argv[1] == "0":
        print("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("training")
time.sleep(30)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """In which `deepspeed` is the stand-in."""
    folder = tmp_path / "deepspeed" / "launcher"
    folder.mkdir(parents=True)
    for package in (folder.parent, folder):
        (package / "__init__.py").touch()
    for name, code in LAUNCHER.items():
        (folder / f"{name}.py").write_text("\n".join(line[8:] for line in code.splitlines()))
    (tmp_path / "rank.py").write_text(RANK)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def test_the_launcher_is_a_module_and_no_file_beside_python(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In an image or a layered environment the command `deepspeed` lies elsewhere."""
    words = stages.deepspeed_words(2)
    assert words[1:3] == ["-m", "deepspeed.launcher.runner"]
    (package,) = importlib.util.find_spec("deepspeed").submodule_search_locations  # type: ignore[union-attr, misc]
    assert Path(package, "launcher", "runner.py").is_file()
    assert not [word for word in words[1:] if Path(word).is_absolute()]


def test_ctrl_c_lets_the_ranks_save_and_the_launcher_end_by_itself(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """On a terminal, whose Ctrl-C goes to everything in its foreground."""
    terminal, theirs = pty.openpty()
    job = subprocess.Popen(
        [sys.executable, "-m", "launch", str(tmp_path / "rank.py")],
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    output, deadline = b"", time.monotonic() + 30
    while output.count(b"training") < 2 and time.monotonic() < deadline:
        output += os.read(terminal, 1000)
    os.write(terminal, b"\x03")
    after = b""
    while time.monotonic() < deadline:
        try:
            after += os.read(terminal, 1000)
        except OSError:  # Linux's way to say that nobody writes any more
            break
    os.close(terminal)
    assert job.wait(30) == 75
    assert after.replace(b"^C", b"").split() == [b"saved"]


def test_a_stop_before_there_are_ranks_ends_the_launcher(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(30)"
    (tmp_path / "deepspeed" / "launcher" / "runner.py").write_text(slow)
    started = time.monotonic()
    assert stages.run_stage([*stages.LAUNCHER, "x.py"], environment) == 75
    assert time.monotonic() - started < 20
