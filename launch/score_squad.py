"""Score answers to SQuAD questions by the official rules. Needs neither a model nor a GPU.

    python launch/score_squad.py dev-v1.1.json predictions.json
    python launch/score_squad.py dev-v2.0.json predictions.json --null-scores null_odds.json --threshold 0.5

Questions and predictions may be compressed (.gz). Predictions are one JSON object, {question id: answer}; "" means that
there is no answer. A file with a question that has no answer is scored as SQuAD 2.0, any other as 1.1. A question
without a prediction counts as 0.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.shard_format.required_packages import require_packages

require_packages()

from launch.common.cli import command_parser, run_main
from train.errors import UserError
from train.finetuning.squad import questions as squad_data
from train.finetuning.squad import scores as squad_scores


def main(arguments: Sequence[str]) -> int:
    """Parse, score, print one JSON object; what is missing goes to stderr."""
    parser = command_parser(__doc__)
    parser.add_argument("questions", type=Path, metavar="DEV.json", help="SQuAD questions with their answers")
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS.json")
    parser.add_argument(
        "--null-scores",
        type=Path,
        metavar="FILE",
        help="{id: how sure the system is that there is no answer}: adds the best threshold's scores (2.0 only)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="X",
        help="predictions with a null score above this count as no answer",
    )
    options = parser.parse_args(arguments)
    if options.threshold is not None and options.null_scores is None:
        raise UserError("--threshold compares with null scores: give --null-scores FILE too")
    if options.threshold is not None and math.isnan(options.threshold):
        raise UserError("--threshold nan: no score is above it; give a number")
    questions = squad_data.read_squad(options.questions)
    predictions = squad_data.read_predictions(options.predictions)
    golds = squad_data.golds_of(questions)
    if predictions and not golds.keys() & predictions.keys():
        raise UserError(
            f"{options.predictions}: no question of {options.questions} has any of its ids "
            f"({squad_data.named(list(predictions))}); are they of another data set?"
        )
    if squad_data.has_unanswerable(questions):
        null_scores = squad_data.read_null_scores(options.null_scores) if options.null_scores else None
        scores = squad_scores.score_v2(golds, predictions, null_scores, options.threshold)
    elif options.null_scores is not None:
        raise UserError(
            f"--null-scores: every question of {options.questions} has an answer, none can be null"
        )
    else:
        scores = squad_scores.score_v1(golds, predictions)
    for ids, what in (
        (scores.missing, "questions have no prediction and count as 0"),
        (scores.unknown, "predictions have ids that no question has"),
    ):
        if ids:
            print(f"{len(ids)} {what}: {squad_data.named(ids)}", file=sys.stderr)
    print(
        json.dumps({**{k: round(v, 4) for k, v in scores.metrics.items()}, "total": scores.total}, indent=2)
    )
    return 0


if __name__ == "__main__":
    run_main(main)
