"""Near-duplicates: which go, that it depends on the set of documents alone, and how often MinHash sees them."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import write_shards
from data_prep.passes.near_duplicates import BANDS, ROWS, RUN, Signatures, near_duplicates
from data_prep.shard_format.manifest import Manifest
from tests.conftest import WORDS
from tests.distributed.data_prep_runs import contents
from tests.unit.data_prep.passes.test_mixture import make
from tests.unit.data_prep.writing import documents_in


def runs(tokens: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(tokens[start : start + RUN].tolist()) for start in range(len(tokens) - RUN + 1)}


def test_documents_agree_in_a_band_as_often_as_the_formula_says() -> None:
    """P = 1 - (1 - s^rows)^bands for runs of which the share s is common (Leskovec et al., section 3.4.2)."""
    rng, signatures = np.random.default_rng(0), Signatures()
    found, expected = [], []
    for _ in range(150):
        first = rng.integers(0, 30_000, 400).astype(np.uint16)
        second = first.copy()
        cut = int(rng.integers(0, 160))
        second[len(second) - cut :] = rng.integers(0, 30_000, cut)
        common = len(runs(first) & runs(second)) / len(runs(first) | runs(second))
        expected.append(1 - (1 - common**ROWS) ** BANDS)
        found.append(bool((signatures.bands(first) == signatures.bands(second)).any()))
    assert 0.2 < np.mean(expected) < 0.8
    assert np.mean(found) == pytest.approx(np.mean(expected), abs=0.1)
    short = np.array([1, 2, 3], dtype=np.uint16)
    assert (signatures.bands(short) == signatures.bands(short)).all()
    long = np.arange(20_000, dtype=np.uint32)
    assert (signatures.bands(long) == Signatures().bands(np.tile(long, 2)[: len(long)])).all()


@settings(deadline=None, max_examples=80)
@given(
    values=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=30),
    copies=st.integers(0, 10),
    data=st.data(),
)
def test_whoever_shares_a_band_with_a_lower_key_goes(
    values: list[tuple[int, int]], copies: int, data: st.DataObject
) -> None:
    rows = [*range(len(values)), *(index % len(values) for index in range(copies))]
    rows = data.draw(st.permutations(rows))
    keys = np.array([row * 7 for row in rows], dtype=np.uint64)
    bands = [np.array([values[row][band] for row in rows], dtype=np.uint64) for band in (0, 1)]
    found = near_duplicates(keys, bands)
    for index, row in enumerate(rows):
        lower = range(row)
        shares = any(values[row][band] == values[other][band] for band in (0, 1) for other in lower)
        assert found[index] == shares


def test_near_duplicates_are_dropped_and_counted(
    tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    words = list(WORDS)
    texts = [" ".join(rng.choices(words, k=120)) for _ in range(150)]
    near = [f"{text} once more" for text in texts[:40]]  # 1 run in 40 is another
    sources = {"one": [*texts, texts[0]], "two": [*near, near[0], texts[1]]}
    for name, lines in sources.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    options = ["--tokenizer", tokenizer_folder, "--shard-tokens", 3000, "--heldout-fraction", 0.1]
    assert make(*files, *options, "--drop-near-duplicates", "--out", tmp_path / "a") == 0
    assert "40 near duplicates" in capsys.readouterr().out
    manifest = Manifest.load(tmp_path / "a")
    assert manifest.options["drop_near_duplicates"] is True
    assert manifest.skipped == {"bad_records": 0, "duplicates": 3, "near_duplicates": 40, "too_short": 0}
    train, heldout = documents_in(tmp_path / "a"), documents_in(tmp_path / "a", "heldout")
    assert len(train) + len(heldout) == 150
    starts = [document[:100] for document in (*train, *heldout)]
    assert len(set(starts)) == 150, "one of each pair is left"
    assert make(*files[::-1], *options, "--drop-near-duplicates", "--out", tmp_path / "b", processes=2) == 0
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert {name: data for name, data in first.items() if name.endswith(".tar")} == {
        name: data for name, data in second.items() if name.endswith(".tar")
    }
    weighted = [f"{files[0]}@1", f"{files[1]}@1"]
    assert make(*weighted, *options, "--drop-near-duplicates", "--out", tmp_path / "c") == 0
    mixed = Manifest.load(tmp_path / "c")
    assert mixed.skipped["near_duplicates"] == 40
    assert len({document[:100] for document in documents_in(tmp_path / "c")}) == len(train)
    assert make(*files, *options, "--out", tmp_path / "a") == 2
    assert "drop_near_duplicates True instead of None" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "datasketch", None)
    assert (
        write_shards.main([*map(str, files), "--drop-near-duplicates", "--tokenizer", "t", "--out", "x"]) == 2
    )
    assert "datasketch, which is not installed" in capsys.readouterr().err
