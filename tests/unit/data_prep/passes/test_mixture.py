"""Sources in given shares: exact in every shard, counted, and a function of the documents and the options alone."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import train_tokenizer, verify_shards, write_shards
from data_prep.passes.bucket_files import document_keys
from data_prep.passes.mixture import SourcedDocuments, plan_mixture, split_weights
from data_prep.shard_format.errors import UserError
from data_prep.shard_format.manifest import Manifest
from tests.distributed.data_prep_runs import contents
from tests.unit.data_prep.passes.test_placement import digests_of
from tests.unit.data_prep.writing import documents_in, make

NAMES = ("wiki", "books", "news")


def sourced(counts: Sequence[int]) -> SourcedDocuments:
    """So many documents of each source, in the order of their keys."""
    total = sum(counts)
    keys = document_keys(digests_of(list(range(total))), 0, 0.0)
    sources = np.repeat(np.arange(len(counts)), counts)
    lengths = np.array([200 + name * 7 % 400 for name in range(total)], dtype=np.int64)
    order = np.argsort(keys)
    return sources[order], keys[order], lengths[order]


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(1, 120), min_size=2, max_size=3),
    weights=st.lists(st.floats(0.05, 1), min_size=3, max_size=3),
    shard_tokens=st.integers(2048, 40_000),
    cap=st.none() | st.integers(20_000, 100_000),
)
def test_every_shard_holds_every_source_in_its_share(
    counts: list[int], weights: list[float], shard_tokens: int, cap: int | None
) -> None:
    documents = sources, keys, lengths = sourced(counts)
    weights = weights[: len(counts)]
    try:
        mixture = plan_mixture(lambda: [documents], NAMES[: len(counts)], weights, shard_tokens, cap)
    except UserError:  # a hundred times: see below
        return
    longest = lengths.max()
    own = np.bincount(sources, lengths).astype(int)
    total = cap or max(own / (np.array(weights) / sum(weights)))
    found = np.zeros((len(mixture.shards), len(counts)), dtype=int)
    times: Counter[tuple[int, int]] = Counter()
    for row, shard in zip(found, mixture.shards, strict=True):
        for part in shard.ranges:
            inside = (sources == part.source) & (part.low <= keys) & (keys < part.high)
            row[part.source] += lengths[inside].sum()
            times.update((part.source, int(key)) for key in keys[inside])
    for source, share in enumerate(mixture.shares):
        goal = total * weights[source] / sum(weights)
        assert abs(share.tokens - goal) <= longest + 1
        assert share.own_tokens == own[source]
        assert found[:, source].sum() == share.tokens
        # Each shard begins and ends its stretch within one document of its place.
        assert np.abs(found[:, source] - goal / len(mixture.shards)).max() <= longest + 1 or len(found) < 8
        seen = [times[source, int(key)] for key in keys[sources == source]]
        assert max(seen) - min(seen) <= 1, "no document twice before every other once"
        assert sum(seen) == share.documents
        assert share.unused == seen.count(0)
    if cap is None:
        assert min(share.epochs for share in mixture.shares) > 1 - longest / own.min() - 1e-6
    middle = np.uint64(1 << 62)
    halves = [tuple(column[side] for column in documents) for side in (keys < middle, keys >= middle)]
    assert mixture == plan_mixture(lambda: halves, NAMES[: len(counts)], weights, shard_tokens, cap)  # type: ignore[arg-type,return-value]


def test_weights_stand_behind_the_name(tmp_path: Path) -> None:
    assert split_weights(["a.txt", "b/"]) == (("a.txt", "b/"), ())
    assert split_weights(["wiki.jsonl@0.7", "hub:x/y:en@3", "books/@.5"]) == (
        ("wiki.jsonl", "hub:x/y:en", "books/"),
        (0.7, 3.0, 0.5),
    )
    (tmp_path / "notes@2").mkdir()
    assert split_weights([f"{tmp_path}/notes@2"]) == ((f"{tmp_path}/notes@2",), ())
    with pytest.raises(UserError, match=r"b\.txt has no weight, and others have"):
        split_weights(["a.txt@1", "b.txt"])
    with pytest.raises(UserError, match="a weight must be above 0"):
        split_weights(["a.txt@1", "b.txt@0"])


@pytest.mark.parametrize(
    ("weights", "tokens"),
    [((1, 1), 10**20), ((float("inf"), 1), None), ((float("inf"), 1), 2000), ((1e308, 1e-300), None)],
)
def test_more_tokens_than_can_be_counted_are_refused(
    weights: tuple[float, float], tokens: int | None
) -> None:
    with pytest.raises(
        UserError, match=r"ask for more than 9,007,199,254,740,992 training tokens; give weights"
    ):
        plan_mixture(lambda: [sourced([20, 20])], NAMES[:2], weights, 2048, tokens)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """A large and a small one, of different words, with one document that both have."""
    rng, paths = random.Random(0), {}
    for name, count, words in (
        ("large", 400, "a model reads the token"),
        ("small", 60, "fast slow batch shard"),
    ):
        paths[name] = tmp_path / f"{name}.jsonl"
        texts = [" ".join(rng.choices(words.split(), k=rng.randint(20, 60))) for _ in range(count)]
        texts.append("writes learns " * 12)
        paths[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return paths


@pytest.mark.parametrize("first", ["wiki", "books"])
def test_a_document_longer_than_its_sources_share_is_said(
    tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str], first: str
) -> None:
    (tmp_path / "books.jsonl").write_text(json.dumps({"text": "a model reads the token " * 800}) + "\n")
    (tmp_path / "wiki.jsonl").write_text(
        "".join(json.dumps({"text": f"fast {number} slow " * 10}) + "\n" for number in range(400))
    )
    weighted = [f"{tmp_path / 'wiki.jsonl'}@0.7", f"{tmp_path / 'books.jsonl'}@0.3"]
    weighted = weighted if first == "wiki" else weighted[::-1]
    options = ["--tokenizer", tokenizer_folder, "--heldout-fraction", 0, "--mixture-tokens", 4000]
    assert make(*weighted, *options, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    wiki, books = sorted(Manifest.load(tmp_path / "out").sources, key=lambda each: -each["weight"])
    share = wiki["train_tokens"] / (wiki["train_tokens"] + books["train_tokens"])
    assert share < 0.65
    assert f"{share:.1%}" in printed
    assert printed.count("note: the last has") == 1
    expected = f"books.jsonl\nnote: the last has {1 - share:.1%} where 30.0% was asked for: documents are taken whole"
    assert expected in printed


def test_shards_of_a_mixture(
    tmp_path: Path, sources: dict[str, Path], tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tokenizer", tokenizer_folder, "--shard-tokens", 4000, "--heldout-fraction", 0.05]
    weighted = [f"{sources['large']}@0.6", f"{sources['small']}@0.4"]
    out = tmp_path / "out"
    assert make(*weighted, *options, "--out", out) == 0
    assert "epochs of" in capsys.readouterr().out
    assert verify_shards.main([str(out)]) == 0
    manifest = Manifest.load(out)
    large, small = manifest.sources
    assert manifest.options["weights"] == [0.6, 0.4]
    assert (large["weight"], large["epochs"]) == (0.6, 1.0)
    assert small["epochs"] > 3
    total = sum(shard.tokens for shard in manifest.splits["train"])
    assert total == large["train_tokens"] + small["train_tokens"]
    assert small["train_tokens"] / total == pytest.approx(0.4, abs=0.005)
    times = Counter(documents_in(out))
    fast = {
        name: write_shards.load_tokenizer(tokenizer_folder).convert_tokens_to_ids(name)
        for name in ("fast", "slow")
    }
    of_small = {document for document in times if set(document) & set(fast.values())}
    assert {times[document] for document in of_small} <= {int(small["epochs"]), int(small["epochs"]) + 1}
    assert {times[document] for document in set(times) - of_small} == {1}, "also the one that both have"
    heldout = documents_in(out, "heldout")
    assert len(set(heldout)) == len(heldout) > 0
    assert not set(heldout) & set(times)
    for shard, split in zip(
        manifest.splits["train"], np.array_split(np.arange(total), len(manifest.splits["train"])), strict=True
    ):
        assert abs(shard.tokens - len(split)) < 150
    assert make(*weighted, *options, "--out", tmp_path / "again", processes=2) == 0
    first, second = contents(out), contents(tmp_path / "again")
    assert first == second, "other processes, the same bytes"
    assert make(*weighted, *options, "--out", out) == 0, "complete already"
    assert make(f"{sources['large']}@0.5", f"{sources['small']}@0.5", *options, "--out", out) == 2
    assert "weights [0.6, 0.4] instead of [0.5, 0.5]" in capsys.readouterr().err


def test_a_mixture_of_fewer_tokens_leaves_documents_out_and_counts_them(
    tmp_path: Path, sources: dict[str, Path], tokenizer_folder: str
) -> None:
    options = ["--tokenizer", tokenizer_folder, "--out", tmp_path / "out", "--mixture-tokens", 8000]
    assert make(f"{sources['large']}@3", f"{sources['small']}@1", *options) == 0
    manifest = Manifest.load(tmp_path / "out")
    large, small = manifest.sources
    assert large["train_tokens"] == pytest.approx(6000, abs=100)
    assert large["epochs"] < 0.5
    assert small["epochs"] == pytest.approx(1.0, abs=0.5)
    in_shards = len(set(documents_in(tmp_path / "out"))) + len(documents_in(tmp_path / "out", "heldout"))
    skipped = manifest.skipped
    assert (
        large["documents"] + small["documents"]
        == in_shards + skipped["beyond_the_mixture"] + skipped["duplicates"]
    )


def test_without_weights_nothing_of_a_mixture_is_recorded(
    tmp_path: Path, sources: dict[str, Path], tokenizer_folder: str
) -> None:
    assert make(*sources.values(), "--tokenizer", tokenizer_folder, "--out", tmp_path / "out") == 0
    manifest = Manifest.load(tmp_path / "out")
    assert [list(source) for source in manifest.sources] == [
        ["bytes", "documents", "files", "kind", "source"]
    ] * 2
    assert list(manifest.skipped) == ["bad_records", "duplicates", "too_short"]
    assert not {"weights", "mixture_tokens"} & set(manifest.options)


def test_mixtures_that_cannot_be(
    tmp_path: Path, sources: dict[str, Path], tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    large, small, out = sources["large"], sources["small"], tmp_path / "out"
    options = ["--tokenizer", tokenizer_folder, "--out", out]
    for words, said in (
        ([large, "--mixture-tokens", 5000], "--mixture-tokens has no effect without weights"),
        ([f"{large}@1", f"{small}@400"], "which would be read"),
        ([f"{large}@1", f"{large}@1"], "has no documents of its own"),
        ([f"{large}@1", f"{small}@1", "--mixture-tokens", 5], "--mixture-tokens 5: must be at least 1024"),
        ([f"{large}@1", f"{small}@1", "--mixture-tokens", "9" * 20], "must be at most 9,007,199,254,740,992"),
    ):
        assert make(*words, *options) == 2
        assert said in capsys.readouterr().err
    assert train_tokenizer.main([f"{large}@1", "--vocab-size", "100", "--out", str(tmp_path / "t")]) == 2
    assert "weights have no effect on a vocabulary" in capsys.readouterr().err
