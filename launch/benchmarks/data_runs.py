"""What launch/benchmarks/data.py compares: one run each, timed inside a process of its own.

    python launch/benchmarks/data_runs.py encode_batch_fast|datasets_map|write_shards CORPUS TOKENIZER OUT [...]

Prints one JSON object with seconds, processor seconds of all its processes (both without imports and loading
the tokenizer), tokens and documents. `write_shards` takes further options of data_prep/write_shards.py, and
runs under mpirun too, where the processor seconds are rank 0's.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

BATCH = 1000


def _now() -> tuple[float, float]:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(use.ru_utime + use.ru_stime for use in used)


def _since(started: tuple[float, float]) -> dict[str, float]:
    return dict(
        zip(("seconds", "cpu_seconds"), (b - a for a, b in zip(started, _now(), strict=True)), strict=True)
    )


def encode_batch_fast(corpus: str, tokenizer: str, out: str, cores: int) -> dict[str, float]:
    """The floor: texts in memory, all cores, results thrown away."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    from transformers import AutoTokenizer

    from data_prep.sources.records import Reading, ReadOptions, SourceFile
    from data_prep.sources.text_files import parse_json, read_lines

    backend = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).backend_tokenizer
    options = ReadOptions()
    records = read_lines(SourceFile(corpus, "jsonl", 0), options, Reading())
    texts: list[Any] = [parse_json(record, options) for record in records]
    started = _now()
    tokens = 0
    for start in range(0, len(texts), BATCH):
        batch = backend.encode_batch_fast(texts[start : start + BATCH], add_special_tokens=False)
        tokens += sum(map(len, batch))
    return {**_since(started), "tokens": tokens, "documents": len(texts)}


def datasets_map(corpus: str, tokenizer: str, out: str, cores: int) -> dict[str, float]:
    """The usual way: datasets.map with the same tokenizer, then shards of the same format and size."""
    os.environ["HF_DATASETS_CACHE"] = out
    import datasets
    import numpy as np
    from transformers import AutoTokenizer

    from data_prep.shard_format.blocks import write_shard
    from data_prep.shard_format.manifest import token_dtype

    loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    datasets.disable_progress_bars()

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": loaded(batch["text"], add_special_tokens=False)["input_ids"]}

    started = _now()
    dataset = datasets.load_dataset("json", data_files=corpus, split="train", cache_dir=out)
    dataset = dataset.map(tokenize, batched=True, num_proc=cores, remove_columns=dataset.column_names)
    dataset = dataset.shuffle(seed=0).with_format("numpy")
    separator = np.array([loaded.sep_token_id])
    dtype = token_dtype(len(loaded))
    documents: list[np.ndarray] = []
    size = number = tokens = 0
    for row, batch in enumerate(dataset.iter(batch_size=BATCH)):
        documents += [np.concatenate([ids, separator]).astype(dtype) for ids in batch["input_ids"]]
        size = sum(map(len, documents))
        if size > 4_000_000 or (row + 1) * BATCH >= len(dataset):
            with open(Path(out, f"train-{number:06d}.tar"), "wb") as file:
                write_shard(file, f"train-{number:06d}", documents)
            tokens, number, documents = tokens + size, number + 1, []
    return {**_since(started), "tokens": tokens, "documents": len(dataset)}


def write_shards(corpus: str, tokenizer: str, out: str, options: list[str]) -> dict[str, float]:
    """Ours, from the first look at the input to the manifest."""
    from data_prep import write_shards as command
    from data_prep.shard_format.manifest import Manifest

    command.load_tokenizer(tokenizer)  # imports transformers, which is start-up for the others too
    started = _now()
    code = command.main([corpus, "--tokenizer", tokenizer, "--out", out, *options])
    took = _since(started)
    if code:
        raise SystemExit(code)
    manifest = Manifest.load(out)
    shards = [shard for split in manifest.splits.values() for shard in split]
    return {
        **took,
        "tokens": sum(shard.tokens for shard in shards),
        "documents": sum(shard.documents for shard in shards),
    }


def main() -> int:
    name, corpus, tokenizer, out, *options = sys.argv[1:]
    os.makedirs(out, exist_ok=True)
    if name == "write_shards":
        result = write_shards(corpus, tokenizer, out, options)
    else:
        run = {"encode_batch_fast": encode_batch_fast, "datasets_map": datasets_map}[name]
        result = run(corpus, tokenizer, out, int(options[0]))
    if os.environ.get("OMPI_COMM_WORLD_RANK", "0") == "0":
        print("\n" + json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
