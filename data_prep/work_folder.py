"""The output folder and what an unfinished run has left in it.

The folder is the journal. `DIR/.work/` holds the bucket files of finished chunks and the records of finished
shards, each put in place by a rename; a run that was killed is continued from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.job import WORK_FOLDER, JobOptions, describe_sources
from data_prep.shard_format.errors import UserError
from data_prep.shard_format.files import try_lock, write_text
from data_prep.shard_format.manifest import MANIFEST_NAME, Manifest, TokenizerInfo
from data_prep.sources.records import MAX_DOCUMENT_MB
from data_prep.sources.resolve import Source

JOURNAL = "job.json"


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
        if _named_by_user(begun) != _named_by_user(identity):
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
    for name in ("buckets", "shards", run):
        (out / WORK_FOLDER / name).mkdir(exist_ok=True)
    return run, None


def _named_by_user(identity: dict[str, Any]) -> list[Any]:
    """What the command line named, without what lay in the inputs at the time."""
    return [
        identity["options"],
        identity["tokenizer"],
        [source["source"] for source in identity["sources"]],
    ]


def _forget(out: Path) -> None:
    """Remove what an unfinished run has made."""
    for record in (out / WORK_FOLDER / "shards").glob("*.json"):
        (out / record.stem).unlink(missing_ok=True)
    for partial in out.glob(".*.partial"):
        partial.unlink()
    for name in ("buckets", "shards"):
        shutil.rmtree(out / WORK_FOLDER / name)


def _files_digest(sources: Sequence[Source]) -> str:
    """Changes where a run that is continued no longer has the inputs with which it began."""
    digest = hashlib.sha256()
    for file in (file for source in sources for file in source.files):
        changed = os.stat(file.path).st_mtime_ns if os.path.exists(file.path) else 0
        digest.update(json.dumps([file.path, file.format, file.bytes, file.part, changed]).encode())
    return digest.hexdigest()


def _refuse_difference(out: Path, made: dict[str, Any], wanted: dict[str, Any]) -> None:
    made, wanted = json.loads(json.dumps([made, wanted]))
    if made == wanted:
        return
    # A limit that is the default, or of no effect on the bytes, is not recorded.
    options = [{"max_document_mb": MAX_DOCUMENT_MB, **side["options"]} for side in (made, wanted)]
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
