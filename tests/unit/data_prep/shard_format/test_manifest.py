"""The manifest: its canonical text, and one from outside, of which every field is checked before it is used."""

from __future__ import annotations

import bisect
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.shard_format.errors import UserError
from data_prep.shard_format.manifest import Manifest, ShardInfo
from data_prep.shard_format.tokenizer_info import TokenizerInfo

TOKENIZER = TokenizerInfo("f" * 64, 64, 0, 1, 2, 3, 4, (0, 1, 2, 3, 4))
SHARD = ShardInfo("train-000000.tar", 10240, "0" * 64, 3, 500)
DEEPEST = 20_000
MANIFEST = Manifest(
    TOKENIZER, {"train": (SHARD,), "heldout": ()}, "token_histogram.npy", skipped={"duplicates": 1}
)


def test_manifest_survives_saving(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path)
    loaded = Manifest.load(str(tmp_path))
    assert loaded == MANIFEST
    assert loaded.digest() == MANIFEST.digest()
    assert Manifest.load(f"file:{tmp_path}").digest() == MANIFEST.digest()
    assert dataclasses.replace(MANIFEST, options={"seed": 1}).digest() != MANIFEST.digest()
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))  # in other clothes
    assert Manifest.load(tmp_path) == MANIFEST


def test_the_canonical_text_is_what_json_makes_of_the_fields() -> None:
    """It is written by a template; digests of manifests from before there was a token_histogram_sha256 stay."""
    shards = tuple(dataclasses.replace(SHARD, name=f"{i}.tar", tokens=i + 3) for i in range(3))
    for splits in (MANIFEST.splits, {"train": shards, "heldout": shards[:2]}, {"train": (), "heldout": ()}):
        for extra in (
            {},
            {"options": {'a "splits": null,\n "b': ["é", None, 0.5]}, "sources": ({"splits": None},)},
        ):
            manifest = dataclasses.replace(MANIFEST, splits=splits, **extra)
            content = dataclasses.asdict(manifest)
            assert content.pop("token_histogram_sha256") is None
            assert manifest.to_json() == json.dumps(content, indent=1, sort_keys=True) + "\n"
            content["token_histogram_sha256"] = "a" * 64
            guarded = dataclasses.replace(manifest, token_histogram_sha256="a" * 64)
            assert guarded.to_json() == json.dumps(content, indent=1, sort_keys=True) + "\n"
    assert MANIFEST.digest() == "c8dbfd6e8b636aa79e0c23686f462d5916f4982f23842e6c48d46f72dc266ff5"


def test_missing_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"does not exist; make shards with `python data_prep/write_shards"
    ):
        Manifest.load(tmp_path)


def content_with(path: str, value: Any) -> dict[str, Any]:
    """The manifest as JSON has it, with the field at `path` (keys and indices) exchanged."""
    content = json.loads(MANIFEST.to_json())
    *parents, last = (int(word) if word.isdigit() else word for word in path.split("."))
    at = content
    for word in parents:
        at = at[word]
    at[last] = value
    return content


