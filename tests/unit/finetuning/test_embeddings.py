"""Sentence vectors: similarity and retrieval against their formulas; what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer

from launch.score_embeddings import main, read_pairs
from tests.tiny_tasks import save_encoder, sentences
from train.errors import UserError
from train.finetuning.embeddings import Embedder, ndcg, read_retrieval, retrieval


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("models") / "bert")


def by_hand(folder: str, texts: list[str]) -> np.ndarray:
    """One text after the other, the mean of its tokens."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    vectors = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        vector = hidden.mean(dim=0).numpy()
        vectors.append(vector / np.linalg.norm(vector))
    return np.array(vectors)


def write_collection(folder: Path, texts: list[str]) -> Path:
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(texts[:30])]
    queries = [{"_id": f"q{n}", "text": text} for n, text in enumerate(texts[30:35])]
    queries += [{"_id": "d3", "text": texts[3]}]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = [(f"q{n}", f"d{(7 * n + k) % 30}", k) for n in range(5) for k in range(4)]
    judged += [("d3", f"d{k}", 1) for k in range(20)]  # its own id among them
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in judged)]
    (folder / "qrels/test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def dcg(gains: list[float]) -> float:
    return sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains[:10]))


def test_similarity_and_retrieval_are_their_formulas(tmp_path: Path, model: str) -> None:
    texts = [text for text, _ in sentences(70, 0)]
    rng = np.random.default_rng(0)
    lines = [
        "sentence1\tsentence2\tscore",
        *(f"{a}\t{b}\t{rng.random():.3f}" for a, b in zip(texts[:35], texts[35:], strict=True)),
    ]
    (tmp_path / "sts.tsv").write_text("\n".join(lines) + "\n")
    folder = write_collection(tmp_path / "collection", texts)
    out = tmp_path / "scores.json"
    assert main(f"--model {model} --sts {tmp_path}/sts.tsv --retrieval {folder} --json {out}".split()) == 0
    [found] = json.loads(out.read_text()).values()
    vectors = by_hand(model, texts)
    pairs = read_pairs(tmp_path / "sts.tsv", ("sentence1", "sentence2"), "score")
    wanted = spearmanr((vectors[:35] * vectors[35:]).sum(axis=1), pairs.labels).statistic
    assert found[f"{tmp_path / 'sts.tsv'}, Spearman"] == pytest.approx(100 * wanted, abs=0.02)

    collection = read_retrieval(folder)
    each = []
    for query, text in collection.queries.items():
        cosines = vectors[:30] @ vectors[texts.index(text)]
        if query in collection.documents:
            cosines[int(query[1:])] = -9
        gains = [collection.relevant[query].get(f"d{index}", 0.0) for index in np.argsort(-cosines)]
        each.append(dcg(gains) / dcg(sorted(gains, reverse=True)))
    assert len(each) == 6
    assert retrieval(Embedder(model), collection, "x") == pytest.approx(100 * np.mean(each), abs=0.02)
    assert found[f"{folder}, nDCG@10"] == pytest.approx(100 * np.mean(each), abs=0.02)


def test_judgements_without_a_header_whose_ids_look_like_one(tmp_path: Path) -> None:
    folder = write_collection(tmp_path / "c", [text for text, _ in sentences(40, 0)])
    before = read_retrieval(folder).relevant
    queries, judged = folder / "queries.jsonl", folder / "qrels/test.tsv"
    queries.write_text(queries.read_text().replace('"q', '"query-'))
    rows = judged.read_text().replace("q", "query-").splitlines()[1:]
    judged.write_text("\n".join([*rows[1:], rows[0], ""]))  # the first has a gain
    assert read_retrieval(folder).relevant == {
        query.replace("q", "query-"): found for query, found in before.items()
    }


def test_ndcg_of_the_best_ten_is_that_of_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores, chosen = rng.normal(size=200), rng.choice(200, rng.integers(1, 15), replace=False)
        gains = {int(index): float(rng.integers(1, 4)) for index in chosen}
        order = [gains.get(int(index), 0.0) for index in np.argsort(-scores)]
        assert ndcg(scores, gains) == pytest.approx(dcg(order) / dcg(sorted(order, reverse=True)))


def test_a_pooling_that_is_not_known_is_refused_and_may_be_replaced(tmp_path: Path) -> None:
    folder = Path(save_encoder(tmp_path / "m"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode_lasttoken": true}')
    with pytest.raises(UserError, match="pools by pooling_mode_lasttoken; give --pooling mean or cls or max"):
        Embedder(str(folder))
    assert Embedder(str(folder), pooling="mean").pooling == "mean"


def test_pooling_of_a_name_on_the_hub(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a cache holds it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--someone--sentences"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    folder = cached / "snapshots" / ("0" * 40)
    shutil.copytree(model, folder)
    assert Embedder("someone/sentences").pooling == "mean"
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 7}')
    embed = Embedder("someone/sentences")
    assert (embed.pooling, embed.max_length) == ("cls", 7)


def test_what_cannot_be_scored_is_refused_by_name(tmp_path: Path, model: str) -> None:
    folder = write_collection(tmp_path / "c", [text for text, _ in sentences(40, 0)])
    good = (folder / "qrels/test.tsv").read_text()
    for text, said in (
        (good + "q0\td99\t1\n", "row 42: there is no document 'd99'"),
        (good + "q77\td1\t1\n", "row 42: there is no query 'q77'"),
        (good + "q0\td1\n", "row 42: not a query, a document and a whole number"),
        ("query-id\tcorpus-id\tscore\n", "needs two documents and a query with an answer"),
    ):
        (folder / "qrels/test.tsv").write_text(text)
        with pytest.raises(UserError, match=said):
            read_retrieval(folder)
    for record in ('{"id": 1}', '{"_id": "d0", "text": null}'):
        (folder / "corpus.jsonl").write_text(record + "\n")
        with pytest.raises(UserError, match=r"corpus\.jsonl, row 1: not a JSON object with _id and a text"):
            read_retrieval(folder)
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(UserError, match=r"there is no .*corpus\.jsonl"):
        read_retrieval(folder)
    for words, said in (
        ([], "nothing to score on"),
        (["--sts", "x.xls"], "give a .tsv, .csv or .jsonl file"),
        (["--sts", "x.tsv"], "there is no file x.tsv"),
        (["--sts", "x.tsv", "--max-length", "1"], "--max-length is 1"),
    ):
        with pytest.raises(UserError, match=said):
            main(["--model", model, *words])
