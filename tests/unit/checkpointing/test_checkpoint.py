"""Checkpoints on disk: which one a start goes on from, what is found of damage, and how one is removed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train.checkpointing.checkpoint import Checkpointer, Retention, _remove, newest_checkpoint
from train.checkpointing.integrity import (
    COMPLETE,
    checkpoint_fault,
    content_fault,
    read_facts,
    record_own_files,
    write_facts,
)
from train.checkpointing.state import TrainState
from train.errors import CheckpointNotWrittenError, UserError

WORLD_SIZE = 2


def make_checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"step-{step:08d}"
    (path / "student-config").mkdir(parents=True)
    (path / "student-config" / "config.json").write_text('{"model_type": "bert"}')
    shapes = {
        "param_shapes": [{"weight": torch.Size([1, 2])}],
        "frozen_param_shapes": {"bias": torch.Size([1])},
    }
    torch.save({"weights": torch.ones(25) * step, **shapes}, path / "mp_rank_00_model_states.pt")
    records = {}
    for rank in range(WORLD_SIZE):
        torch.save(
            {"moments": torch.ones(25) * rank}, path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
    for rank in range(WORLD_SIZE):
        records |= record_own_files(path, rank, WORLD_SIZE)
    write_facts(path, step, WORLD_SIZE, records, heldout_mlm_loss=4.5)
    return path


def without_digests(path: Path) -> Path:
    """As checkpoints were written before they had digests."""
    tree = json.loads((path / COMPLETE).read_text())
    (path / COMPLETE).write_text(
        json.dumps({name: tree[name] for name in tree if name not in ("sha256", "digest")})
    )
    return path


def change(path: Path, edit: Callable[[bytes], bytes]) -> None:
    path.write_bytes(edit(path.read_bytes()))


def test_newest_whole_checkpoint_wins(tmp_path: Path) -> None:
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) is None
    older, newer = make_checkpoint(tmp_path, 5), make_checkpoint(tmp_path, 10)
    assert newest_checkpoint(tmp_path, said.append) == newer
    assert said == []
    weights = newer / "mp_rank_00_model_states.pt"
    size = weights.stat().st_size
    change(weights, lambda content: content[:-1])
    assert newest_checkpoint(tmp_path, said.append) == older
    assert len(said) == 1
    assert f"mp_rank_00_model_states.pt has {size - 1} bytes instead of {size}" in said[0]


def test_missing_file_or_list_is_passed_over(tmp_path: Path) -> None:
    said: list[str] = []
    (make_checkpoint(tmp_path, 1) / "student-config/config.json").unlink()
    (make_checkpoint(tmp_path, 2) / COMPLETE).unlink()
    (make_checkpoint(tmp_path, 3) / COMPLETE).write_text('{"files": ')
    (make_checkpoint(tmp_path, 4) / COMPLETE).write_text("[" * 100_000)
    assert newest_checkpoint(tmp_path, said.append) is None
    found = ["nested too deeply", f"{COMPLETE} is damaged", "missing or unreadable", "config.json is missing"]
    assert [words in line for words, line in zip(found, said, strict=True)] == [True] * 4


@pytest.mark.parametrize(
    ("name", "is_read"),
    [
        ("mp_rank_01_model_states.pt", True),
        ("copy_optim_states.pt", True),
        ("zero_pp_rank_1_mp_rank_00_optim_states.pt.bak", True),
        ("student-config/added_tokens.json", True),
        ("notes.txt", False),
        ("student-config/.nfs0001", False),
    ],
)
def test_a_file_put_beside_those_of_a_checkpoint(tmp_path: Path, name: str, is_read: bool) -> None:
    """DeepSpeed loads and converts what fits its patterns: it would be part of the model without a word."""
    path, said = make_checkpoint(tmp_path, 5), []
    (path / name).write_bytes(b"x")
    assert newest_checkpoint(tmp_path, said.append) == (None if is_read else path)
    fault = f"{name} does not belong to it; take that file out of the folder"
    assert said == ([f"{path} is passed over: {fault}"] if is_read else [])


def test_a_list_of_impossible_names_is_passed_over(tmp_path: Path) -> None:
    said: list[str] = []
    for step, name in enumerate(("x" * 5000, "/etc/hostname", "../up", "zero_pp_rank_" + "9" * 5000 + "_")):
        path = without_digests(make_checkpoint(tmp_path, step))
        (path / COMPLETE).write_text(json.dumps({"step": step, "world_size": 1, "files": {name: 1}}))
    assert newest_checkpoint(tmp_path, said.append) is None
    assert all(" is passed over: " in line for line in said)


def test_a_flipped_bit_of_any_file_is_found(tmp_path: Path) -> None:
    """It is named, and the step before is used. tests/flip_bits.py tries more, on a real run's checkpoint."""
    older, newer = make_checkpoint(tmp_path, 5), make_checkpoint(tmp_path, 10)
    files = sorted(path for path in newer.rglob("*") if path.is_file())
    rng = random.Random(0)
    for _ in range(100):
        file, said = rng.choice(files), []
        whole = file.read_bytes()
        place, bit = rng.randrange(len(whole)), rng.randrange(8)
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        found = newest_checkpoint(tmp_path, said.append)
        assert (found, len(said)) == (older, 1), (file, place, bit, said)
        assert said[0].startswith(f"{newer} is passed over: "), said
        assert file.name in said[0], said
        file.write_bytes(whole)
    assert newest_checkpoint(tmp_path, pytest.fail) == newer


