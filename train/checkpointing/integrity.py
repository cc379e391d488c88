"""Whether a checkpoint's files are what was written: complete.json lists their sizes and SHA-256 digests.

It has a digest of its own. Every rank digests the files that it wrote, and checks its share when a run goes on.

Checkpoints from before November 2026 list sizes alone; of these the checksums inside torch's files are checked.
SHA-256, as shards have it: sha256sum checks it, and no package is needed. xxh3 takes a sixth of the time, which
matters little beside the minutes between two saves.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from data_prep.shard_format.checks import first_problem
from data_prep.shard_format.files import read_json, write_json
from train.errors import UserError, one_line

COMPLETE = "complete.json"
_STEP = re.compile(r"step-(\d{8})")
_PARTITION = re.compile(r"zero_pp_rank_(\d+)_")
_READ = re.compile(r"/|_states\.pt|_rank_|^layer_")
_CHUNK = 2**20
_THREADS = 4
"""hashlib computes outside of Python's lock."""


def _inside(name: str) -> str:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{name!r} lies outside of the checkpoint")
    return name


Name = Annotated[str, AfterValidator(_inside)]


class Facts(BaseModel):
    """What a checkpoint says of itself."""

    model_config = ConfigDict(frozen=True, strict=True)

    step: Annotated[int, Field(ge=0)]
    world_size: Annotated[int, Field(ge=1)]
    """Ranks that wrote it."""
    heldout_mlm_loss: float | None = None
    """Of this step, where it was evaluated."""
    optimizer: str = "lamb"
    """optimizer.name; checkpoints of before there was a choice do not say."""
    files: dict[Name, Annotated[int, Field(ge=0)]]
    """Bytes, by path inside the checkpoint."""
    sha256: dict[str, str] | None = None
    """Hex digits, for the same files; None in a checkpoint of before."""

    def share(self, rank: int, world_size: int) -> list[str]:
        """The files that one rank looks after: partitions in turn, rank 0 the rest."""
        return [name for name in self.files if _owner(name, world_size) == rank]


class Record(NamedTuple):
    """One file as it was written."""

    size: int
    sha256: str


def record_own_files(checkpoint: Path, rank: int, world_size: int) -> dict[str, Record]:
    """Flush the files of this rank's share to the disk and digest them; OSError where one cannot be read or flushed."""
    # Another rank's files may not be seen here yet; partitions lie at the top.
    paths = checkpoint.iterdir() if rank else checkpoint.rglob("*")
    names = sorted(path.relative_to(checkpoint).as_posix() for path in paths)
    own = [
        name
        for name in names
        if name != COMPLETE and _owner(name, world_size) == rank and (checkpoint / name).is_file()
    ]

    def record(name: str) -> Record:
        flush(checkpoint / name)
        return Record((checkpoint / name).stat().st_size, _sha256(checkpoint / name))

    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(own, threads.map(record, own), strict=True))


def write_facts(
    checkpoint: Path,
    step: int,
    world_size: int,
    records: Mapping[str, Record],
    heldout_mlm_loss: float | None = None,
    optimizer: str = "lamb",
) -> None:
    """Write complete.json: from now on the checkpoint is whole."""
    facts = Facts(
        step=step,
        world_size=world_size,
        heldout_mlm_loss=heldout_mlm_loss,
        optimizer=optimizer,
        files={name: records[name].size for name in sorted(records)},
        sha256={name: records[name].sha256 for name in sorted(records)},
    )
    tree = json.loads(json.dumps(facts.model_dump()))
    write_json(checkpoint / COMPLETE, {**tree, "digest": _digest(tree)})
    flush(checkpoint)


def read_facts(checkpoint: Path) -> Facts:
    """What complete.json says; UserError where it is missing or damaged."""
    path, remedy = checkpoint / COMPLETE, "remove that checkpoint, or restore it"
    try:
        tree = read_json(path, remedy)
    except OSError as error:
        raise UserError(f"{path} is missing or unreadable ({error.strerror}); {remedy}") from None
    if "sha256" in tree or "digest" in tree:
        digest = tree.pop("digest", None)
        if digest != _digest(tree) or "sha256" not in tree:
            raise UserError(f"{path} is damaged (its own digest does not fit); {remedy}")
    try:
        return Facts.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({first_problem(error)}); {remedy}") from None


def size_fault(checkpoint: Path, files: Mapping[str, int]) -> str | None:
    """The first file that is missing or has another size; None where all are as listed.

    Args:
        files: bytes, by path inside the checkpoint.
    """
    for name, size in files.items():
        path = checkpoint / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            found = path.stat().st_size
        except OSError as error:
            return f"{name[:100]} cannot be read ({error.strerror})"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
    return None


def _foreign_file(checkpoint: Path, files: Mapping[str, int]) -> str | None:
    """A file that was put beside those of the checkpoint where something would read it: DeepSpeed finds its files by
    patterns, and the tokenizer's folder is loaded whole. Notes at the top are nobody's concern."""
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if name not in files and _READ.search(name) and not path.name.startswith(".") and path.is_file():
            return f"{name[:100]} does not belong to it; take that file out of the folder"
    return None


def content_fault(checkpoint: Path, facts: Facts, rank: int = 0, world_size: int = 1) -> str | None:
    """The first file of a rank's share whose content is not what was written; None where all are whole.

    Raises:
        OSError: one of them is not there any more.
    """

    def fault(name: str) -> str | None:
        try:
            if facts.sha256 is None:
                return _fault_of_archive(checkpoint, name)
            if _sha256(checkpoint / name) != facts.sha256.get(name):
                return f"{name} is damaged (its SHA-256 is not the one that was written)"
        except FileNotFoundError:
            raise
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None

    with ThreadPoolExecutor(_THREADS) as threads:
        faults = threads.map(fault, facts.share(rank, world_size))
        return next((text for text in faults if text is not None), None)


def listed(checkpoint: Path) -> tuple[Facts | None, str | None]:
    """(facts, None) of a checkpoint whose files are there with their sizes; else (None, what is wrong)."""
    try:
        facts = read_facts(checkpoint)
    except UserError as error:
        return None, str(error)
    named = _STEP.fullmatch(checkpoint.name)  # other names are the user's, who may copy a step where he likes
    if named and int(named[1]) != facts.step:
        return None, f"it holds step {facts.step}, copied over it; remove that checkpoint, or restore it"
    os.listdir(checkpoint)  # NFS then asks the server for names that this host did not find a moment ago
    fault = size_fault(checkpoint, facts.files) or _foreign_file(checkpoint, facts.files)
    return (facts, None) if fault is None else (None, fault)


def checkpoint_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, as one process sees it by reading all of it; None where it is whole."""
    facts, fault = listed(checkpoint)
    if facts is None:
        return fault
    try:
        return content_fault(checkpoint, facts)
    except FileNotFoundError as error:
        return f"{error.filename} is missing"


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _owner(name: str, world_size: int) -> int:
    found = _PARTITION.search(name)
    return int(found[1]) % world_size if found else 0


def _digest(tree: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(memoryview(buffer)[:read])
    return digest.hexdigest()


def _fault_of_archive(checkpoint: Path, name: str) -> str | None:
    """By the checksums of the zip archive that torch writes, which torch.load does not check."""
    if not name.endswith(".pt"):
        return None
    try:
        with zipfile.ZipFile(checkpoint / name) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, RuntimeError) as error:
        return f"{name} is damaged ({one_line(error, 100)})"
    return None if damaged is None else f"{name} is damaged (the checksum of {damaged} does not fit)"
