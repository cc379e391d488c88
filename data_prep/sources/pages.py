"""Markdown and HTML to text, a document for each file."""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

import yaml
from markdown_it import MarkdownIt

from data_prep.shard_format.errors import UserError
from data_prep.shard_format.required_packages import install_command
from data_prep.sources.records import ReadOptions, Record
from data_prep.sources.text_files import text_of
from data_prep.sources.texts import BadRecord

_FRONT_MATTER = re.compile(r"\A\ufeff?---\r?\n(?=[ \t]*\S)(.*?)\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_INLINE = {"softbreak": "\n", "hardbreak": "\n", "html_inline": ""}
_VERBATIM = ("fence", "code_block")


def parse_markdown(record: Record, options: ReadOptions) -> str:
    """The words of CommonMark with tables, block by block with a blank line between; code stays.

    Front matter, HTML and the addresses of links are left out; of images their descriptions stay. A file of nothing
    else is an empty document, too short like any other.
    """
    text = _without_front_matter(text_of(record.payload, options))
    blocks: list[str] = []
    row: list[str] | None = None
    for token in _markdown().parse(text):
        if token.type == "tr_open":
            row = []
        elif token.type == "tr_close" and row is not None:
            blocks.append("\t".join(row))
            row = None
        elif token.type == "inline":
            inline = "".join(_INLINE.get(child.type, child.content) for child in token.children or ())
            (blocks if row is None else row).append(inline)
        elif token.type in _VERBATIM:
            blocks.append(token.content.rstrip("\n"))
    return "\n\n".join(block for block in blocks if block.strip())


def _without_front_matter(text: str) -> str:
    """Front matter is a YAML mapping between a first line --- and the next one; a first line --- is else a rule."""
    found = _FRONT_MATTER.match(text)
    if found is None:
        return text
    try:
        node = yaml.compose(found[1], Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):  # of ill escapes, and of depth
        return text
    return text[found.end() :] if isinstance(node, yaml.MappingNode) else text


@functools.cache
def _markdown() -> MarkdownIt:
    return MarkdownIt("commonmark").enable("table")


def parse_html(record: Record, options: ReadOptions) -> str:
    """The main text of a page by trafilatura (Barbaresi 2021), without menus, adverts and comments.

    Raises:
        BadRecord: it finds none.
        UserError: it is not installed.
    """
    if len(record.payload) > options.max_text_record:
        raise options.too_long()
    text = _extractor()(bytes(record.payload), include_comments=False, include_tables=True) or ""
    if not text.strip():
        raise BadRecord("no text is in it")
    return str(text)


@functools.cache
def _extractor() -> Any:
    try:
        import trafilatura
    except ImportError as error:
        raise UserError(
            f"HTML is read with the package trafilatura, which is not installed ({error}): "
            f"{install_command('sources')}"
        ) from None
    # It warns of pages without text: we name them.
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
    return trafilatura.extract
