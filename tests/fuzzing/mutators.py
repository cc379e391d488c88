"""Damage to files, as disks, broken copies and hasty editors do it. All of it is a function of a random generator."""

from __future__ import annotations

import copy
import gzip
import json
import os
import random
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from data_prep.sources.streams import COMPRESSIONS

RAW = {
    "@RAW0@": "1e999",
    "@RAW1@": "-Infinity",
    "@RAW2@": "NaN",
    "@RAW3@": "9" * 5000,
    "@RAW4@": "[" * 20_000 + "]" * 20_000,
    "@RAW5@": '{"a":' * 20_000 + "1" + "}" * 20_000,
    "@RAW6@": '"\\ud800"',
}
"""Stands in a tree -> what is written in its place: JSON that Python's own writer does not make."""
ODD = [
    None, True, False, 0, -1, 1, 0.5, -1e-300, 1e300, 2**31, 2**53 + 1, 2**63, 10**30, "", " ", "0", "auto", "null",
    "a" * 5000, "\0", "é\u2028\n", "../../x", "x\x1b[31m", [], {}, [None], {"": {}}, [[[]]], *RAW,
]  # fmt: skip
ODD_BYTES = [
    b"\x00", b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\r\n", b"\xe2\x80\xa8", b"\x0c",
    b"\t", b'"', b"'", b"{", b"]", b"#", b"=", b"$(id)", b": ", b"- ", b"&a ", b"*a", b"!!python/none ", b"\x1a",
]  # fmt: skip
ODD_LINES = [
    "",
    " ",
    "\t\t\t",
    "#",
    "x",
    "null",
    "[]",
    "{}",
    "1",
    '"x"',
    "NaN",
    "x y z",
    "=",
    "a=b=c",
    "\\",
    "é",
    "- x",
]


KINDS = ("bytes", "lines", "tree")
"""Of damage: to any file, to text, to JSON and YAML. A file may also be gone, or another thing in its place.
Where a target says "folders", they may be mixed up."""
LONG_LINE_BYTES = 2**21
"""Two damages in a row would make 2 GB of SQuAD's one line."""
TEXTS = ("", ".txt", ".env", ".tsv", ".csv")


def damage(rng: random.Random, folder: Path, file: Path, wanted: Sequence[str] = KINDS) -> str:
    """Damage `file`, one of those in `folder`, in one to three ways of the `wanted` kinds; what was done, in words."""
    done = []
    for _ in range(1 if rng.random() < 0.8 else rng.randint(2, 3)):
        if not file.is_file() or file.is_symlink():
            break
        kinds: list[Callable[[random.Random, Path, Path], str]] = [_bytes, _bytes]
        if "lines" in wanted and (plain_suffix(file) in PARSERS or file.suffix in TEXTS):
            kinds += [_lines, _lines]
        if "tree" in wanted and plain_suffix(file) in PARSERS:
            kinds += [_tree, _tree, _tree]
        if "folders" in wanted:
            kinds += [_folders, _folders]
        done.append((_place if rng.random() < 0.06 else rng.choice(kinds))(rng, folder, file))
    return f"{file.relative_to(folder)}: {'; '.join(done)}"


