"""One job of data preparation: its options, its folder, its processes and how they fail together.

The folder is the journal. `DIR/.work/` holds the spills of finished chunks and the records of finished shards,
each put in place by a rename; a run that was killed is continued from there. A process claims a piece of work
by creating a file in the run's own folder, which no other process of the run can then create.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_prep.progress import Progress
from data_prep.shard_format.errors import UserError
from data_prep.shard_format.files import write_text
from data_prep.shard_format.manifest import MANIFEST_NAME, Manifest, TokenizerInfo
from data_prep.sources.records import ReadOptions
from data_prep.sources.resolve import Source
from data_prep.workers import JobFailed, World

Result = TypeVar("Result")
WORK_FOLDER = ".work"
JOURNAL = "job.json"


@dataclass(frozen=True)
class JobOptions:
    """What `write_shards` is asked to do."""

    sources: tuple[str, ...]
    tokenizer: str
    out: str
    seed: int = 0
    heldout_fraction: float = 0.01
    """Of all documents; which ones depends on their digests alone."""
    min_tokens: int = 8
    """Documents with fewer are dropped."""
    shard_tokens: int = 4_000_000
    txt_documents: str = "file"
    text_fields: tuple[str, ...] = ("text",)
    skip_bad_records: bool = False

    def recorded(self) -> dict[str, Any]:
        """What the shards' bytes depend on, for the manifest; not where they lie, nor who made them."""
        recorded = asdict(self)
        for name in ("sources", "tokenizer", "out"):
            del recorded[name]
        return recorded

    def read_options(self) -> ReadOptions:
        return ReadOptions(text_fields=self.text_fields)


@dataclass(frozen=True)
class Job:
    """What every process knows, once rank 0 has looked at the inputs."""

    options: JobOptions
    sources: tuple[Source, ...]
    tokenizer: TokenizerInfo
    backend: str
    run: str

    @property
    def work(self) -> Path:
        return Path(self.options.out, WORK_FOLDER)

    @property
    def spills(self) -> Path:
        return self.work / "spills"

    @property
    def records(self) -> Path:
        return self.work / "shards"

    @property
    def claims(self) -> Path:
        return self.work / self.run


class Team:
    """This process's place in the job: claims, progress, failing together."""

    def __init__(self, world: World, claims: Path | None = None) -> None:
        self.world = world
        self.claims = claims
        self.progress: Progress | None = None

    def check(self) -> None:
        """Called between pieces of work: stop where another process has failed.

        Raises:
            JobFailed: empty; the other one says why.
        """
        self.world.check()
        if self.claims is not None and (self.claims / "stop").exists():
            raise JobFailed("")

    def claim(self, name: str) -> Path | None:
        """A file of this name to write into, or None where another process has it."""
        assert self.claims is not None
        path = self.claims / name
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            return None
        return path

    def together(self, work: Callable[[], Result]) -> list[Result]:
        """Do `work` on every process and wait for all; their results, by rank.

        A bar that `work` puts into `self.progress` goes on until the last process is done.

        Raises:
            JobFailed: on every process, where it failed on any.
        """
        result: Any = None
        failure: tuple[str, int] | None = None
        try:
            result = work()
        except Exception as error:
            failure = explain(error), exit_code(error)
            if self.claims is not None:
                with contextlib.suppress(OSError):  # a full disk; the others will notice at the gathering
                    (self.claims / "stop").touch()
        failures = [("lost", 1)]
        progress, self.progress = self.progress, None
        try:
            if progress is not None:
                progress.publish()
            outcomes = self.world.gather((result, failure), progress.show if progress else lambda: None)
            failures = [failure for _, failure in outcomes if failure is not None]
        finally:
            if progress is not None:
                progress.close(complete=not failures)
        if failures:
            raise JobFailed(*next((failure for failure in failures if failure[0]), ("stopped", 1)))
        return [value for value, _ in outcomes]


def _is_full_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def exit_code(error: Exception) -> int:
    """2 for bad usage or input; 1 for what no other command line would mend: a full disk, a fault of ours."""
    if isinstance(error, JobFailed):
        return error.exit_code
    return 2 if isinstance(error, (ValueError, OSError)) and not _is_full_disk(error) else 1


def explain(error: Exception) -> str:
    """One line for what a user can mend; the traceback for what is a fault of this code."""
    if isinstance(error, JobFailed):
        return str(error)
    if _is_full_disk(error):
        return (
            "the disk is full (the output needs about 4 bytes per token, 2 of them for the time of the run); "
            "make room and run the same command again: finished work is kept"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (ValueError, OSError, ImportError)):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()


# ------------------------------------------------------------------------------------------- the folder