@pytest.mark.parametrize(
    "name",
    ["counts.npy;touch pwned", "$(id).npy", "a b.npy", "../x.npy", ".x.npy", "-rf", "", "a/b", "x\n", 7],
)
@pytest.mark.parametrize("field", ["token_histogram", "splits.train.0.name"])
def test_a_name_that_a_shell_or_a_path_could_read_otherwise_is_refused(field: str, name: Any) -> None:
    with pytest.raises(ValueError, match=r"is not a plain file name: only letters, digits"):
        Manifest.from_dict(content_with(field, name))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("splits.train.0.tokens", -1, r"\.json .*\(splits\.train\[0\]\.tokens = -1: Input should be .* 0\); make the"),
        ("splits.train.0.tokens", "500", "tokens = '500': Input should be a valid integer"),
        ("splits.train.0.tokens", 10**30, "tokens = 1000.*: Input should be less than or equal to 9007199254740992"),
        ("splits.train.0.bytes", 1.5, r"bytes = 1\.5: Input should be a valid integer"),
        ("splits.train.0.documents", True, "documents = True: Input should be a valid integer"),
        ("splits.train.0.documents", 501, r"train\[0\]: its documents = 501 are more than its 500 tokens"),
        ("splits.train.0.sha256", "0" * 63, "sha256 = '0+': String should match pattern"),
        ("splits.train.0.sha256", "../" * 21 + "x", "sha256 = .*: String should match pattern"),
        ("splits.train.0.sha256", "0" * 64 + "\n", "sha256 = .*: String should match pattern"),
        ("splits.train.0.sha256", None, "sha256 = None: Input should be a valid string"),
        ("tokenizer.vocab_size", 0, "vocab_size = 0: Input should be greater than or equal to 1"),
        ("tokenizer.vocab_size", 2**40, "vocab_size = .*: Input should be less than 2147483648"),
        ("tokenizer.vocab_size", 5, r"special_ids = \[0, 1, 2, 3, 4\] must be ascending, below 5, and fewer than"),
        ("tokenizer.special_ids", [0, 1, 2, 3, 64], "mask_id = 4 is not one of special_ids"),
        ("tokenizer.special_ids", [4, 3, 2, 1, 0], "must be ascending"),
        ("tokenizer.special_ids", [0, 1, 2, 3, 4, 64], "must be ascending, below 64"),
        ("tokenizer.special_ids", [], "pad_id = 0 is not one of special_ids"),
        ("tokenizer.special_ids", [0, 1, 2, 4], "sep_id = 3 is not one of special_ids"),
        ("tokenizer.special_ids", "01234", "special_ids = '01234': Input should be a valid tuple"),
        ("tokenizer.mask_id", -1, "mask_id = -1: Input should be greater than or equal to 0"),
        ("tokenizer.cls_id", None, "cls_id = None: Input should be a valid integer"),
        ("tokenizer.fingerprint", 7, "fingerprint = 7: Input should be a valid string"),
        ("skipped", ["x"], r"skipped = \['x'\]: Input should be a valid dictionary"),
        ("skipped", {"short": -1}, r"skipped\.short = -1: Input should be greater"),
        ("options", None, "options = None: Input should be a valid dictionary"),
        ("sources", 3, "sources = 3: Input should be a valid tuple"),
        ("splits.train", 3, r"splits\.train = 3: Input should be a valid tuple"),
        ("splits.train.0", {"name": "x.tar"}, r"splits\.train\[0\]\.bytes: Field required"),
        ("splits.train.0.more", 1, r"train\[0\]\.more = 1: Unexpected keyword argument"),
        ("tokenizer", [], r"tokenizer = \[\]: Input should be a dictionary"),
        ("tokenizer", None, r"not a manifest of shards \(tokenizer = None: "),
        ("version", 2, "has version 2, this code reads version 1"),
        ("splits", {"train": []}, r"not a manifest of shards \(splits: there is no split 'heldout'\)"),
        ("splits.train.0.name", "../x.tar", r"splits\.train\[0\]\.name: '\.\./x\.tar' is not a plain file name"),
    ],
)  # fmt: skip
def test_a_field_of_another_kind_is_refused_by_name(
    tmp_path: Path, field: str, value: Any, message: str
) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(content_with(field, value)))
    with pytest.raises(ValueError, match=message):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[" * 100_000, id="deep"),
        pytest.param("9" * 5000, id="digits"),
        "[]",
        "3",
        "null",
        '"x"',
        "{}",
        '{"version": 1}',
        "\xff{",
    ],
)
def test_other_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text, "latin-1")
    with pytest.raises(ValueError, match="is not a manifest of shards"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("field", ["sources", "options"])
def test_what_is_nested_deeply_has_a_digest_or_is_refused(tmp_path: Path, field: str) -> None:
    """The depth at which the digest's encoder gives up is a few levels before the parser's: under 1,000 up to Python
    3.11, several thousands from 3.12 on."""

    def is_refused(depth: int) -> bool:
        nested = '{"a":' * depth + "1" + "}" * depth
        content = json.dumps({**json.loads(MANIFEST.to_json()), field: "HERE"})
        content = content.replace('"HERE"', f"[{nested}]" if field == "sources" else nested)
        (tmp_path / "manifest.json").write_text(content)
        try:
            manifest = Manifest.load(tmp_path)
        except UserError:
            return True
        assert len(manifest.digest()) == 64
        return False

    assert not is_refused(100)
    first = 100 + bisect.bisect_left(range(100, DEEPEST), True, key=is_refused)
    for depth in range(
        first - 12, first + 12
    ):  # whichever of both: a call through bisect counts as levels, too
        is_refused(depth)
    assert is_refused(DEEPEST)


def test_train_comes_first(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path)
    assert list(Manifest.load(tmp_path).splits) == list(MANIFEST.splits) == ["train", "heldout"]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_shard_that_is_listed_twice_is_refused(tmp_path: Path, split: str) -> None:
    """It would be trained on twice as often, or held out and trained on."""
    content = json.loads(MANIFEST.to_json())
    content["splits"][split] += content["splits"]["train"]
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"manifest of shards \(.*the shard train-000000.tar is listed twice\); make"
    ):
        Manifest.load(tmp_path)
