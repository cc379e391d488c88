"""Tables for a terminal, and for files that quote it."""

from __future__ import annotations

import io
from collections.abc import Sequence


def text_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None, right: bool = True
) -> str:
    """A table of at most 118 characters a line, without spaces at the lines' ends.

    Args:
        columns: headings; "\\n" breaks one. The first column stands to the left.
        right: whether the others stand to the right, as numbers do; else all stand to the left, the first two, such as
            a host and a check, unbroken.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(columns):
        table.add_column(
            heading, justify="right" if right and index else "left", no_wrap=not right and index < 2
        )
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(width=118, file=text, highlight=False, markup=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
