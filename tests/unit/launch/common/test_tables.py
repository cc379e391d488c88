"""Tables on narrow terminals: no line is wider, and no cell is broken or lost."""

from __future__ import annotations

import re

import pytest

from launch.common.tables import Column, Table, text_table

HEADINGS = ("run", *(f"figure {letter}\n(nats)" for letter in "abcdefghij"))
ROWS = [(name, *(f"{name}-{number:04}" for number in range(10))) for name in ("teacher", "student")]


@pytest.mark.parametrize("columns", ["80", "60", "200", "0"])
def test_columns_that_do_not_fit_follow_below(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = text_table(HEADINGS, ROWS, title="Scores")
    width = {"0": 118}.get(columns) or min(118, int(columns))
    assert max(map(len, text.splitlines())) <= width
    cells = [cell.strip() for line in text.splitlines() for cell in line.split("│")]
    for row in ROWS:
        assert all(cells.count(cell) == 1 for cell in row[1:])
    num_blocks = text.count("┏")
    assert num_blocks == (2 if width == 118 else 3 if width == 80 else 4) == cells.count("teacher")
    assert text.count("Scores") == 1


def test_columns_of_a_group_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    columns = [Column("variant", is_number=False)]
    for name in ("loss", "agreement", "KL"):
        columns += [Column(name, group=name), Column("to full", group=name)]
    text = Table("", columns, [("full", "1.2345", "0", "1.2345", "0", "1.2345", "0")]).as_text()
    headings = [line for line in text.splitlines() if "variant" in line]
    assert [re.findall(r"[a-zK][a-zL ]+", line) for line in headings] == [
        ["variant ", "loss ", "to full "],
        ["variant ", "agreement ", "to full "],
        ["variant ", "KL ", "to full "],
    ]


def test_a_terminal_of_words_breaks_the_last_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = text_table(("check", "", "seen"), [("shards", "well", "word " * 40)], right=False)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("word") == 40


def test_names_stay_as_they_are() -> None:
    """rich would take some for markup, and others for pictures."""
    names = ["[red]model[/red]", "runs:cat:1"]
    text = text_table(("run", "loss"), [(name, "1") for name in names])
    assert all(name in text for name in names)
