"""Shards from outside: every way in which one can be bad is an error, and costs no more than its size."""

from __future__ import annotations

import io
import os
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.shard_format.manifest import Manifest, ShardInfo
from tests.tiny_shards import SEP, TOKENIZER, put_file, random_documents, shard_of
from train.data.shard_checks import check_shards
from train.data.shards import read_shard, shard_tokens


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def tar_of(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for member, body in members:
            member.size = member.size or len(body)
            tar.addfile(member, io.BytesIO(body))
    return file.getvalue()


def named(name: str, **fields: object) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(member, field, value)
    return member


GOOD = npy(np.array([7, 8, SEP], dtype=np.uint16))


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch pwned",)


def member(body: bytes, name: str = "x.tokens.npy", **fields: object) -> bytes:
    """A tar with one member."""
    return tar_of((named(name, **fields), body))


def tokens_of(*values: int) -> bytes:
    return member(npy(np.array(values, dtype=np.uint16)))


def headed(text: str) -> bytes:
    """A tar whose .npy has this header, and six bytes of numbers."""
    body = text.encode() + b"\n"
    return member(b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body + b"\0" * 6)


def shaped(shape: str) -> bytes:
    return headed(f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}, }}")


def header_of(kind: bytes, size: int | bytes) -> bytes:
    """A header block of a type and a size (or the bytes of that field), with the right checksum."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(named("x.tokens.npy").tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[148:156], block[156:157] = field, b" " * 8, kind
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


SPARSE = {"GNU.sparse.size": "999999999999", "GNU.sparse.map": "0,1", "GNU.sparse.numblocks": "1"}
PLAIN = member(GOOD)
HOSTILE = {
    "absolute": (member(GOOD, "/etc/x.tokens.npy"), "is not called KEY"),
    "climbing": (member(GOOD, "../x.tokens.npy"), "is not called KEY"),
    "other member": (member(b"1", "x.cls"), "is not called KEY"),
    "symlink": (member(b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is not a plain file"),
    "hard link": (member(b"", type=tarfile.LNKTYPE, linkname="/etc/passwd"), "is not a plain file"),
    "device": (member(b"", type=tarfile.CHRTYPE), "is not a plain file"),
    "fifo": (member(b"", type=tarfile.FIFOTYPE), "is not a plain file"),
    "folder": (member(b"", type=tarfile.DIRTYPE), "is not a plain file"),
    "sparse": (
        tar_of((named("x.tokens.npy", pax_headers=SPARSE), GOOD), form=tarfile.PAX_FORMAT),
        r"sets b'GNU\.sparse\.\w+': that is not a plain file",
    ),
    "other name in an extended header": (
        tar_of((named("x.tokens.npy", pax_headers={"path": "y.tokens.npy"}), GOOD), form=tarfile.PAX_FORMAT),
        "sets b'path': that is not a plain file",
    ),
    "long name": (
        tar_of((named(f"{'x' * 200}.tokens.npy"), GOOD), form=tarfile.GNU_FORMAT),
        "is not a plain file but of tar's type b'L'",
    ),
    "global header": (header_of(b"g", 0) + PLAIN, "is not a plain file but of tar's type b'g'"),
    "two extended headers": (header_of(b"x", 0) * 2 + PLAIN, "two extended headers stand before one"),
    "extended header of nothing": (header_of(b"x", 0) + b"\0" * 1024, "else than zeros stands behind"),
    "no end mark": (PLAIN[:1024], "ends without a tar's end mark"),
    "something behind the end": (PLAIN[:-1] + b"x", "else than zeros stands behind its end mark"),
    "wrong checksum": (b"y" + PLAIN[1:], "the checksum of a tar header is wrong"),
    "size in base 256": (
        header_of(b"0", b"\x80" + b"\0" * 10 + b"\x10") + PLAIN[512:],
        "where a number should be",
    ),
    "pickle": (member(npy(np.array([Bomb()], dtype=object), True)), r"array of \|O,"),
    "bare pickle": (member(b"\x80\x04cos\nsystem\n"), "is not an .npy file"),
    "zip": (member(b"PK\x03\x04" + b"\0" * 90), "is not an .npy file"),
    "later version": (member(GOOD.replace(b"NUMPY\x01", b"NUMPY\x02")), "is not an .npy file"),
    "header cut short": (member(GOOD.replace(b"\x76\x00", b"\x75\x00", 1)), "is not an .npy file"),
    "floats": (member(npy(np.ones(3))), "array of <f8,"),
    "big endian": (member(npy(np.ones(3, dtype=">u2"))), "array of >u2"),
    "uint32": (member(npy(np.ones(3, dtype=np.uint32))), "array of <u4,"),
    "matrix": (member(npy(np.ones((3, 1), dtype=np.uint16))), r"shape \(3, 1\), not of <u2 in one row"),
    "scalar": (member(npy(np.array(3, dtype=np.uint16))), r"shape \(\), not of"),
    "huge shape": (shaped(f"({10**17},)"), "6 bytes of numbers for a shape of .1000"),
    "negative shape": (shaped("(-3,)"), "is not an .npy file"),
    "code in the header": (headed("__import__('os').system('touch pwned')"), "is not an .npy file"),
    "deep header": (headed("[" * 9000), "is not an .npy file"),
    "ends too late": (PLAIN[:124] + b"00000777777\0" + PLAIN[136:], "is not a shard of tokens"),
    "cut inside": (member(npy(np.zeros(900, dtype=np.uint16)))[:1536], "ends beyond the file"),
    "no tar": (b"\x89PNG" + b"\1" * 2000, "is not a shard of tokens"),
    "gzip": (b"\x1f\x8b" + b"\0" * 2000, "is not a shard of tokens"),
    "huge header": (
        tar_of((named("x.tokens.npy", pax_headers={"c": "x" * 200_000}), GOOD), form=tarfile.PAX_FORMAT),
        "too many for its 3 tokens",
    ),
    "beyond the vocabulary": (tokens_of(7, 64, SEP), "token 64, beyond the vocabulary of 64"),
    "no separator at the end": (tokens_of(7, SEP, 8), "or does not end with one"),
    "other documents": (tokens_of(SEP, SEP, SEP), "3 separators for the manifest's 1"),
    "too few": (tokens_of(7, SEP), "2 tokens, not the manifest's 3"),
    "empty": (tar_of(), "0 tokens, not the manifest's 3"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_shard_is_an_error(
    kind: str, tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, message = HOSTILE[kind]
    monkeypatch.chdir(tmp_path)
    shard = put_file(tmp_path, "train-000000.tar", content, documents=1, tokens=3)
    with pytest.raises(ValueError, match=r"shard train-000000\.tar .*" + message):
        check_shards(str(tmp_path), replace(manifest, splits={"train": (shard,)}), "full")
    assert [entry.name for entry in tmp_path.iterdir()] == [
        "train-000000.tar"
    ]  # nothing ran, nothing unpacked


def padded(body: bytes) -> bytes:
    return body + b"\0" * (-len(body) % 512)


# Where 10,000 documents are claimed, 40 MB of headers are within the limits.
CHAINS = {
    "extended headers": (header_of(b"x", 0) * 30_000 + PLAIN, "two extended headers"),
    "described ones": ((header_of(b"x", 12) + padded(b"12 mtime=1.5\n"[:12])) * 15_000, "is damaged"),
    "long names": ((header_of(b"L", 9) + padded(b"y.txt\0")) * 500 + PLAIN, "of tar's type b'L'"),
    "digits": (header_of(b"x", 1 << 20) + b"1" * (1 << 20) + PLAIN, "longer than 4096 bytes"),
    "few digits each": (
        (header_of(b"x", 4096) + b"1" * 4096 + header_of(b"0", 0)) * 4000,
        "extended header .* is damaged",
    ),
    "small members": ((header_of(b"0", 0)) * 60_000 + b"\0" * 1024, "is not an .npy file"),
    "empty arrays": (
        (header_of(b"0", 128) + padded(npy(np.zeros(0, dtype=np.uint16)))) * 30_000 + b"\0" * 1024,
        "holds 0 tokens, not the manifest's 5000000",
    ),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_a_hostile_shard_costs_no_more_than_its_size(kind: str) -> None:
    content, message = CHAINS[kind]
    shard = ShardInfo("train-000000.tar", len(content), "0" * 64, documents=10_000, tokens=5_000_000)
    begun = time.process_time()
    with pytest.raises(ValueError, match=r"shard train-000000\.tar .*" + message):
        shard_tokens(bytearray(content), shard, TOKENIZER)
    assert time.process_time() - begun < 5


def test_pax_headers_and_a_full_sample_are_read(tmp_path: Path, manifest: Manifest) -> None:
    # Stock TarWriter stamps members with fractions of a second, which takes pax headers.
    content = tar_of((named("x.tokens.npy", mtime=1.5), GOOD), form=tarfile.PAX_FORMAT)
    shard = put_file(tmp_path, "train-000000.tar", content, documents=1, tokens=3)
    assert shard_tokens(read_shard(str(tmp_path), shard), shard, TOKENIZER).tolist() == [7, 8, SEP]
    with webdataset.TarWriter(str(tmp_path / "stock.tar")) as writer:
        writer.write({"__key__": "x", "tokens.npy": np.array([7, 8, SEP], dtype=np.uint16)})
    content = (tmp_path / "stock.tar").read_bytes()
    shard = put_file(tmp_path, "stock.tar", content, documents=1, tokens=3)
    assert shard_tokens(read_shard(str(tmp_path), shard), shard, TOKENIZER).tolist() == [7, 8, SEP]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_gets_past_but_other_tokens(data: st.DataObject, tmp_path: Path) -> None:
    """Whatever bytes are changed, the result is a ValueError or as many tokens of the vocabulary."""
    path = tmp_path / "train-000000.tar"
    if path.exists():
        shard = ShardInfo(path.name, path.stat().st_size, "", 6, int((tmp_path / "tokens").read_text()))
    else:
        shard = shard_of(tmp_path, path.name, random_documents(0, 6, longest=20))
        (tmp_path / "tokens").write_text(str(shard.tokens))
    content = bytearray(path.read_bytes())
    headers = st.integers(0, 700)
    for place in data.draw(st.lists(headers | st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):  # a header with the right checksum
        content[148:156] = b"%06o\0 " % (256 + sum(content[:148]) + sum(content[156:512]))
    try:
        tokens = shard_tokens(content, shard, TOKENIZER)
    except ValueError:
        return
    assert len(tokens) == shard.tokens
    assert tokens.max() < TOKENIZER.vocab_size
    assert (tokens == SEP).sum() == 6
