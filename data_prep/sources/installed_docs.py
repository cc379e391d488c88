"""The source `installed-docs`: the English documentation inside the packages of this Python environment.

Docstrings are read from the source files with `ast`, never by importing; pydoc's topics come with them. One
document is one docstring of at least MIN_CHARACTERS characters. The same environment gives the same documents
in the same order.
"""

from __future__ import annotations

import ast
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator

from data_prep.sources.records import Reading, ReadOptions, Record, SourceFile

MIN_CHARACTERS = 200
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
_OWNERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_SURROGATE = re.compile("[\ud800-\udfff]")
"""Some generated code spells text with these, which no encoding takes."""


def installed_doc_files() -> list[SourceFile]:
    """Every Python file of site-packages, then of the standard library; in each, sorted by path."""
    roots = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), sysconfig.get_path("stdlib")]
    files = []
    for root in dict.fromkeys(map(os.path.realpath, roots)):
        found = []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
            found += [os.path.join(folder, name) for name in names if name.endswith(".py")]
        # An editor leaves links to nothing; another user's files may be unreadable.
        readable = [path for path in sorted(found) if os.access(path, os.R_OK)]
        files += [SourceFile(path, "installed-docs", os.path.getsize(path)) for path in readable]
    return files


def read_docstrings(file: SourceFile, options: ReadOptions, reading: Reading) -> Iterator[Record]:
    reading.position = lambda: file.bytes
    with open(file.path, "rb") as source:
        content = source.read()
    topics = file.path.endswith(os.path.join("pydoc_data", "topics.py"))
    for text in _topics(content) if topics else docstrings(content):
        yield Record("", text, len(text))


def docstrings(source: bytes) -> list[str]:
    """The docstrings of one file's module, classes and functions, in the order in which they stand.

    A file that this Python cannot parse (templates, other versions' syntax) has none.
    """
    if not _may_have_long_docstring(source):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    texts = []
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, _OWNERS) and (text := ast.get_docstring(node)) and len(text) >= MIN_CHARACTERS:
            texts.append(text)
        inner = [child for part in ("body", "orelse", "finalbody") for child in getattr(node, part, ())]
        nodes += [
            child for child in reversed(inner) if isinstance(child, (*_OWNERS, ast.If, ast.Try, ast.With))
        ]
    return [text for text in texts if not _SURROGATE.search(text)]


def _may_have_long_docstring(source: bytes) -> bool:
    """Parsing is nearly all of the cost, and half of the files have no triple-quoted string that is long."""
    return any(
        len(part) >= MIN_CHARACTERS for quote in (b'"""', b"'''") for part in source.split(quote)[1::2]
    )


def _topics(source: bytes) -> list[str]:
    """The texts of pydoc_data.topics, which is one dictionary of literals."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return [topics[name] for name in sorted(topics)]
    return []