def test_a_step_copied_over_another_is_passed_over(tmp_path: Path) -> None:
    older, newer = make_checkpoint(tmp_path, 5), make_checkpoint(tmp_path, 10)
    shutil.rmtree(newer)
    shutil.copytree(older, newer)
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) == older
    assert said == [
        f"{newer} is passed over: it holds step 5, copied over it; remove that checkpoint, or restore it"
    ]
    assert checkpoint_fault(older.rename(tmp_path / "best")) is None


def test_each_rank_answers_for_its_share(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 5)
    facts = read_facts(path)
    for ranks in (1, 2, 3):
        shares = [facts.share(rank, ranks) for rank in range(ranks)]
        assert sorted(name for share in shares for name in share) == sorted(facts.files)
    change(path / "zero_pp_rank_1_mp_rank_00_optim_states.pt", lambda content: content[:-1] + b"x")
    assert content_fault(path, facts, 0, 2) is None
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt is damaged" in (content_fault(path, facts, 1, 2) or "")


def test_checkpoints_of_before_there_were_digests_are_read(tmp_path: Path) -> None:
    """By size, and by the checksums of the archives that torch writes."""
    older, newer = (
        without_digests(make_checkpoint(tmp_path, 5)),
        without_digests(make_checkpoint(tmp_path, 10)),
    )
    assert newest_checkpoint(tmp_path, pytest.fail) == newer
    weights = torch.full((1,), 10.0).numpy().tobytes()
    change(newer / "mp_rank_00_model_states.pt", lambda content: content.replace(weights, b"abcd", 1))
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) == older
    assert "mp_rank_00_model_states.pt is damaged (the checksum of mp_rank_00_model_states/data/0" in said[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [("step", "ten"), ("world_size", 0), ("files", [1]), ("files", {"/dev/zero": 0}), ("files", {"../a": 0})],
)
def test_a_list_of_something_else_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    path = without_digests(make_checkpoint(tmp_path, 5))
    change(path / COMPLETE, lambda content: json.dumps({**json.loads(content), key: value}).encode())
    with pytest.raises(UserError, match=rf"{COMPLETE} is damaged \({key}.*\); remove that checkpoint"):
        read_facts(path)


def test_retention_reads_the_facts(tmp_path: Path) -> None:
    paths = [make_checkpoint(tmp_path, step) for step in (9, 6, 4)]
    assert Retention(keep_last=1).superfluous(paths) == [paths[1], paths[2]]
    assert Retention(keep_last=1, milestone_every_steps=2).superfluous(paths) == []


def test_a_folder_still_being_written_is_not_seen(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / ".partial", 7)
    assert newest_checkpoint(tmp_path, lambda _: None) is None


def test_a_removed_checkpoint_is_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, partial = make_checkpoint(tmp_path, 5), tmp_path / ".partial"
    partial.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", lambda *args, **options: None)  # killed before it
        _remove(old, partial)
    assert not old.exists()
    assert [path.stem for path in partial.iterdir()] == [old.name]  # goes with the next write
    held = make_checkpoint(tmp_path, 6)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", _busy)
        _remove(held, partial)
    assert newest_checkpoint(tmp_path, pytest.fail) == held


def checkpointer(folder: Path, keep_last: int = 1) -> Checkpointer:
    """Of an engine that writes one small file."""

    def write(folder: str, tag: str, **options: Any) -> None:
        torch.save({"weights": torch.ones(25)}, Path(folder, tag, "mp_rank_00_model_states.pt"))

    engine = SimpleNamespace(save_checkpoint=write, optimizer=SimpleNamespace(optimizer=None))
    description = folder.parent / "student-config"
    description.mkdir(exist_ok=True)
    return Checkpointer(engine, folder, Retention(keep_last), description)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("keep_last", [1, 2])
def test_damaged_steps_ahead_do_not_push_out_what_was_just_written(tmp_path: Path, keep_last: int) -> None:
    """The start passed them over by their digests and went on from the one before; their sizes are right."""
    folder = tmp_path / "checkpoints"
    before, *ahead = (make_checkpoint(folder, step) for step in (20, 30, 40))
    for each in ahead:
        change(each / "mp_rank_00_model_states.pt", lambda content: content[:-1] + b"x")
    checkpointer(folder, keep_last).save(TrainState(25), heldout_mlm_loss=4.6)
    assert newest_checkpoint(folder, lambda line: None) == folder / "step-00000025"
    assert all(path.exists() for path in (before, *ahead))  # `before` has the best held-out loss
    checkpointer(folder, keep_last).save(TrainState(50))
    assert not ahead[0].exists()


@pytest.mark.usefixtures("one_rank")
def test_what_cannot_be_given_its_name_is_a_checkpoint_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full quota, or a damaged step of that name that a reader holds on NFS."""
    folder = tmp_path / "checkpoints"
    make_checkpoint(folder, 5)
    monkeypatch.setattr(Path, "rename", _busy)
    with pytest.raises(CheckpointNotWrittenError, match="busy"):
        checkpointer(folder).save(TrainState(10))
    assert newest_checkpoint(folder, pytest.fail) == folder / "step-00000005"


@pytest.mark.usefixtures("one_rank")
def test_a_step_written_again_is_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 0, at every start of a run that may go back to it."""
    folder, seen = tmp_path / "checkpoints", []
    step_0 = make_checkpoint(folder, 0)
    remove = shutil.rmtree

    def watched(path: Path, **options: Any) -> None:
        seen.append(Path(path))
        remove(path, **options)

    monkeypatch.setattr("shutil.rmtree", watched)
    checkpointer(folder).save(TrainState(0))
    assert step_0 not in seen
    assert newest_checkpoint(folder, pytest.fail) == step_0


def _busy(*paths: Path) -> None:
    raise OSError("Device or resource busy")
