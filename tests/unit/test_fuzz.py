"""A short round of tests/fuzz.py over every class, always the same; and that it finds what it is there to find."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

from tests.fuzzing.classes import CLASSES
from tests.fuzzing.rounds import fuzz, prepare
from tests.fuzzing.target import BAD, Outcome, Target
from train.errors import UserError

TRIES = 25


def tried(target: Target, folder: Path, tries: int) -> list[Outcome]:
    """Seed 0, which damages nothing, and those after it."""
    found: list[Outcome] = []
    prepared = prepare(target, folder)
    fuzz([(prepared, range(tries))], folder, 1, lambda target, seed, outcome: found.append(outcome))
    assert len(found) == tries
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_damaged_inputs_are_read_rightly_or_refused(name: str, tmp_path: Path) -> None:
    found = tried(CLASSES[name], tmp_path, TRIES)
    assert [outcome for outcome in found if outcome.kind in BAD] == []
    assert found[0].kind == "accepted"


def read_badly(folder: Path) -> str:
    """A reader with a fault of each kind, by the length of what it reads."""
    text = (folder / "file.txt").read_bytes()
    if len(text) == 8:
        return "whole"
    if len(text) > 20:
        time.sleep(60)
    if len(text) > 8:
        raise KeyError(len(text))
    if not text:
        raise UserError("something is wrong; give something else")
    return "less"


def test_every_kind_of_bad_outcome_is_found(tmp_path: Path) -> None:
    target = Target(
        "bad", lambda folder: (folder / "file.txt").write_text("12345678"), read_badly, timeout_s=0.3
    )
    kinds = Counter(outcome.kind for outcome in tried(target, tmp_path, 60))
    assert min(kinds[kind] for kind in BAD) > 0, kinds
    assert kinds["accepted"] > 1
    assert sorted(tmp_path.glob("bad-*.json"))
    assert (tmp_path / sorted(tmp_path.glob("bad-*.json"))[0].stem).is_dir()
