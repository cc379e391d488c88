"""Every kind of source gives the same documents; every kind of bad input gives one clear line."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
import zstandard

from data_prep.sources import pages
from data_prep.sources.formats import FORMATS, document_of
from data_prep.sources.records import Reading, ReadOptions
from data_prep.sources.resolve import chunk_bytes, make_units, resolve_sources
from data_prep.sources.streams import DamagedFile, open_stream
from data_prep.sources.texts import BadRecord
from tests.unit.data_prep.sources.given import PACK, TEXTS, json_lines, read


@pytest.mark.parametrize("ending", list(PACK))
def test_files_plain_and_packed(tmp_path: Path, ending: str) -> None:
    pack = PACK[ending]
    (tmp_path / f"a.jsonl{ending}").write_bytes(pack(json_lines(TEXTS)))
    assert read(str(tmp_path / f"a.jsonl{ending}")) == TEXTS
    one = "\ufeff" + TEXTS[0].replace("\n", "\r\n")
    (tmp_path / f"b.txt{ending}").write_bytes(pack(one.encode()))
    assert read(str(tmp_path / f"b.txt{ending}")) == TEXTS[:1]
    blocks = "\n \n\n".join(TEXTS).encode()
    (tmp_path / f"c.txt{ending}").write_bytes(pack(blocks))
    assert read(str(tmp_path / f"c.txt{ending}"), txt_documents="block") == TEXTS
    assert read(f"block:{tmp_path}/c.txt{ending}") == TEXTS
    assert read(f"line:{tmp_path}/c.txt{ending}") == [*TEXTS[0].split("\n"), *TEXTS[1:]]
    wiki = "".join(f'<doc id="{n}" url="u" title="t">\n{text}\n</doc>\n' for n, text in enumerate(TEXTS))
    (tmp_path / "AA").mkdir()
    (tmp_path / "AA" / f"wiki_00{ending}").write_bytes(pack(wiki.encode()))
    (tmp_path / "AA" / f"wiki_01{ending}").write_bytes(pack(json_lines(TEXTS)))
    assert read(str(tmp_path / "AA")) == TEXTS * 2


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_parquet(tmp_path: Path, ending: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": [1, 2, 3], "body": TEXTS}), tmp_path / "a.parquet", row_group_size=2)
    path = tmp_path / f"b.parquet{ending}"
    path.write_bytes(PACK[ending]((tmp_path / "a.parquet").read_bytes()))
    assert read(str(path), fields=("text", "body")) == TEXTS
    with pytest.raises(ValueError, match=r"b\.parquet.*: no text field 'text'; the fields are 'id', 'body'"):
        read(str(path))
    with pytest.raises(ValueError, match="the field 'id' holds int64, not a text"):
        read(str(path), fields=("id",))


def test_folder_saved_by_datasets(tmp_path: Path) -> None:
    import datasets

    dataset = datasets.Dataset.from_dict({"text": TEXTS, "n": [1, 2, 3]})
    dataset.save_to_disk(str(tmp_path / "one"))
    assert read(str(tmp_path / "one")) == TEXTS
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(str(tmp_path / "two"))
    assert read(str(tmp_path / "two" / "test")) == TEXTS
    with pytest.raises(ValueError, match=r"holds several splits \(test, train\); name one: .*/two/test"):
        read(str(tmp_path / "two"))


def test_hub_streams(tmp_path: Path) -> None:
    """`datasets` takes a local folder for a hub dataset, which spares the network here."""
    for number, text in enumerate(TEXTS):
        (tmp_path / f"train-{number}.jsonl").write_bytes(json_lines([text]))
    assert read(f"hub:{tmp_path}") == TEXTS
    sources = resolve_sources([f"hub:{tmp_path}"])
    assert [len(unit.files) for unit in make_units(sources)] == [1, 1, 1], (
        "each part is work for another process"
    )
    assert chunk_bytes(sources) == 32 << 20
    assert read(f"hub:{tmp_path}:default:train") == TEXTS
    with pytest.raises(ValueError, match=r"hub:.*:default:valid: the dataset cannot be streamed: "):
        read(f"hub:{tmp_path}:default:valid")
    with pytest.raises(ValueError, match="write hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT"):
        read("hub:a::b")


@pytest.mark.parametrize("ending", list(PACK))
def test_endings_in_capitals_are_the_same(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"A.TXT{ending.upper()}").write_bytes(PACK[ending](TEXTS[0].encode()))
    assert read(str(tmp_path)) == TEXTS[:1]


@pytest.mark.parametrize("ending", list(PACK))
def test_csv(tmp_path: Path, ending: str) -> None:
    texts = ['One, with "quotes"\nand a line more.', "Two — 漢字.", "Three."]
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    rows = "\r\n".join(["\ufeffid,text", *(f"{number},{text}" for number, text in enumerate(quoted)), ""])
    path = tmp_path / f"a.csv{ending}"
    path.write_bytes(PACK[ending](rows.encode()))
    assert read(str(path)) == texts
    with pytest.raises(ValueError, match=r"no text field 'body'; the fields are 'id', 'text'"):
        read(str(path), fields=("body",))
    with pytest.raises(ValueError, match=r"no \.txt.*; of \.csv files name them: '.*/\*\.csv'"):
        read(str(tmp_path))
    (tmp_path / "b.txt").write_text("Beside it.")
    assert read(str(tmp_path)) == ["Beside it."]
    assert read(f"{tmp_path}/*.csv{ending}") == texts


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (b"id,text\n1,a\n2,\xff\n", r"invalid UTF-8 \(byte 0xff at offset 0\)"),
        (b"id,text\n1\n", "the row has too few cells"),
        (b'id,text\n1,"a\n', r"a\.csv, line 2: no CSV \(unexpected end of data\)"),
        (b'id,text\n1,"a"b\n', r"a\.csv, line 2: no CSV"),
        (b"id,text\n1," + b"x" * 1_000_003 + b"\n", r"line 2: no CSV \(field larger than field limit"),
        (b"", "no text field 'text'; the fields are none"),
    ],
)
def test_bad_csv(tmp_path: Path, rows: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(rows)
    with pytest.raises(ValueError, match=message):
        read(str(tmp_path / "a.csv"), max_document_mb=1)


def test_markdown_is_its_words(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(
        "---\ntitle: x\n---\n# Head *of* it\n\nA [link](http://x.y) and ![a picture](p.png), `code`\nnext line\n\n"
        "- one\n- two\n  - deep\n\n> quoted &amp; <b>bold</b>\n\n```py\nx = 1\n\ny = 2\n```\n\n<div>left out</div>\n\n"
        "| a | b |\n|---|---|\n| 1 | *2* |\n"
    )
    assert read(str(tmp_path)) == [
        "Head of it\n\nA link and a picture, code\nnext line\n\none\n\ntwo\n\ndeep\n\nquoted & bold\n\n"
        "x = 1\n\ny = 2\n\na\tb\n\n1\t2"
    ]
    (tmp_path / "a.md").write_text("<!-- nothing -->\n")
    (tmp_path / "b.md").touch()
    assert read(str(tmp_path)) == ["", ""]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\n\nFirst part\n\n---\n\nSecond", "First part\n\nSecond"),
        ("---\nFirst part\n\n---\n\nSecond", "First part\n\nSecond"),
        ("---\n\na: b\n\n---\n\nSecond", "a: b\n\nSecond"),
        ("---\na: [b\n---\n\nSecond", "a: [b\n\nSecond"),
        pytest.param(
            "---\n" + "[" * 9000 + "\n\n---\n\nSecond", "[" * 9000 + "\n\nSecond", id="nested 9000 deep"
        ),
        ('---\na: "\\UFFFFFFFF"\n---\n\nSecond', 'a: "\\UFFFFFFFF"\n\nSecond'),
        ("\ufeff---\r\na: b\r\nc:\r\n  - d\r\n---\r\n\r\nSecond", "Second"),
        ("---\n# of: it\na: b\n---", ""),
    ],
)
def test_front_matter_is_a_mapping(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "a.md").write_bytes(text.encode())
    assert read(str(tmp_path)) == [found]


def test_html_is_its_main_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paragraphs = [
        f"Paragraph {n} of the page has a number of words so that it counts as text — 漢字." for n in (1, 2)
    ]
    body = "".join(f"<p>{text}</p>" for text in paragraphs)
    page = f"<html><body><nav><a href='/'>Home</a></nav><article><h1>Title</h1>{body}</article></body></html>"
    (tmp_path / "a.html").write_text(page)
    [found] = read(str(tmp_path))
    assert found == "\n".join(["Title", *paragraphs])
    (tmp_path / "b.htm.gz").write_bytes(gzip.compress(b"<html></html>"))
    with pytest.raises(BadRecord, match="no text is in it"):
        read(str(tmp_path / "b.htm.gz"))
    pages._extractor.cache_clear()
    monkeypatch.setitem(sys.modules, "trafilatura", None)
    with pytest.raises(ValueError, match=r"trafilatura, which is not installed .*requirements-sources\.txt"):
        read(str(tmp_path / "a.html"))
    pages._extractor.cache_clear()


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "nonsense"])
def test_damaged_files_are_named(tmp_path: Path, ending: str, damage: str) -> None:
    packed = PACK[ending](json_lines(TEXTS * 50))
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(packed[: len(packed) // 2] if damage == "cut" else b"nonsense" * 9)
    with pytest.raises(DamagedFile, match=rf"a\.jsonl\{ending} is damaged"):
        read(str(path))


def test_zstd_frames_one_after_another(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"") + zstandard.compress(b"two"))
    with open_stream(str(path)) as opened:
        assert opened.stream.read() == b"one two"
        assert opened.position() == path.stat().st_size


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "open', r"not valid JSON \(Unterminated string starting at column 10\)"),
        (b"[" * 100_000, "nested too deeply"),
        (b'["text"]', "a JSON list where an object with the text was expected"),
        (b'{"text": null}', "the field 'text' holds null, not a text"),
        (b'{"text": 3.5}', "the field 'text' holds a number, not a text"),
        (
            b'{"body": "x", "id": 1}',
            r"no text field 'text'; the fields are 'body', 'id' \(choose with --text-field\)",
        ),
        (b'{"n": ' + b"9" * 5000 + b"}", r"not valid JSON \(Exceeds the limit"),
        (b'{"text": "\xff"}', r"invalid UTF-8 \(byte 0xff at offset 10\)"),
        (b'{"text": "\\ud800"}', r"half of a surrogate pair \(U\+D800 at character 0\)"),
    ],
)
def test_bad_json_lines(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(line + b"\n")
    with pytest.raises(BadRecord, match=message):
        read(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'<doc id="1">\nno end', "a <doc> without its </doc>"),
        (b"loose text\n", "text outside <doc>"),
        (b'{"text": 1}\n', "holds a number"),
    ],
)
def test_bad_wiki_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "wiki_00").write_bytes(content)
    with pytest.raises(BadRecord, match=message):
        read(str(tmp_path / "wiki_00"))


def in_mode(mode: str, text: str) -> bytes:
    """A file of two documents, `text` and "end"; where a file is one document, of `text`."""
    lines = {"file": text, "line": f"{text}\nend\n", "block": f"{text}\n\nend\n"}
    lines["jsonl"] = f"{json.dumps({'text': text})}\n{json.dumps({'text': 'end'})}\n"
    lines["wiki"] = f'<doc id="1">\n{text}\n</doc>\n<doc id="2">\nend\n</doc>\n'
    return lines[mode].encode()


@pytest.mark.parametrize("mode", ["file", "line", "block", "jsonl", "wiki", "parquet"])
def test_a_document_beyond_the_limit_is_a_bad_record(tmp_path: Path, mode: str) -> None:
    """At the limit it is read; a byte more, or very much more, is refused, and the one after it is read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = {"wiki": "wiki_00", "jsonl": "a.jsonl", "parquet": "a.parquet"}.get(mode, "a.txt")
    line = "word é " * 1000 + "\n"
    unit = line if mode in ("file", "jsonl", "wiki", "parquet") else line.replace("\n", " ")
    at_limit = (unit * 200)[: 1_000_000 - 200 * 1000 - 4] + "."
    at_limit += "x" * (1_000_000 - len(at_limit.encode()))
    for text, good in ((at_limit, True), (at_limit + "x", False), (at_limit * 3, False)):
        if mode == "parquet":
            pq.write_table(pa.table({"text": [text, "end"]}), tmp_path / name)
        else:
            (tmp_path / name).write_bytes(in_mode(mode, text))
        kind = "file" if mode in ("jsonl", "wiki", "parquet") else mode
        options, found = ReadOptions(max_document_mb=1), []
        for unit_ in make_units(resolve_sources([str(tmp_path / name)], kind)):
            for record in FORMATS[unit_.files[0].format].read(unit_.files[0], options, Reading()):
                try:
                    found.append(document_of(record, unit_.files[0].format, options))
                except BadRecord as error:
                    found.append(str(error))
        refusal = "a document of more than 1 MB (raise --max-document-mb, or split it; "
        assert found[0] == text if good else found[0].startswith(refusal)
        assert found[1:] == ([] if mode == "file" else ["end"])


# ------------------------------------------------------------------------------------------ installed-docs