def plain_suffix(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix in COMPRESSIONS else file.suffix


# ------------------------------------------------------------------------------------------------------- bytes


def _bytes(rng: random.Random, folder: Path, file: Path) -> str:
    data = bytearray(file.read_bytes())
    if not data:
        file.write_bytes(rng.choice(ODD_BYTES))
        return "a few bytes in place of nothing"
    at = rng.choice((rng.randrange(len(data)), rng.randrange(min(len(data), 600))))
    length = rng.choice((1, 2, 8, rng.randint(1, 64), rng.randint(1, len(data))))
    kind = rng.choice(
        ("flip", "flip", "flip", "cut", "insert", "odd", "double", "leave out", "zero", "noise", "empty")
    )
    if kind == "flip":
        bit = rng.randrange(8)
        data[at] ^= 1 << bit
        kind = f"bit {bit} flipped"
    elif kind == "cut":
        del data[at:]
    elif kind == "insert":
        data[at:at] = rng.randbytes(min(length, 64))
    elif kind == "odd":
        data[at:at] = odd = rng.choice(ODD_BYTES)
        kind = f"{odd!r} inserted"
    elif kind == "double":
        data[at:at] = data[at : at + length]
    elif kind == "leave out":
        del data[at : at + length]
    elif kind == "zero":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif kind == "noise":
        data[at : at + length] = rng.randbytes(len(data[at : at + length]))
    else:
        data.clear()
    file.write_bytes(data)
    return f"{kind} at byte {at}"


# ------------------------------------------------------------------------------------------------------- lines


def _lines(rng: random.Random, folder: Path, file: Path) -> str:
    packed = file.suffix == ".gz"
    try:
        data = gzip.decompress(file.read_bytes()) if packed else file.read_bytes()
    except (OSError, EOFError, zlib.error):
        return _bytes(rng, folder, file)
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    kind = rng.choice(("leave out", "double", "swap", "cut", "odd", "long", "crlf", "join"))
    if kind == "leave out":
        del lines[at]
    elif kind == "double":
        lines.insert(at, lines[at])
    elif kind == "swap":
        other = rng.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == "cut":
        lines[at] = lines[at][: rng.randint(0, len(lines[at]))]
    elif kind == "odd":
        lines.insert(at, rng.choice(ODD_LINES).encode())
    elif kind == "long":
        lines[at] = (lines[at] or b"x") * max(2, min(2000, LONG_LINE_BYTES // (len(lines[at]) + 1)))
    elif kind == "crlf":
        lines = [line + b"\r" for line in lines]
    else:
        lines[at : at + 2] = [b" ".join(lines[at : at + 2])]
    data = b"\n".join(lines)
    file.write_bytes(gzip.compress(data, mtime=0) if packed else data)
    return f"line {at + 1}: {kind}"


# -------------------------------------------------------------------------------------------------------- tree


def _parse_lines(text: str) -> Any:
    return [json.loads(line) for line in text.splitlines()]


def _write_json(tree: Any) -> str:
    text = json.dumps(tree, indent=1)
    for mark, raw in RAW.items():
        text = text.replace(f'"{mark}"', raw)
    return text


def _write_lines(tree: Any) -> str:
    rows = tree if isinstance(tree, list) else [tree]
    return "".join(" ".join(_write_json(row).split("\n")) + "\n" for row in rows)


def _write_yaml(tree: Any) -> str:
    text = yaml.safe_dump(tree, sort_keys=False)
    for mark, raw in RAW.items():
        text = text.replace(f"'{mark}'", raw)
    return text


PARSERS: dict[str, tuple[Callable[[str], Any], Callable[[Any], str]]] = {
    ".json": (json.loads, _write_json),
    ".jsonl": (_parse_lines, _write_lines),
    ".yaml": (yaml.safe_load, _write_yaml),
}


def _tree(rng: random.Random, folder: Path, file: Path) -> str:
    """A value of another kind, a key left out, renamed or doubled, two values swapped: at any depth."""
    parse, write = PARSERS[plain_suffix(file)]
    try:
        data = file.read_bytes()
        tree = parse((gzip.decompress(data) if file.suffix == ".gz" else data).decode())
    except Exception:  # damaged already, in many ways
        return _bytes(rng, folder, file)
    places = list(_places(tree))
    # Few places near the root beside many leaves: half of the damage there.
    shallow = [place for place in places if len(place) <= 2]
    place = rng.choice(rng.choice((places, shallow or places)))
    kind = rng.choice(("odd", "odd", "odd", "leave out", "rename", "double", "swap", "number"))
    if not place:
        tree, kind = rng.choice(ODD), "odd"
    else:
        inside = _at(tree, place[:-1])
        key = place[-1]
        if kind == "leave out":
            del inside[key]
        elif kind == "rename" and isinstance(inside, dict):
            inside[rng.choice((f"{key}x", "", key.upper(), "é"))] = inside.pop(key)
        elif kind == "double" and isinstance(inside, list):
            inside.insert(key, copy.deepcopy(inside[key]))
        elif kind == "swap" and (other := rng.choice(places)):
            there, name = _at(tree, other[:-1]), other[-1]
            inside[key], there[name] = copy.deepcopy(there[name]), copy.deepcopy(inside[key])
        elif kind == "number" and isinstance(inside[key], (int, float)):
            inside[key] = rng.choice((-1, 2, 0.5, 1000)) * inside[key] + rng.choice((0, 1, -1))
        else:
            inside[key], kind = copy.deepcopy(rng.choice(ODD)), "odd"
    text = write(tree)
    content = text.encode(errors="surrogatepass")
    file.write_bytes(gzip.compress(content, mtime=0) if file.suffix == ".gz" else content)
    return f"{kind} at {'.'.join(map(str, place)) or 'the top'}"


def _places(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _places(value, (*place, key))


def _at(tree: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


# ------------------------------------------------------------------------------------------- something else there


def _place(rng: random.Random, folder: Path, file: Path) -> str:
    kind = rng.choice(("gone", "folder", "loop", "dangling", "pipe", "swapped"))
    others = sorted(path for path in folder.rglob("*") if path.is_file() and path != file)
    content = rng.choice(others).read_bytes() if others else b"x"
    if kind == "swapped":
        file.write_bytes(content)
        return "another file's content"
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "dangling":
        file.symlink_to("nowhere")
    elif kind == "pipe":
        os.mkfifo(file)
    return kind


def _folders(rng: random.Random, folder: Path, file: Path) -> str:
    """The file's folder is gone, renamed or replaced by another one; or the file by its namesake elsewhere."""
    parent = file.parent
    others = sorted(
        path for path in folder.rglob("*") if path.is_dir() and path not in (parent, *parent.parents)
    )
    namesakes = [path for path in folder.rglob(file.name) if path.is_file() and path != file]
    kind = rng.choice(("gone", "renamed", "replaced", "namesake", "namesake"))
    if kind == "namesake" and namesakes:
        file.write_bytes(rng.choice(namesakes).read_bytes())
    elif kind == "renamed":
        parent.rename(parent.with_name(f"{parent.name}-old"))
    elif kind == "replaced" and (beside := [path for path in others if parent not in path.parents]):
        shutil.rmtree(parent)
        shutil.copytree(rng.choice(beside), parent)
    else:
        shutil.rmtree(parent)
        kind = "gone"
    return f"its folder: {kind}"
