"""Names to files and units: folders, links, globs, and what is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_prep.shard_format.errors import MissingFile
from data_prep.sources.records import SourceFile
from data_prep.sources.resolve import absolute_source, make_units, resolve_sources
from data_prep.sources.streams import DamagedFile
from tests.unit.data_prep.sources.given import read


def test_folders_and_globs_are_sorted(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/9.txt", "a/1.txt", "c/notes.pdf", ".hidden/0.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(str(tmp_path)) == ["a/1.txt", "a/9.txt", "b/2.txt"]
    assert read(f"{tmp_path}/*/[12].txt") == ["a/1.txt", "b/2.txt"]
    assert read(f"{tmp_path}/b", f"{tmp_path}/a/9.txt") == ["b/2.txt", "a/9.txt"]


def test_folders_behind_links_are_read_once(tmp_path: Path) -> None:
    for name in ("a/1.txt", "elsewhere/2.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "a")
    assert read(f"{tmp_path}/a") == ["a/1.txt", "elsewhere/2.txt"]


def test_a_folder_that_cannot_be_listed_is_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "locked").mkdir()
    for name in ("1.txt", "locked/2.txt"):
        (tmp_path / name).write_text(name)
    scandir = os.scandir

    def refuse(path: str) -> object:
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="locked"):
        resolve_sources([str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("none.txt", MissingFile, r"source '.*none\.txt' does not exist$"),
        ("none.txt@70%", MissingFile, r"does not exist; a weight is a number, as in SOURCE@0\.7"),
        ("*.none", MissingFile, "no readable file matches"),
        ("", ValueError, r"no \.txt, \.jsonl, \.parquet, \.md, \.html or wiki_NN file in this folder"),
        ("page.pdf", ValueError, r"page\.pdf: not a kind of file that is read; give \.txt, \.jsonl"),
        (
            "no.parquet",
            DamagedFile,
            r"no\.parquet is damaged or no parquet file: Parquet magic bytes not found",
        ),
    ],
)
def test_sources_that_are_none(tmp_path: Path, name: str, error: type, message: str) -> None:
    for made in ("page.pdf", "no.parquet"):
        if name == made:
            (tmp_path / made).write_text("nonsense")
    with pytest.raises(error, match=message):
        read(str(tmp_path / name))


def test_a_source_by_its_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    monkeypatch.chdir(tmp_path)
    for name in ("line:a.txt", "line:./a.txt", f"line:{tmp_path}/a.txt"):
        assert absolute_source(name) == f"line:{tmp_path}/a.txt"
    assert absolute_source("texts/") == absolute_source("./texts") == f"{tmp_path}/texts"
    named = [absolute_source(name) for name in ("line:a.txt", "a.txt")]
    monkeypatch.chdir("/")
    assert [source.files[0].format for source in resolve_sources(named)] == ["line", "file"]
    for name in ("installed-docs", "hub:some/set:en:train"):
        assert absolute_source(name) == name


def test_units_hold_every_file_once_and_large_files_are_shared() -> None:
    from data_prep.sources.resolve import Source

    files = tuple(
        SourceFile(f"{n}.jsonl", "jsonl", size) for n, size in enumerate([9, 1 << 30, 50, 1 << 20, 7])
    )
    units = make_units([Source("x", "files", files)])
    assert [file for unit in units for file in unit.files] == list(files)
    assert [len(unit.files) for unit in units] == [1, 1, 3]
    assert [unit.shared for unit in units] == [False, True, False]
