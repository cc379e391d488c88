"""Files -> columns: .tsv, .csv, .jsonl, .conll, plain or .gz, or a folder with a folder of texts for each class.

A .tsv is split at tabs here, without a library: pandas, which `datasets` reads with, fills rows that lack cells and
shifts the columns of rows that have too many, both in silence; and `datasets` turns texts that look like dates into
dates. Both kinds of row must be seen, and counted aloud.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data_prep.shard_format.files import parse_json, refuse_pipe
from train.errors import UserError
from train.finetuning.data.examples import Table
from train.finetuning.tasks import Task

FORMATS = ("csv", "tsv", "jsonl", "conll")
MALFORMED_SHARE = 0.01
"""GLUE's own QQP has a few broken rows; more than this share is a wrong file."""
MEND = "mend it, or fetch the file again"
LONGEST_CELL = 1 << 24
Say = Callable[[str], None]
Rows = list[tuple[int, list[str]]]


def format_of(path: Path) -> str | None:
    """One of FORMATS, by the ending of a name, plain or .gz; None for another."""
    ending = Path(path.name.removesuffix(".gz")).suffix.removeprefix(".")
    return ending if ending in FORMATS else None


def read_table(task: Task, path: Path, say: Say, headerless: bool = True) -> Table:
    """A file, or a folder with a folder of .txt files for each class, as columns.

    Args:
        headerless: whether a file of this task may lack the row of column names, as CoLA's do.
    Raises:
        UserError: empty, damaged, not UTF-8, or too many rows of another shape; the message names the row.
    """
    if path.is_dir():
        return _read_class_folders(task, path)
    own = task.own if headerless else None
    kind = own.format if own else format_of(path)
    names: Sequence[str] | None = task.headerless if headerless else None
    if kind == "conll":
        return _conll_table(task, path)
    if kind == "csv":
        rows = list(_csv_rows(path))
    else:
        lines = lines_of(path)
        if lines and kind == "jsonl":
            return _json_table(path, lines)
        rows = [(row, line.split("\t")) for row, line in lines]
    if not rows:
        raise UserError(f"{path} is empty; fetch it again")
    if names is None or (not own and len(rows[0][1]) != len(names)):
        names = rows.pop(0)[1]
    return _table(path, rows, names, say)


def lines_of(path: Path) -> list[tuple[int, str]]:
    """(number, line) of each that is not blank."""
    return [(number, line.rstrip("\r\n")) for number, line in _all_lines(path) if line.strip()]


def _all_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Only "\\n" ends a line: texts hold other separators of Unicode."""
    number = 0
    refuse_pipe(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, content in enumerate(file, start=1):
                yield number, content.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}, row {number}: not UTF-8; save it as UTF-8 text") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged or cut short: {error}; fetch it again") from None


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line that it begins on, cells) of each row that is not blank; quoted cells may hold line breaks."""
    before = csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader((line for _, line in _all_lines(path)), strict=True)
    begun = 1
    try:
        for cells in reader:
            if cells:
                yield begun, cells
            begun = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, row {begun}: no CSV ({error}); quote cells with line breaks, commas or quotes, and double the "
            "quotes inside"
        ) from None
    finally:
        csv.field_size_limit(before)


def _table(path: Path, rows: Rows, names: Sequence[str], say: Say) -> Table:
    good = [(row, cells) for row, cells in rows if len(cells) == len(names)]
    if num_bad := len(rows) - len(good):
        bad = next(row for row, cells in rows if len(cells) != len(names))
        if num_bad > MALFORMED_SHARE * len(rows):
            raise UserError(
                f"{path}: {num_bad:,} of {len(rows):,} rows do not have the {len(names)} columns {', '.join(names)}; "
                f"the first is row {bad}; {MEND}"
            )
        say(f"{path}: {num_bad:,} rows without {len(names)} columns are left out; the first is row {bad}")
    columns = {name: [cells[index] for _, cells in good] for index, name in enumerate(names)}
    return Table(columns, str(path), [row for row, _ in good])


def _json_table(path: Path, lines: Sequence[tuple[int, str]]) -> Table:
    records = []
    for row, line in lines:
        record = parse_json(line, f"{path}, row {row}", MEND)
        if not isinstance(record, dict):
            raise UserError(f"{path}, row {row}: not a JSON object with named fields; {MEND}")
        records.append(record)
    names = dict.fromkeys(itertools.chain.from_iterable(records))
    columns = {name: [record.get(name) for record in records] for name in names}
    return Table(columns, str(path), [row for row, _ in lines])


def _conll_table(task: Task, path: Path) -> Table:
    """A token and its tags on each line, a blank line after each sentence (Tjong Kim Sang and De Meulder 2003).

    Without column names the token is the first and the tag the last of a line. Lines that begin with "-DOCSTART-" are
    left out, and such that begin with "#" and have another number of columns: comments.
    """
    words, tags = task.texts[0][0], task.label[0]
    names, text_at, tag_at = task.headerless, 0, -1
    if names is not None:
        missing = [name for name in (words, tags) if name not in names]
        if missing:
            raise UserError(f"{path}: --columns {' '.join(names)} names no column {missing[0]}")
        text_at, tag_at = names.index(words), names.index(tags)
    sentences: list[tuple[int, list[str], list[str]]] = []
    num_columns, inside = len(names) if names is not None else None, False
    for row, line in _all_lines(path):
        cells = line.split()
        inside = inside and bool(cells) and cells[0] != "-DOCSTART-"
        if not cells or cells[0] == "-DOCSTART-" or (len(cells) != num_columns and cells[0].startswith("#")):
            continue
        num_columns = num_columns or len(cells)
        if len(cells) != num_columns or num_columns < 2:
            raise UserError(
                f"{path}, row {row}: {len(cells)} columns where {max(num_columns, 2)} are wanted, a token first and "
                f"its tag last; {MEND}"
            )
        if not inside:
            sentences.append((row, [], []))
            inside = True
        sentences[-1][1].append(cells[text_at])
        sentences[-1][2].append(cells[tag_at])
    if not sentences:
        raise UserError(f"{path} is empty; fetch it again")
    rows, tokens, labels = zip(*sentences, strict=True)
    return Table({words: tokens, tags: labels}, str(path), rows)


def _read_class_folders(task: Task, folder: Path) -> Table:
    """aclImdb: pos/ and neg/ with a text in each file, whose name is its id."""
    assert task.labels is not None
    files = [(path, label) for label in task.labels for path in sorted((folder / label).glob("*.txt"))]
    columns = {
        "id": [f"{label}/{path.stem}" for path, label in files],
        task.texts[0][0]: [path.read_text(encoding="utf-8", errors="replace") for path, _ in files],
        task.label[0]: [label for _, label in files],
    }
    return Table(columns, str(folder), range(1, len(files) + 1))
