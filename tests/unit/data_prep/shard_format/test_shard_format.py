"""The shards' format: fingerprint, tar blocks, and what stock webdataset makes of them."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_prep.shard_format import blocks
from data_prep.shard_format.blocks import blocks_of, count_tokens, token_blocks, write_shard
from data_prep.shard_format.errors import UserError
from data_prep.shard_format.manifest import token_dtype
from data_prep.shard_format.tokenizer_info import tokenizer_fingerprint, tokenizer_info


def random_documents(seed: int, count: int, dtype: type = np.uint16) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(5, 64, rng.integers(1, 900)), 3).astype(dtype) for _ in range(count)]


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


def tar_of(body: bytes) -> bytes:
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as tar:
        member = tarfile.TarInfo("x.tokens.npy")
        member.size = len(body)
        tar.addfile(member, io.BytesIO(body))
    return shard.getvalue()


def test_a_shard_of_another_dtype_is_refused() -> None:
    """And nothing is unpickled; every other way to be no shard: tests/unit/data/test_hostile_shards.py."""
    body = io.BytesIO()
    np.save(body, np.array([7, 3], dtype=np.uint16))
    shard = tar_of(body.getvalue())
    assert token_blocks(shard)[0].tolist() == [7, 3]
    with pytest.raises(UserError, match=r"an array of <u2, shape \(2,\), not of <u4 in one row"):
        token_blocks(shard, np.dtype(np.uint32))
    with pytest.raises(UserError, match=r"is not an \.npy file of one array"):
        token_blocks(tar_of(pickle.dumps([1])))


def test_counting_goes_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_SLICE", 3)
    counts = np.zeros(5, dtype=np.int64)
    count_tokens(counts, np.array([0, 4, 4, 1, 1, 1, 4, 2], dtype=np.uint16))
    assert counts.tolist() == [1, 3, 1, 0, 3]
