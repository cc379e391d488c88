"""One table type, shown on a terminal, in Markdown and in HTML."""

from __future__ import annotations

import html
import io
import itertools
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable

DASH = "–"  # noqa: RUF001
"""Where there is no figure."""


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    heading: str
    """A "\\n" breaks it on a terminal, and is a space elsewhere."""
    group: str = ""
    """A heading above it, shared with its neighbours; a terminal shows none."""
    is_number: bool = True
    """Numbers stand to the right."""
    css_class: str = ""


@dataclass(frozen=True)
class Table:
    """Cells of text; the first column names the row."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def as_text(self, width: int | None = None) -> str:
        """Title, table and notes, without spaces at the lines' ends.

        Columns of numbers that do not fit follow below, in a second block with the rows' names; neighbours with the
        same group stay together. In a table without numbers, words are broken, but not in the first two columns, such
        as a host and a check.

        Args:
            width: characters a line in the table; None for those of the terminal, 118 at most.
        """
        width = width or text_width()
        text = io.StringIO()
        console = Console(width=width, file=text, highlight=False, markup=False, emoji=False)
        has_numbers = any(column.is_number for column in self.columns)
        for number, block in enumerate(self._blocks(width) if has_numbers else [range(len(self.columns))]):
            title = self.title if number == 0 else ""
            table = RichTable(title=title or None, title_justify="left")
            for index in block:
                column = self.columns[index]
                table.add_column(
                    column.heading,
                    justify="right" if column.is_number else "left",
                    no_wrap=not has_numbers and index < 2,
                )
            for row in self.rows:
                table.add_row(*(row[index] for index in block))
            console.print(table)
        return "\n".join([*(line.rstrip() for line in text.getvalue().splitlines()), *self.notes])

    def _blocks(self, width: int) -> list[list[int]]:
        """The columns' numbers by block, the first in each."""
        between = 3  # a space on both sides, and a rule
        taken = (
            [
                between
                + max(cell_len(line) for cell in (column.heading, *cells) for line in cell.split("\n"))
                for column, cells in zip(self.columns, zip(*self.rows, strict=True), strict=True)
            ]
            if self.rows
            else [between + cell_len(column.heading) for column in self.columns]
        )
        blocks, used = [[0]], 1 + taken[0]
        for _, members in itertools.groupby(
            range(1, len(taken)), lambda index: self.columns[index].group or index
        ):
            group = list(members)
            if used + sum(taken[index] for index in group) > width and len(blocks[-1]) > 1:
                blocks.append([0])
                used = 1 + taken[0]
            blocks[-1] += group
            used += sum(taken[index] for index in group)
        return blocks

    def as_markdown(self, escape: Callable[[str], str] = str) -> str:
        """Table and notes, without the title, whose level the document decides.

        Args:
            escape: for every text; `markdown_escaped` where names in it are not our own.
        """

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(escape(" ".join(cell.split())) for cell in cells) + " |"

        headings = [": ".join(filter(None, (column.group, column.heading))) for column in self.columns]
        rule = "".join("---:|" if column.is_number else "---|" for column in self.columns)
        lines = [line(headings), f"|{rule}", *map(line, self.rows)]
        return "\n".join(
            [*lines, *([""] if self.notes else []), *(f"* {escape(note)}" for note in self.notes)]
        )

    def as_html(self) -> Markup:
        """The <table>, without the notes; every text is escaped."""
        classes = [self._classes(index) for index in range(len(self.columns))]
        head = [
            Markup('<th scope="col" class="{}">{}</th>').format(name, column.heading)
            if column.heading
            else Markup("<td></td>")
            for name, column in zip(classes, self.columns, strict=True)
        ]
        body = [
            [
                Markup('<th scope="row" class="words">{}</th>').format(row[0]),
                *(Markup('<td class="{}">{}</td>').format(*cell) for cell in zip(classes[1:], row[1:], strict=True)),
            ]
            for row in self.rows
        ]  # fmt: skip
        return Markup(
            "<table>\n<caption><span>{}</span></caption>\n<thead>\n{}</thead>\n<tbody>\n{}</tbody>\n</table>"
        ).format(self.title, _html_rows([*self._html_groups(), head]), _html_rows(body))

    def _html_groups(self) -> list[list[Markup]]:
        """The row of the columns' groups; none where no column has one."""
        cells = []
        for group, members in itertools.groupby(self.columns, lambda column: column.group):
            columns = list(members)
            if group:
                opening = Markup('<th scope="colgroup" colspan="{}" class="{}">{}</th>')
                cells.append(opening.format(len(columns), columns[0].css_class, group))
            else:
                cells.append(Markup('<td colspan="{}"></td>').format(len(columns)))
        return [cells] if any(column.group for column in self.columns) else []

    def _classes(self, index: int) -> str:
        column = self.columns[index]
        begins_group = column.group and column.group != self.columns[index - 1].group
        names = ("" if column.is_number else "words", column.css_class, "first" if begins_group else "")
        return " ".join(filter(None, names))


def text_width() -> int:
    """Characters a line on this terminal, 118 at most; 118 where the output is no terminal and COLUMNS is not set.

    A terminal that says it has 0 columns gets 80.
    """
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return max(40, min(118, shutil.get_terminal_size((80 if is_terminal else 118, 24)).columns))


def text_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    right: bool = True,
    width: int | None = None,
) -> str:
    """A table for a terminal, as `Table.as_text` makes it.

    Args:
        right: the columns but the first, which names the row, stand to the right; else to the left.
    """
    found = [Column(heading, is_number=right and index > 0) for index, heading in enumerate(columns)]
    return Table(title, found, rows).as_text(width)


def markdown_escaped(text: str) -> str:
    """Text that Markdown shows as it is: no HTML, no emphasis, no new cell or line."""
    escaped = re.sub(r"([\\`*_\[\]|~])", r"\\\1", " ".join(text.split()))
    return html.escape(escaped, quote=False)


def _html_rows(rows: Sequence[Sequence[Markup]]) -> Markup:
    return Markup("").join(Markup("<tr>{}</tr>\n").format(Markup("").join(row)) for row in rows)
