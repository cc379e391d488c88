"""The output folder and what an unfinished run has left in it.

The folder is the journal. `DIR/.work/` holds the bucket files of finished chunks and the records of finished
shards, each put in place by a rename; a run that was killed is continued from there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.passes.bucket_files import read_head
from data_prep.passes.job import (
    DESCRIBED,
    HISTOGRAM_NAME,
    MIXTURE_OPTIONS,
    SKIPPED_NAME,
    WORK_FOLDER,
    JobOptions,
    describe_sources,
)
from data_prep.passes.source_files import (
    RECORD_NAME,
    SAMPLE,
    SAMPLES,
    Changes,
    changed_files,
    checked_records,
    describe_files,
    kept_records,
)
from data_prep.shard_format.errors import UserError
from data_prep.shard_format.files import read_json, try_lock, write_text
from data_prep.shard_format.manifest import MANIFEST_NAME, TOKENIZER_FOLDER, Manifest
from data_prep.shard_format.tokenizer_info import TokenizerInfo
from data_prep.sources.records import MAX_DOCUMENT_MB
from data_prep.sources.resolve import Source, absolute_source

JOURNAL = "job.json"
UNITS = 2
"""How files are dealt into units and chunks, by which bucket files are named. 2: each part of a hub source alone."""
RESTART_LIMIT_BYTES = 256_000_000
"""Bytes of finished chunks, which take some minutes to make: an unfinished run with so little takes new options."""


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold OUT/.work/lock: two runs into one folder would undo each other's claims.

    Where the job has not even begun, nothing is left behind.
    """
    work = out / WORK_FOLDER
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as file:
        if not try_lock(file):
            raise UserError(f"another run is writing into {out}; wait for it, or stop it")
        try:
            yield
        finally:
            if not (work / JOURNAL).exists():
                shutil.rmtree(work, ignore_errors=True)
                with contextlib.suppress(OSError):  # not empty: it was not ours
                    out.rmdir()


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
    identity = json.loads(
        json.dumps(
            {
                "options": options.recorded(),
                "tokenizer": tokenizer.fingerprint,
                "sources": describe_sources(sources),
                "max_document_mb": options.max_document_mb,
                "units": UNITS,
            }
        )
    )
    if (out / MANIFEST_NAME).exists():
        return "", _finished(out, identity, sources)
    journal = out / WORK_FOLDER / JOURNAL
    if not (journal.exists() and _goes_on(out, identity, sources)):
        foreign = sorted(path.name for path in out.iterdir() if path.name not in (WORK_FOLDER, RECORD_NAME))
        if foreign:
            raise UserError(
                f"{out} is not empty ({foreign[0]}) and was not made by write_shards; choose an empty folder"
            )
        write_text(journal, json.dumps({**identity, "files": describe_files(sources)}))
    for stale in (out / WORK_FOLDER).glob("run-*"):
        shutil.rmtree(stale)
    run = f"run-{uuid.uuid4().hex}"
    for name in ("buckets", "shards", run):
        (out / WORK_FOLDER / name).mkdir(exist_ok=True)
    return run, None


def keep_records(out: Path) -> None:
    """Leave beside the shards what the files of the sources were when the job began."""
    write_text(out / RECORD_NAME, json.dumps(_read_journal(out)["files"]))


def _read_journal(out: Path) -> dict[str, Any]:
    path, remedy = out / WORK_FOLDER / JOURNAL, f"remove {out} to start over"
    journal = read_json(path, remedy)
    for name, kind in (("options", dict), ("tokenizer", str), ("sources", list)):
        if not isinstance(journal.get(name), kind):
            raise UserError(f"{path} is damaged (it lacks {name!r}); {remedy}")
    if "files" in journal:
        checked_records(journal["files"], path, remedy)
    return journal


def _finished(out: Path, identity: dict[str, Any], sources: Sequence[Source]) -> Manifest:
    """The manifest of shards that are complete, where they are what is asked for."""
    manifest = Manifest.load(out)
    made = {
        "options": manifest.options,
        "tokenizer": manifest.tokenizer.fingerprint,
        "sources": [{name: source.get(name) for name in DESCRIBED} for source in manifest.sources],
    }
    records = kept_records(out)
    changes = Changes((), ()) if records is None else changed_files(records, sources)
    _refuse_difference(out, made, identity, changes)
    if records is None:
        print(f"{out}: the sources were compared by name and size alone: older shards have no more recorded")
    _say_sampled(out, changes)
    shutil.rmtree(out / WORK_FOLDER)  # of a run that was killed at its very end, or ours
    return manifest


