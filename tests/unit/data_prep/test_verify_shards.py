"""data_prep/verify_shards.py: what is wrong is named; passages."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep import verify_shards
from data_prep.shard_format.manifest import Manifest
from tests.unit.data_prep.writing import last_line, make


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("flip", r"train-000001\.tar is altered: its sha256 is not the manifest's"),
        ("cut", r"train-000001\.tar has .* bytes, the manifest says"),
        ("remove", r"train-000001\.tar is missing"),
        ("stranger", r"holds train-000099\.tar, which the manifest does not name"),
        ("histogram", "does not count the tokens of the train split"),
        ("histogram file", "token_histogram.npy is damaged .it is not an .npy file of one array.; remove"),
        ("tokenizer", "tokenizer is missing"),
        ("tokenizer file", r"out/tokenizer does not load \(.+\); remove the folder"),
        ("hostile", r"train-000001\.tar is no shard: member '/etc/x\.tokens\.npy' is not called KEY\.tokens"),
        ("counts", r"train-000001\.tar has .* documents, the manifest says"),
        ("manifest", "manifest.json does not exist; make shards with"),
        (
            "mask_id",
            r"out/manifest.json: tokenizer.mask_id is 1, but .*out/tokenizer has 4: one .* restore it",
        ),
    ],
)
def test_verify_names_what_is_wrong(
    tmp_path: Path, shards_folder: str, damage: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    out = shutil.copytree(shards_folder, tmp_path / "out")
    shard = out / "train-000001.tar"
    if damage == "flip":
        data = bytearray(shard.read_bytes())
        data[700] ^= 1
        shard.write_bytes(data)
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-512])
    elif damage == "remove":
        shard.unlink()
    elif damage == "stranger":
        shutil.copy(shard, out / "train-000099.tar")
    elif damage == "histogram":
        np.save(out / "token_histogram.npy", np.zeros(64, dtype=np.int64))
    elif damage == "histogram file":
        (out / "token_histogram.npy").write_bytes(b"nonsense")
    elif damage == "tokenizer file":
        (out / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0"}')
    elif damage == "hostile":
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("/etc/x.tokens.npy"))
        shard.write_bytes(data.getvalue())
        content = json.loads((out / "manifest.json").read_text())
        digest = hashlib.sha256(data.getvalue()).hexdigest()
        content["splits"]["train"][1] |= {"bytes": len(data.getvalue()), "sha256": digest}
        (out / "manifest.json").write_text(json.dumps(content))
    elif damage == "tokenizer":
        shutil.rmtree(out / "tokenizer")
    elif damage == "manifest":
        (out / "manifest.json").unlink()
    elif damage == "mask_id":
        content = json.loads((out / "manifest.json").read_text())
        content["tokenizer"]["mask_id"] = 1
        (out / "manifest.json").write_text(json.dumps(content))
    else:
        content = json.loads((out / "manifest.json").read_text())
        content["splits"]["train"][1]["documents"] += 1
        (out / "manifest.json").write_text(json.dumps(content))
    assert verify_shards.main([str(out)]) == 2
    assert re.search(message, last_line(capsys))


def test_verify_shows_passages(shards_folder: str, capsys: pytest.CaptureFixture) -> None:
    assert verify_shards.main([shards_folder, "--passages", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"\[train-000000\.tar\] (\w+ )+", lines[0])
    assert "all as recorded" in lines[2]
    assert lines[-1] == f"manifest digest {Manifest.load(shards_folder).digest()}"


def test_of_few_shards_each_shows_one_passage(
    tmp_path: Path, good: list, capsys: pytest.CaptureFixture
) -> None:
    assert make(*good, "--out", tmp_path / "out", "--shard-tokens", 10**6) == 0
    names = [path.name for path in sorted((tmp_path / "out").glob("*.tar"))]
    capsys.readouterr()
    assert verify_shards.main([str(tmp_path / "out"), "--passages", str(len(names) + 1)]) == 0
    assert sorted(re.findall(r"(?m)^\[(\S+)\]", capsys.readouterr().out)) == names