class FolderLock:
    """Holds DIR/.work/lock for this process: two runs into one folder would undo each other's claims."""

    def __init__(self, work: Path) -> None:
        self._work = work
        work.mkdir(parents=True, exist_ok=True)
        self._file = open(work / "lock", "w")  # noqa: SIM115 - held for the run
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing into {work.parent}; wait for it, or stop it") from None

    def release(self) -> None:
        """Let go; where the job has not even begun, leave nothing behind."""
        if not (self._work / JOURNAL).exists():
            shutil.rmtree(self._work, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: it was not ours
                self._work.parent.rmdir()
        self._file.close()


def prepare_folder(
    options: JobOptions, sources: Sequence[Source], tokenizer: TokenizerInfo
) -> tuple[str, Manifest | None]:
    """Make or continue DIR/.work, or find that the work is done.

    Returns:
        The name of this run's folder of claims; the manifest where the shards are complete.
    Raises:
        UserError: DIR holds something else: other options, other inputs, other files.
    """
    out = Path(options.out)
    identity = {
        "options": options.recorded(),
        "tokenizer": tokenizer.fingerprint,
        "sources": describe_sources(sources),
    }
    if (out / MANIFEST_NAME).exists():
        manifest = Manifest.load(out)
        made = {
            "options": manifest.options,
            "tokenizer": manifest.tokenizer.fingerprint,
            "sources": [{k: v for k, v in s.items() if k != "documents"} for s in manifest.sources],
        }
        _refuse_difference(out, made, identity)
        shutil.rmtree(out / WORK_FOLDER)  # of a run that was killed at its very end, or ours
        return "", manifest
    identity = json.loads(json.dumps({**identity, "files": _files_digest(sources)}))
    journal = out / WORK_FOLDER / JOURNAL
    begun = json.loads(journal.read_text()) if journal.exists() else None
    if begun is not None and begun != identity:
        if _said(begun) != _said(identity):
            _refuse_difference(out, begun, identity)
        # The unfinished run may have stopped at a fault in its inputs that is mended now.
        print(f"{out}: the inputs have changed since the run that is unfinished here: starting over")
        _forget(out)
        begun = None
    if begun is None:
        foreign = sorted(path.name for path in out.iterdir() if path.name != WORK_FOLDER)
        if foreign:
            raise UserError(
                f"{out} is not empty ({foreign[0]}) and was not made by write_shards; choose an empty folder"
            )
        write_text(journal, json.dumps(identity))
    for stale in (out / WORK_FOLDER).glob("run-*"):
        shutil.rmtree(stale)
    run = f"run-{uuid.uuid4().hex}"
    for name in ("spills", "shards", run):
        (out / WORK_FOLDER / name).mkdir(exist_ok=True)
    return run, None


def _said(identity: dict[str, Any]) -> list[Any]:
    """What the user has said, without what lay in the inputs at the time."""
    return [
        identity["options"],
        identity["tokenizer"],
        [source["source"] for source in identity["sources"]],
    ]


def _forget(out: Path) -> None:
    """Remove what an unfinished run has made."""
    for record in (out / WORK_FOLDER / "shards").glob("*.json"):
        (out / record.stem).unlink(missing_ok=True)
    for name in ("spills", "shards"):
        shutil.rmtree(out / WORK_FOLDER / name)


def describe_sources(sources: Sequence[Source]) -> list[dict[str, Any]]:
    return [
        {
            "source": source.name,
            "kind": source.kind,
            "files": len({file.path for file in source.files}),
            "bytes": sum(file.bytes for file in source.files),
        }
        for source in sources
    ]


def _files_digest(sources: Sequence[Source]) -> str:
    """Tells whether a run that is continued still has the inputs with which it began."""
    digest = hashlib.sha256()
    for file in (file for source in sources for file in source.files):
        changed = os.stat(file.path).st_mtime_ns if os.path.exists(file.path) else 0
        digest.update(json.dumps([file.path, file.format, file.bytes, file.part, changed]).encode())
    return digest.hexdigest()


def _refuse_difference(out: Path, made: dict[str, Any], wanted: dict[str, Any]) -> None:
    made, wanted = json.loads(json.dumps([made, wanted]))
    if made == wanted:
        return
    options = made["options"], wanted["options"]
    different = [
        f"{name} {options[0].get(name)!r} instead of {options[1].get(name)!r}"
        for name in sorted({*options[0], *options[1]})
        if options[0].get(name) != options[1].get(name)
    ]
    if made["tokenizer"] != wanted["tokenizer"]:
        different.append("another tokenizer")
    if made["sources"] != wanted["sources"]:
        names = [[source["source"] for source in side["sources"]] for side in (made, wanted)]
        different.append(
            f"sources {names[0]} instead of {names[1]}"
            if names[0] != names[1]
            else "inputs that have changed since"
        )
    elif not different:
        different.append("inputs that have changed since")
    raise UserError(
        f"{out} was made with {'; '.join(different)}; choose another --out, or remove that folder first"
    )
