"""Score a model's sentence vectors as they stand: semantic similarity (Spearman) and retrieval (nDCG@10).

    python launch/score_embeddings.py --model teacher student --sts glue/STS-B/dev.tsv --retrieval scifact

Texts are pooled as sentence-transformers' files beside the model say, else by their mean. --sts is a table of pairs and
numbers (.tsv, .csv, .jsonl, plain or .gz); --retrieval a folder in BEIR's layout: corpus.jsonl, queries.jsonl,
qrels/test.tsv. All vectors of a collection are held in memory: 4 bytes x width for each document.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.shard_format.required_packages import require_packages

require_packages()

from data_prep.shard_format.files import write_json
from launch.common.cli import command_parser, run_main
from launch.common.tables import text_table
from train.config_sections.objective import POOLINGS
from train.errors import UserError
from train.finetuning.data.examples import Examples, examples_of
from train.finetuning.data.own import OwnOptions, own_task
from train.finetuning.data.tables import format_of, read_table


def parser() -> argparse.ArgumentParser:
    made = command_parser(__doc__, allow_abbrev=False)
    made.add_argument(
        "--model", required=True, nargs="+", metavar="DIR", help="encoders with their tokenizers"
    )
    made.add_argument(
        "--sts", nargs="+", default=[], metavar="FILE", help="pairs of texts and a number for each"
    )
    made.add_argument(
        "--text",
        nargs=2,
        default=("sentence1", "sentence2"),
        metavar="COLUMN",
        help="of --sts (default: sentence1 sentence2)",
    )
    made.add_argument("--label", default="score", metavar="COLUMN", help="of --sts (default: score)")
    made.add_argument(
        "--retrieval", nargs="+", default=[], metavar="DIR", help="collections in BEIR's layout"
    )
    made.add_argument("--split", default="test", metavar="NAME", help="of qrels/NAME.tsv (default: test)")
    made.add_argument("--pooling", choices=POOLINGS, help="default: as the model's files say, else mean")
    made.add_argument(
        "--max-length", type=int, metavar="TOKENS", help="default: as the model's files say, else 512"
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="leave the scores there, too")
    return made


def main(arguments: Sequence[str]) -> int:
    """Read everything, then score model by model."""
    options = parser().parse_args(arguments)
    if not options.sts and not options.retrieval:
        raise UserError("there is nothing to score on; give --sts FILE or --retrieval DIR")
    if options.max_length is not None and options.max_length < 3:
        raise UserError(f"--max-length is {options.max_length}; give at least 3")
    from train.finetuning import embeddings  # torch

    pairs = {path: read_pairs(Path(path), tuple(options.text), options.label) for path in options.sts}
    collections = {path: embeddings.read_retrieval(Path(path), options.split) for path in options.retrieval}
    scores: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(options.model):
        embed = embeddings.Embedder(name, options.max_length, options.pooling)
        print(f"{name}: pooling {embed.pooling}, up to {embed.max_length} tokens", flush=True)
        found = {
            f"{path}, Spearman": embeddings.similarity(embed, each, path) for path, each in pairs.items()
        }
        found |= {
            f"{path}, nDCG@10": embeddings.retrieval(embed, each, path) for path, each in collections.items()
        }
        scores[name] = {key: round(value, 4) for key, value in found.items()}
    rows = [[key, *(f"{scores[name][key]:.1f}" for name in scores)] for key in next(iter(scores.values()))]
    print(text_table(["data", *scores], rows, title="Points of 0 to 100"))
    if options.json:
        write_json(options.json, scores)
    return 0


def read_pairs(path: Path, text: tuple[str, ...], label: str) -> Examples:
    """UserError where the file is not there or no such table."""
    kind = format_of(path)
    if kind not in ("csv", "tsv", "jsonl"):
        raise UserError(f"--sts {path}: give a .tsv, .csv or .jsonl file, plain or .gz")
    task = own_task(f"{kind}:{path}", OwnOptions(text=text, label=(label,), label_type="number"))
    return examples_of(task, read_table(task, path, lambda line: print(line, flush=True)))


if __name__ == "__main__":
    run_main(main)
