"""What the user names as SOURCE, resolved to files, and the files dealt into units of work.

Units depend on the inputs alone, never on who works: that is one half of why the output is the same for any
number of processes. The other half is data_prep/passes/placement.py.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from data_prep.shard_format.errors import MissingFile, UserError
from data_prep.sources.formats import SPLITTABLE
from data_prep.sources.installed_docs import installed_doc_files
from data_prep.sources.records import SourceFile
from data_prep.sources.streams import COMPRESSIONS, plain_name
from data_prep.sources.tables import dataset_parts, hub_parts, is_dataset_folder, parquet_parts

TXT_DOCUMENTS = ("file", "line", "block")
_ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
}
_BY_NAME_ALONE = ("csv",)
"""Not looked for in folders: beside texts lie tables about them."""
MAX_CHUNK_BYTES = 32 << 20
_WIKI = re.compile(r"wiki_\d+$")
HELP = """sources, freely mixed:
  PATH            .txt, .jsonl, .parquet, .csv, .md or .html, plain or .gz/.bz2/.xz/.zst; WikiExtractor's
                  wiki_NN files; a folder of these (searched through, but for .csv); a 'glob*'; a folder
                  saved by `datasets`. Of .html the main text counts (needs the package trafilatura)
  file:PATH, line:PATH, block:PATH
                  .txt with one document per file, per line, or per block between blank lines
  hub:NAME[:CONFIG[:SPLIT]]
                  a dataset of the Hugging Face hub, streamed, e.g. hub:wikimedia/wikipedia:20231101.en
  installed-docs  English documentation inside the packages of this Python environment: no download"""


@dataclass(frozen=True)
class Source:
    """One SOURCE argument."""

    name: str
    kind: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True)
class Unit:
    """Files that one process reads in one go. Where `shared`, others may help with parts of it."""

    number: int
    source: int
    files: tuple[SourceFile, ...]
    shared: bool

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def resolve_sources(names: Sequence[str], txt_documents: str = "file") -> list[Source]:
    """Find the files behind each SOURCE, sorted by path.

    Raises:
        MissingFile: nothing is there.
        UserError: what is there is no text that can be read.
    """
    return [_resolve(name, txt_documents) for name in names]


def _resolve(name: str, txt_documents: str) -> Source:
    if name == "installed-docs":
        return Source(name, "installed-docs", tuple(installed_doc_files()))
    if name.startswith("hub:"):
        return Source(name, "hub", tuple(hub_parts(name)))
    prefix, path = _split_name(name)
    return _resolve_path(name, path, prefix or txt_documents)


def _split_name(name: str) -> tuple[str, str]:
    """How the .txt files of a source are read, "" where the name does not say so; its path."""
    prefix, _, path = name.partition(":")
    return (prefix, path) if prefix in TXT_DOCUMENTS and path else ("", name)


def absolute_source(name: str) -> str:
    """The same source from any folder; equal for `texts`, `texts/` and `./texts`."""
    if name == "installed-docs" or name.startswith("hub:"):
        return name
    prefix, path = _split_name(name)
    absolute = os.path.abspath(path)
    return f"{prefix}:{absolute}" if prefix else absolute


def _resolve_path(name: str, path: str, txt_documents: str) -> Source:
    if os.path.isdir(path):
        if is_dataset_folder(path):
            return Source(name, "dataset", tuple(dataset_parts(path)))
        kinds = {file: _format(file, txt_documents) for file in _walk(path)}
        files = [file for file, kind in kinds.items() if kind and kind not in _BY_NAME_ALONE]
        if not files:
            tables = (
                f"; of .csv files name them: '{os.path.join(path, '*.csv')}'" if any(kinds.values()) else ""
            )
            raise UserError(
                f"{path}: no .txt, .jsonl, .parquet, .md, .html or wiki_NN file in this folder; give one that holds "
                f"some{tables}"
            )
        return Source(name, "files", _source_files(files, txt_documents))
    if os.path.exists(path):
        if not _format(path, txt_documents):
            raise UserError(
                f"{path}: not a kind of file that is read; give .txt, .jsonl, .parquet, .csv, .md or .html, plain "
                f"or with {', '.join(COMPRESSIONS)}, or WikiExtractor's wiki_NN"
            )
        return Source(name, "files", _source_files([path], txt_documents))
    if glob.has_magic(path):
        found = sorted(glob.glob(path, recursive=True))
        files = [file for file in found if not os.path.isdir(file) and _format(file, txt_documents)]
        if files:
            return Source(name, "files", _source_files(files, txt_documents))
        raise MissingFile(f"{path}: no readable file matches")
    hint = "; a weight is a number, as in SOURCE@0.7" if "@" in path else ""
    raise MissingFile(f"source {path!r} does not exist{hint}")


def _walk(folder: str) -> Iterable[str]:
    found, seen = [], {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        visible = sorted(name for name in folders if not name.startswith("."))
        folders.clear()
        for name in visible:
            place = os.path.realpath(os.path.join(parent, name))
            if place not in seen:  # links may go round
                seen.add(place)
                folders.append(name)
        found += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _raise(error: OSError) -> None:
    """For os.walk, which leaves out a folder that it cannot list."""
    raise error


def _format(path: str, txt_documents: str) -> str | None:
    plain = plain_name(os.path.basename(path))
    if _WIKI.match(plain):
        return "wiki"
    ending = os.path.splitext(plain)[1].lower()
    return txt_documents if ending == ".txt" else _ENDINGS.get(ending)


def _source_files(paths: Sequence[str], txt_documents: str) -> tuple[SourceFile, ...]:
    files: list[SourceFile] = []
    for path in paths:
        kind = _format(path, txt_documents)
        assert kind is not None
        size = _size(path)
        if kind == "parquet":
            files += parquet_parts(path)
        else:
            files.append(SourceFile(path, kind, size))
    return tuple(files)


def _size(path: str) -> int:
    """Bytes of a file; UserError where it is none: opening a FIFO waits for ever, and a device may have no end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFIFO: "a FIFO (named pipe)", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise UserError(f"{path}: is {kind}, not a file; copy what comes from it into a file, and name that")
    return status.st_size


def chunk_bytes(sources: Sequence[Source]) -> int:
    """How much text one piece of work holds: small enough to balance, large enough to be few."""
    total = sum(file.bytes for source in sources for file in source.files)
    is_known = all(source.kind != "hub" for source in sources)  # the hub does not say how much it is
    return min(max(total // 64, 1 << 20), MAX_CHUNK_BYTES) if is_known else MAX_CHUNK_BYTES


def make_units(sources: Sequence[Source]) -> list[Unit]:
    """Deal every source's files, in order, into units of about `chunk_bytes` each; large files stay alone."""
    limit = chunk_bytes(sources)
    units: list[Unit] = []
    for index, source in enumerate(sources):
        group: list[SourceFile] = []
        size = 0
        for file in source.files:
            # A part of a stream, whose size is not known, stays alone.
            if group and (size + file.bytes > limit or file.format == "hub"):
                units.append(_unit(len(units), index, group, limit))
                group, size = [], 0
            group.append(file)
            size += file.bytes
        if group:
            units.append(_unit(len(units), index, group, limit))
    return units


def _unit(number: int, source: int, files: list[SourceFile], limit: int) -> Unit:
    shared = len(files) == 1 and files[0].bytes >= limit // 2 and files[0].format in SPLITTABLE
    return Unit(number, source, tuple(files), shared)
