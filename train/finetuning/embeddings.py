"""What a model's pooled vectors are worth as they stand: semantic similarity and retrieval, without any training.

Similarity: Spearman's rank correlation of cosines with people's scores (Cer et al. 2017, STS). Retrieval: nDCG@10, the
mean over queries (Thakur et al. 2021, BEIR), with linear gains as trec_eval's, by scikit-learn.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import ndcg_score

from data_prep.shard_format.files import parse_json
from data_prep.shard_format.terminal import progress_bar
from train.config_sections.objective import POOLINGS
from train.errors import UserError
from train.finetuning.batches import Padding, encode
from train.finetuning.data.examples import Examples
from train.finetuning.data.tables import MEND, lines_of
from train.finetuning.metrics import METRICS
from train.models.encoder_config import longest_input, takes_token_types
from train.models.loading import check_encoder, load_encoder
from train.models.pooling import pooled, sentence_settings
from train.models.tokenizer_checks import load_tokenizer

BATCH_SIZE = 64
TOP = 10
QUERIES_TOGETHER = 64


class Embedder:
    """Texts -> vectors of length 1, on a GPU where there is one."""

    def __init__(self, name: str, max_length: int | None = None, pooling: str | None = None) -> None:
        config = check_encoder(name)
        self._tokenizer = load_tokenizer(name, config)
        found, longest = sentence_settings(name)
        self.pooling = pooling or found or "mean"
        """One of POOLINGS: as asked for, as sentence-transformers' files say, else the mean."""
        if self.pooling not in POOLINGS:
            raise UserError(
                f"{name}/1_Pooling pools by {self.pooling}; give --pooling {' or '.join(POOLINGS)}"
            )
        self.max_length = min(max_length or longest or 512, longest_input(config, self._tokenizer))
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: Any = load_encoder(name).base_model.to(self._device).eval()
        self._padding = Padding(self._tokenizer.pad_token_id)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str], name: str) -> np.ndarray:
        """(N, width) fp32; `name` is what the progress bar says."""
        examples = Examples(list(texts), None, np.zeros(len(texts)), [])
        features = encode(self._tokenizer, examples, self.max_length, takes_token_types(self._model))
        order = np.argsort([-len(example["input_ids"]) for example in features], kind="stable")
        parts = []
        starts = range(0, len(order), BATCH_SIZE)
        for start in progress_bar(starts, desc=name, unit=" batches", leave=False, delay=1.0):
            rows = order[start : start + BATCH_SIZE]
            batch = self._padding([features[row] for row in rows])
            batch = {key: value.to(self._device) for key, value in batch.items()}
            hidden = self._model(**batch).last_hidden_state
            vectors = pooled(hidden, batch.get("attention_mask"), self.pooling)
            parts.append(torch.nn.functional.normalize(vectors).cpu().numpy())
        return np.concatenate(parts)[np.argsort(order)]


def similarity(embed: Embedder, pairs: Examples, name: str) -> float:
    """100 x Spearman of the pairs' cosines with their labels."""
    assert pairs.second is not None
    first, second = embed(pairs.first, f"{name} first"), embed(pairs.second, f"{name} second")
    return 100.0 * METRICS["spearman"](pairs.labels, (first * second).sum(axis=1))


@dataclass(frozen=True)
class Retrieval:
    """A collection of texts, and which of them answer which query."""

    documents: Mapping[str, str]
    queries: Mapping[str, str]
    relevant: Mapping[str, Mapping[str, float]]
    """Query -> document -> gain above 0; every query has one."""


def read_retrieval(folder: Path, split: str = "test") -> Retrieval:
    """BEIR's layout: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv, plain or .gz. UserError, by file and row, for what
    is missing or does not fit."""
    documents = _texts(_there(folder, "corpus.jsonl"))
    queries = _texts(_there(folder, "queries.jsonl"))
    path = _there(folder, f"qrels/{split}.tsv")
    relevant: dict[str, dict[str, float]] = {}
    lines = lines_of(path)
    for row, line in lines:
        cells = line.split("\t")
        if row == lines[0][0] and "query" in cells[0] and not cells[-1].strip().lstrip("-").isdigit():
            continue
        if len(cells) != 3 or not cells[2].strip().lstrip("-").isdigit():
            raise UserError(
                f"{path}, row {row}: not a query, a document and a whole number, with tabs between; {MEND}"
            )
        query, document, gain = cells[0], cells[1], int(cells[2])
        for kind, key, known in (("query", query, queries), ("document", document, documents)):
            if key not in known:
                raise UserError(
                    f"{path}, row {row}: there is no {kind} {key!r}; is it of another collection?"
                )
        if gain > 0 and document != query:
            relevant.setdefault(query, {})[document] = float(gain)
    if not relevant or len(documents) < 2:
        raise UserError(f"{folder}: needs two documents and a query with an answer; {MEND}")
    return Retrieval(documents, {query: queries[query] for query in relevant}, relevant)


def _there(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(
        f"there is no {folder / name}; --retrieval wants corpus.jsonl, queries.jsonl and qrels/test.tsv"
    )


def _texts(path: Path) -> dict[str, str]:
    """Id -> title and text."""
    found = {}
    for row, line in lines_of(path):
        record = parse_json(line, f"{path}, row {row}", MEND)
        if not isinstance(record, dict) or "_id" not in record or not isinstance(record.get("text"), str):
            raise UserError(f"{path}, row {row}: not a JSON object with _id and a text; {MEND}")
        found[str(record["_id"])] = f"{record.get('title') or ''} {record['text']}".strip()
    return found


def retrieval(embed: Embedder, collection: Retrieval, name: str) -> float:
    """100 x nDCG@10 over all documents by cosine; a document with a query's own id does not count for it."""
    ids = list(collection.documents)
    place = {key: index for index, key in enumerate(ids)}
    documents = embed(list(collection.documents.values()), f"{name} documents")
    names = list(collection.queries)
    queries = embed(list(collection.queries.values()), f"{name} queries")
    found = []
    for start in range(0, len(names), QUERIES_TOGETHER):
        cosines = queries[start : start + QUERIES_TOGETHER] @ documents.T
        for query, row in zip(names[start : start + QUERIES_TOGETHER], cosines, strict=True):
            if query in place:
                row[place[query]] = -np.inf
            gains = {place[key]: gain for key, gain in collection.relevant[query].items()}
            found.append(ndcg(row, gains))
    return 100.0 * statistics.fmean(found)


def ndcg(scores: np.ndarray, gains: Mapping[int, float]) -> float:
    """nDCG@10 of one query: only the best ten and the relevant documents enter, which changes nothing of it.

    Args:
        scores: (documents,), higher is better.
        gains: document -> gain above 0; 0 for all others.
    """
    top = np.argpartition(-scores, TOP)[:TOP] if len(scores) > TOP else np.arange(len(scores))
    chosen = np.union1d(top, np.fromiter(gains, dtype=np.int64))
    truth = [gains.get(int(index), 0.0) for index in chosen]
    if len(chosen) < 2:
        return float(truth[0] > 0)
    values = np.maximum(scores[chosen], -2.0)  # below every cosine; no -inf for scikit-learn
    return float(ndcg_score([truth], [values], k=TOP))
