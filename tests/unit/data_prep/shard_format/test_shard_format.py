"""The shards' format: manifest, fingerprint, tar blocks, and what stock webdataset makes of them."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_prep.shard_format import blocks, canonical
from data_prep.shard_format.blocks import blocks_of, count_tokens, token_blocks, write_shard
from data_prep.shard_format.errors import UserError
from data_prep.shard_format.manifest import Manifest, ShardInfo, _as_written, token_dtype
from data_prep.shard_format.tokenizer_info import TokenizerInfo, tokenizer_fingerprint, tokenizer_info

TOKENIZER = TokenizerInfo("f" * 64, 64, 0, 1, 2, 3, 4, (0, 1, 2, 3, 4))
SHARD = ShardInfo("train-000000.tar", 10240, "0" * 64, 3, 500)
MANIFEST = Manifest(
    TOKENIZER, {"train": (SHARD,), "heldout": ()}, "token_histogram.npy", skipped={"duplicates": 1}
)


def random_documents(seed: int, count: int, dtype: type = np.uint16) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(5, 64, rng.integers(1, 900)), 3).astype(dtype) for _ in range(count)]


def test_manifest_survives_saving(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path)
    loaded = Manifest.load(str(tmp_path))
    assert loaded == MANIFEST
    assert loaded.digest() == MANIFEST.digest()
    assert Manifest.load(f"file:{tmp_path}").digest() == MANIFEST.digest()
    assert dataclasses.replace(MANIFEST, options={"seed": 1}).digest() != MANIFEST.digest()


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


def test_a_manifest_in_other_clothes_is_the_same(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert Manifest.load(tmp_path) == MANIFEST
    assert Manifest.load(tmp_path).digest() == MANIFEST.digest()


@pytest.mark.parametrize("piece", [1, 150, 700, 1 << 20])
def test_the_fast_reader_of_many_shards_equals_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """Wherever its pieces end; what `save` did not write is left to the plain one, which names what is wrong."""
    monkeypatch.setattr(canonical, "_PIECE", piece)
    shards = tuple(dataclasses.replace(SHARD, name=f"train-{i:06d}.tar", bytes=i * 10**6) for i in range(40))
    written = dataclasses.replace(MANIFEST, splits={"train": shards[:30], "heldout": shards[30:]})
    text = written.to_json()
    read = _as_written(bytearray(text.encode()))
    assert read == written == Manifest.from_dict(json.loads(text))
    assert read.digest() == written.digest()
    for old, new in [
        ('"tokens": 500', '"tokens": 2'),
        ('"tokens": ', '"tokens": -'),
        ("   }", "    }"),
        ('"bytes": 0', '"bytes": 00'),
        ("\n  ]", ",\n  ]"),
        ('"train"', '"trait"'),
    ]:
        assert old in text
        assert _as_written(bytearray(text.replace(old, new, 1).encode())) is None, new
    (tmp_path / "manifest.json").write_text(text.replace("000007", "000006", 1))
    with pytest.raises(UserError, match=r"train-000006\.tar is listed twice"):
        Manifest.load(tmp_path)


def test_missing_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"does not exist; make shards with `python data_prep/write_shards"
    ):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2, this code reads version 1"),
        ({"splits": {"train": []}}, r"not a manifest of shards \(splits: there is no split 'heldout'\)"),
        ({"splits": {"train": [{"name": "../x.tar"}], "heldout": []}}, "not a manifest of shards"),
        (
            {"splits": {"train": [{**dataclasses.asdict(SHARD), "name": "../x.tar"}], "heldout": []}},
            r"splits\.train\[0\]\.name: '\.\./x\.tar' is not a plain file name",
        ),
        ({"tokenizer": None}, "not a manifest of shards"),
    ],
)
def test_foreign_manifest_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    content = {**json.loads(MANIFEST.to_json()), **change}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Manifest.load(tmp_path)


def test_broken_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match="not a manifest of shards"):
        Manifest.load(tmp_path)


def test_fingerprint_survives_saving_and_use(
    tmp_path: Path, tokenizer_folder: str, teacher_folder: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    expected = tokenizer_fingerprint(tokenizer)
    tokenizer(["a the"], truncation=True, padding="max_length", max_length=8)
    assert tokenizer_fingerprint(tokenizer) == expected
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == expected
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(teacher_folder)) == expected


@pytest.mark.parametrize("change", ["normalizer", "vocabulary", "special"])
def test_fingerprint_tells_tokenizers_apart(tokenizer_folder: str, change: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    expected = tokenizer_fingerprint(tokenizer)
    if change == "normalizer":
        from tokenizers.normalizers import BertNormalizer

        tokenizer.backend_tokenizer.normalizer = BertNormalizer(lowercase=False)
    elif change == "vocabulary":
        tokenizer.add_tokens(["student-teacher"])
    else:
        tokenizer.mask_token = "[UNK]"
    assert tokenizer_fingerprint(tokenizer) != expected


def test_tokenizer_info(tokenizer_folder: str) -> None:
    info = tokenizer_info(AutoTokenizer.from_pretrained(tokenizer_folder))
    assert (info.pad_id, info.unk_id, info.cls_id, info.sep_id, info.mask_id) == (0, 1, 2, 3, 4)
    assert info.special_ids == (0, 1, 2, 3, 4)


def test_tokenizer_without_mask_is_refused() -> None:
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with pytest.raises(
        ValueError, match=r"has no pad_token, cls_token, sep_token, mask_token: masked language"
    ):
        tokenizer_info(tokenizer)


def test_an_unknown_token_that_is_unknown_is_refused() -> None:
    class Endless:
        unk_token = ""

        @property
        def pad_token_id(self) -> int:
            return self.pad_token_id

    with pytest.raises(
        ValueError, match=r"its unk_token '' is not in its vocabulary; correct it in tokenizer_con"
    ):
        tokenizer_info(Endless())


def test_token_dtype() -> None:
    assert token_dtype(65_535) == np.uint16
    assert token_dtype(65_536) == np.uint32


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_stock_webdataset_reads_a_shard(tmp_path: Path, dtype: type) -> None:
    documents = random_documents(0, 200, dtype)
    path = tmp_path / "train-000000.tar"
    with open(path, "wb") as file:
        assert write_shard(file, "train-000000", documents) == (200, sum(map(len, documents)))
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert all({"__key__", "tokens.npy"} <= set(sample) for sample in samples)
    arrays = [sample["tokens.npy"] for sample in samples]
    assert all(array.ndim == 1 and array.dtype == dtype and array[-1] == 3 for array in arrays)
    np.testing.assert_array_equal(np.concatenate(arrays), np.concatenate(documents))
    assert all(len(array) >= 8192 for array in arrays[:-1])
    np.testing.assert_array_equal(np.concatenate(token_blocks(path.read_bytes())), np.concatenate(documents))


def test_same_documents_give_the_same_bytes_with_little_overhead() -> None:
    documents = random_documents(1, 2000)
    first, second = io.BytesIO(), io.BytesIO()
    write_shard(first, "train-000000", documents)
    write_shard(second, "train-000000", iter(documents))
    assert first.getvalue() == second.getvalue()
    assert len(first.getvalue()) < 1.1 * sum(document.nbytes for document in documents)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("count", [0, 1, 3, 400])
def test_the_bytes_are_those_of_tarfile_and_numpy(dtype: type, count: int) -> None:
    documents = random_documents(2, count, dtype)
    expected, found = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, block in enumerate(blocks_of(documents)):
            body = io.BytesIO()
            np.save(body, np.concatenate(block))
            member = tarfile.TarInfo(f"train-000000-{number:06d}.tokens.npy")
            member.size = body.tell()
            body.seek(0)
            tar.addfile(member, body)
    write_shard(found, "train-000000", documents)
    assert found.getvalue() == expected.getvalue()


def npy(array: np.ndarray) -> bytes:
    body = io.BytesIO()
    np.save(body, array, allow_pickle=True)
    return body.getvalue()


def tar_of(body: bytes, name: str = "x.tokens.npy", kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, link, len(body)
        tar.addfile(member, io.BytesIO(body))
    return shard.getvalue()


GOOD = npy(np.array([7, 3], dtype=np.uint16))
HOSTILE = {
    "pickle": (tar_of(npy(np.array([{"any": "object"}], dtype=object))), r"is an array of \|O"),
    "bare pickle": (tar_of(pickle.dumps([1])), "is not an .npy file of one array"),
    "pickle member": (tar_of(pickle.dumps([1]), "x.pickle"), "is not called KEY.tokens.npy"),
    "absolute path": (tar_of(GOOD, "/etc/x.tokens.npy"), "'/etc/x.tokens.npy' is not called"),
    "upwards": (tar_of(GOOD, "../x.tokens.npy"), "is not called"),
    "link": (tar_of(b"", kind=tarfile.SYMTYPE, link="/etc/passwd"), "is not a plain file"),
    "hard link": (tar_of(b"", kind=tarfile.LNKTYPE, link="/etc/passwd"), "is not a plain file"),
    "huge member": (tar_of(GOOD)[:124] + b"77777777777\0" + tar_of(GOOD)[136:], "checksum"),
    "huge array": (
        tar_of(GOOD.replace(b"(2,), }", b"(9999999999999999,), }")),
        "not an .npy|bytes of numbers",
    ),
    "code as header": (tar_of(GOOD.replace(b"(2,)", b"f()_")), "not an .npy file"),
    "floats": (tar_of(npy(np.zeros(2))), "is an array of <f8"),
    "table": (tar_of(npy(np.zeros((2, 2), dtype=np.uint16))), r"shape \(2, 2\)"),
    "cut": (tar_of(GOOD)[:900], "without a tar's end mark"),
    "cut inside": (tar_of(npy(np.zeros(900, dtype=np.uint16)))[:1536], "ends beyond the file"),
    "no tar": (b"x" * 2048, "not a tar"),
    "empty": (b"", "without a tar's end mark"),
    "long name": (tar_of(GOOD, "y" * 300 + ".tokens.npy"), "not a tar of the ustar kind|not a plain file"),
}


@pytest.mark.parametrize("case", list(HOSTILE))
def test_hostile_shards_are_refused_and_nothing_is_unpickled(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, message = HOSTILE[case]
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    with pytest.raises(ValueError, match=message):
        token_blocks(data)


def test_a_shard_of_another_dtype_is_refused() -> None:
    assert token_blocks(tar_of(GOOD))[0].tolist() == [7, 3]
    with pytest.raises(ValueError, match=r"an array of <u2, shape \(2,\), not of <u4 in one row"):
        token_blocks(tar_of(GOOD), np.dtype(np.uint32))


def test_counting_goes_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_SLICE", 3)
    counts = np.zeros(5, dtype=np.int64)
    count_tokens(counts, np.array([0, 4, 4, 1, 1, 1, 4, 2], dtype=np.uint16))
    assert counts.tolist() == [1, 3, 1, 0, 3]