def _goes_on(out: Path, identity: dict[str, Any], sources: Sequence[Source]) -> bool:
    """Whether what an unfinished run has done is of use; where not, it is removed.

    Raises:
        UserError: other options are asked for, and much work would be lost.
    """
    begun = _read_journal(out)
    streamed = any(source.get("kind") == "hub" for source in begun["sources"])
    if "files" not in begun or (streamed and begun.get("units") != UNITS):
        print(f"{out}: the unfinished run here is of an older version: starting over")
        _forget(out)
        return False
    changes = changed_files(begun["files"], sources)
    if _named_by_user(begun) != _named_by_user(identity):
        if not changes.changed and _buckets_stay(out, begun, identity):
            write_text(out / WORK_FOLDER / JOURNAL, json.dumps({**identity, "files": begun["files"]}))
            return True
        if _is_much(out):
            _refuse_difference(out, begun, identity, changes)
        print(f"{out}: the run that is unfinished here had other options or inputs: starting over")
        _forget(out)
        return False
    if changes.changed:
        # The unfinished run may have stopped at a fault in its inputs that is mended now.
        what = f"the inputs have changed since the run that is unfinished here ({_some(changes.changed)})"
        print(f"{out}: {what}: starting over")
        _forget(out)
        return False
    _say_sampled(out, changes)
    return True


def _buckets_stay(out: Path, begun: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether the finished chunks are what the wanted options would make of them, and no shard is finished.

    A run that stopped at a bad record is continued with the remedy that its message names: no finished chunk has such
    a record, so that skipping them, a larger limit and further text fields change nothing of it.
    """
    work = out / WORK_FOLDER
    if any((work / "shards").glob("*.json")):
        return False
    old, new = dict(begun["options"]), dict(wanted["options"])
    for side in (old, new):
        for name in ("shard_tokens", *MIXTURE_OPTIONS):
            side.pop(name, None)
    if begun["tokenizer"] != wanted["tokenizer"] or _names(begun) != _names(wanted):
        return False
    if any(read_head(path)["bad"] for path in (work / "buckets").glob("*.bucket")):
        return old == new
    fields = len(old["text_fields"])
    if old.pop("text_fields") != new.pop("text_fields")[:fields]:
        return False
    for side in (old, new):
        side.pop("skip_bad_records")
        side.pop("max_document_mb", None)
    return old == new and wanted["max_document_mb"] >= begun["max_document_mb"]


def _is_much(out: Path) -> bool:
    """Whether more than a few minutes of work are in the folder."""
    work = out / WORK_FOLDER
    size = sum(path.stat().st_size for path in (work / "buckets").glob("*.bucket"))
    return size > RESTART_LIMIT_BYTES or any((work / "shards").glob("*.json"))


def _say_sampled(out: Path, changes: Changes) -> None:
    if changes.sampled:
        print(
            f"{out}: {_some(changes.sampled)}: only the modification time is new; the size and {SAMPLES} samples of "
            f"{SAMPLE // 1024} kB are as they were, what lies between them is not compared"
        )


def _some(lines: Sequence[str]) -> str:
    more = f" and {len(lines) - 3:,} more" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more


def _named_by_user(identity: dict[str, Any]) -> list[Any]:
    """What the command line named, without what lay in the inputs at the time."""
    return [identity["options"], identity["tokenizer"], _names(identity)]


def _names(identity: dict[str, Any]) -> list[str]:
    return [absolute_source(source["source"]) for source in identity["sources"]]


def _forget(out: Path) -> None:
    """Remove what an unfinished run has made, also one that was killed just before its manifest."""
    work = out / WORK_FOLDER
    shards = [out / record.stem for record in (work / "shards").glob("*.json")]
    beside = [out / name for name in (HISTOGRAM_NAME, SKIPPED_NAME, TOKENIZER_FOLDER)]
    for path in (*shards, *out.glob(".*.partial"), *beside, work / "buckets", work / "shards"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _refuse_difference(out: Path, made: dict[str, Any], wanted: dict[str, Any], changes: Changes) -> None:
    # A limit that is the default, or of no effect on the bytes, is not recorded.
    options = [{"max_document_mb": MAX_DOCUMENT_MB, **side["options"]} for side in (made, wanted)]
    different = [
        f"{name} {options[0].get(name)!r} instead of {options[1].get(name)!r}"
        for name in sorted({*options[0], *options[1]})
        if options[0].get(name) != options[1].get(name)
    ]
    if made["tokenizer"] != wanted["tokenizer"]:
        different.append("another tokenizer")
    if _names(made) != _names(wanted):
        names = [[source["source"] for source in side["sources"]] for side in (made, wanted)]
        different.append(f"sources {names[0]} instead of {names[1]}")
    elif changes.changed or _sizes(made) != _sizes(wanted):
        named = f" ({_some(changes.changed)})" if changes.changed else ""
        different.append(f"inputs that have changed since{named}")
    if different:
        raise UserError(
            f"{out} was made with {'; '.join(different)}; choose another --out, or remove that folder first"
        )


def _sizes(identity: dict[str, Any]) -> list[Any]:
    return [{**source, "source": None} for source in identity["sources"]]
