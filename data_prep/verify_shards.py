"""Check a folder of shards: every size, digest and count, the histogram, the tokenizer; show some passages.

Exit code 0: the shards are what their manifest says. 2: they are not, and the message says where.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.shard_format.required_packages import require_packages

require_packages()

import numpy as np

from data_prep.error_messages import exit_code, explain, parse_words
from data_prep.shard_format.blocks import count_tokens, npy_array, token_blocks
from data_prep.shard_format.errors import MissingFile, UserError
from data_prep.shard_format.files import refuse_pipe
from data_prep.shard_format.manifest import SPLITS, TOKENIZER_FOLDER, Manifest, ShardInfo, token_dtype
from data_prep.shard_format.terminal import progress_bar
from data_prep.shard_format.tokenizer_record import check_record

REMEDY = "remove the folder and run write_shards.py again"


def check_shard(path: Path, info: ShardInfo, manifest: Manifest) -> np.ndarray:
    """Compare one shard with its record.

    Returns:
        int64 (vocab_size,), how often each token stands in it.
    Raises:
        UserError: what is wrong, naming the file.
    """
    if not path.exists():
        raise MissingFile(f"{path} is missing; {REMEDY}")
    refuse_pipe(path)
    size = path.stat().st_size
    if size != info.bytes:
        raise UserError(f"{path} has {size:,} bytes, the manifest says {info.bytes:,}; {REMEDY}")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != info.sha256:
        raise UserError(f"{path} is altered: its sha256 is not the manifest's; {REMEDY}")
    try:
        blocks = token_blocks(data, token_dtype(manifest.tokenizer.vocab_size))
    except UserError as error:
        raise UserError(f"{path} is no shard: {error}; {REMEDY}") from None
    return _check_blocks(blocks, path, info, manifest)


def _check_blocks(
    blocks: Iterable[np.ndarray], path: Path, info: ShardInfo, manifest: Manifest
) -> np.ndarray:
    tokenizer = manifest.tokenizer
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for block in blocks:
        if not len(block):
            raise UserError(f"{path}: a block has no tokens; {REMEDY}")
        if int(block.max()) >= tokenizer.vocab_size:
            raise UserError(f"{path}: token {int(block.max())} is beyond the vocabulary; {REMEDY}")
        if block[-1] != tokenizer.sep_id:
            raise UserError(f"{path}: a block does not end with a whole document; {REMEDY}")
        count_tokens(counts, block)
    found = {"documents": int(counts[tokenizer.sep_id]), "tokens": int(counts.sum())}
    for name, value in found.items():
        if value != getattr(info, name):
            raise UserError(
                f"{path} has {value:,} {name}, the manifest says {getattr(info, name):,}; {REMEDY}"
            )
    for index in set(tokenizer.special_ids) - {tokenizer.sep_id, tokenizer.unk_id}:
        if counts[index]:
            raise UserError(f"{path}: special token {index} stands inside a document; {REMEDY}")
    return counts


def check_folder(folder: Path) -> tuple[Manifest, Any]:
    """Check everything in a folder of shards.

    Returns:
        The manifest and the loaded tokenizer.
    Raises:
        UserError: the first thing that is wrong.
    """
    from transformers import AutoTokenizer

    manifest = Manifest.load(folder)
    shards = [(split, shard) for split in SPLITS for shard in manifest.splits[split]]
    named = {shard.name for _, shard in shards}
    strangers = sorted(path.name for path in folder.glob("*.tar") if path.name not in named)
    if strangers:
        raise UserError(f"{folder} holds {strangers[0]}, which the manifest does not name; {REMEDY}")
    histogram = np.zeros(manifest.tokenizer.vocab_size, dtype=np.int64)
    total = sum(shard.bytes for _, shard in shards)
    with progress_bar(total=total, desc="verifying", unit="B", unit_scale=True) as bar:
        for split, shard in shards:
            counts = check_shard(folder / shard.name, shard, manifest)
            histogram += counts if split == "train" else 0
            bar.update(shard.bytes)
    _check_histogram(folder / manifest.token_histogram, histogram, manifest.token_histogram_sha256)
    if not (folder / TOKENIZER_FOLDER).is_dir():
        raise MissingFile(f"{folder / TOKENIZER_FOLDER} is missing; {REMEDY}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER_FOLDER, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise whatever a damaged file leads to
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{folder / TOKENIZER_FOLDER} does not load ({reason}); {REMEDY}") from None
    check_record(folder / TOKENIZER_FOLDER, tokenizer, manifest.tokenizer)
    return manifest, tokenizer


def _check_histogram(path: Path, expected: np.ndarray, sha256: str | None) -> None:
    if not path.exists():
        raise MissingFile(f"{path} is missing; {REMEDY}")
    refuse_pipe(path)
    with open(path, "rb") as file:
        data = file.read(expected.nbytes + 1024)  # its header is shorter
    try:
        found = npy_array(memoryview(data), "it", expected.dtype)
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}); {REMEDY}") from None
    if not np.array_equal(found, expected):
        raise UserError(f"{path} does not count the tokens of the train split; {REMEDY}")
    if sha256 not in (None, hashlib.sha256(data).hexdigest()):
        raise UserError(f"{path} is altered: its sha256 is not the manifest's; {REMEDY}")


def passages(folder: Path, manifest: Manifest, tokenizer: Any, count: int) -> Iterator[str]:
    """The beginnings of `count` documents from shards spread over the folder, decoded."""
    shards = [shard for split in SPLITS for shard in manifest.splits[split]]
    count = min(count, len(shards))
    for index in range(count):
        shard = shards[index * len(shards) // count]
        blocks = token_blocks((folder / shard.name).read_bytes())
        if not blocks:
            continue
        block = blocks[0]
        end = int(np.argmax(block == manifest.tokenizer.sep_id))
        yield f"[{shard.name}] {tokenizer.decode(block[: min(end, 60)].tolist())}"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python data_prep/verify_shards.py shards --passages 5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder that write_shards.py made")
    parser.add_argument("--passages", type=int, default=3, metavar="N", help="how many to show (default 3)")
    return parse_words(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if parsed.passages < 0:
            raise UserError(f"--passages {parsed.passages}: must be at least 0")
        manifest, tokenizer = check_folder(parsed.folder)
        for passage in passages(parsed.folder, manifest, tokenizer, parsed.passages):
            print(passage)
    except Exception as error:
        print(f"verify_shards: {explain(error)}", file=sys.stderr)
        return exit_code(error)
    for split in SPLITS:
        shards = manifest.splits[split]
        documents, tokens = sum(shard.documents for shard in shards), sum(shard.tokens for shard in shards)
        print(f"{split}: {len(shards):,} shards, {documents:,} documents, {tokens:,} tokens: all as recorded")
    print(f"manifest digest {manifest.digest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
