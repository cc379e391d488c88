"""The system's clock may jump by hours, and differs from host to host: no duration, order or decision rests on it."""

from __future__ import annotations

import re
import time

import psutil
import pytest

from tests.paths import ROOT
from train.loop.startup_timing import StartupTimer

WALL = re.compile(
    r"\btime\.(?:time|time_ns|localtime|gmtime|ctime)\(|\bdatetime\.(?:now|today|utcnow)|st_[mac]time|getmtime"
)
ALLOWED = {
    "data_prep/passes/source_files.py": "a file of another time is compared by content",
    "launch/experiments/study_records.py": "the day on which a score was taken",
    "launch/preflight/hosts.py": "compares the hosts' clocks",
    "launch/preflight/probe.py": "compares the hosts' clocks",
    "train/data/shard_cache.py": "age of what a killed process left; a wrong one costs a copy",
}


def test_the_wall_clock_is_read_where_it_is_meant() -> None:
    found = {
        str(path.relative_to(ROOT))
        for folder in ("data_prep", "train", "launch")
        for path in (ROOT / folder).rglob("*.py")
        if WALL.search(path.read_text())
    }
    assert found == set(ALLOWED)


@pytest.mark.parametrize("jump_s", [-7200.0, 7200.0])
def test_a_jump_of_the_clock_is_no_part_of_the_start_up(
    jump_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    lived = time.time() - psutil.Process().create_time()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + jump_s)
    timer = StartupTimer()
    timer.ended("imports")
    assert timer.seconds["imports"] == pytest.approx(lived, abs=2)
