"""What a run says when it has ended: five lines of its summary.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.errors import UserError, one_line
from train.run_folder import RESTORE, SUMMARY


def closing_lines(run_dir: Path, model: Path, summary: Mapping[str, Any]) -> list[str]:
    """Loss, held-out loss, agreement with the teacher, speed, and where the model is and what to do with it.

    Args:
        model: the final Hugging Face folder.
        summary: of RUN/summary.json, also of older versions.
    Raises:
        UserError: it lacks a figure, or one is none.
    """
    try:
        return _lines(run_dir, model, summary)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run_dir / SUMMARY} is damaged ({one_line(error)}); {RESTORE}") from None


TEXT_TERMS = {
    "heldout_relation": "relations",
    "heldout_cos": "1 - cos",
    "heldout_layer_cos": "1 - cos of layers",
    "heldout_embedding": "1 - cos of sentence vectors",
}


def _lines(run_dir: Path, model: Path, summary: Mapping[str, Any]) -> list[str]:
    before, last = summary["heldout_before"], summary["heldout"]
    figures, agreement = [], "not measured" + (": no term of the loss compares the guesses" if last else "")
    if "heldout_mlm_loss" in last:
        others = []
        if "heldout_mlm_loss" in before:  # else its row is gone
            others.append(f"{before['heldout_mlm_loss']:.4f} before training")
        if "teacher_heldout_mlm_loss" in before:
            others.append(f"teacher {before['teacher_heldout_mlm_loss']:.4f}")
        figures.append(f"{last['heldout_mlm_loss']:.4f} nats a masked token")
        figures[0] += f" ({', '.join(others)})" if others else ""
    for key, words in TEXT_TERMS.items():
        if key in last:
            first = f" ({before[key]:.4f} before)" if key in before else ""
            figures.append(f"{words} {last[key]:.4f}{first}")
    heldout = ", ".join(figures) or "not measured: the shards hold no held-out windows"
    if "heldout_top1_agreement" in last:
        agreement = (
            f"{last['heldout_top1_agreement']:.1%} of held-out masked tokens guessed as the teacher does"
        )
    if not summary["teacher"]:
        agreement = "no teacher"
        use = f"distil it with --model.teacher={model}"
    else:
        use = f"beside its teacher: python launch/report.py {run_dir} --out {run_dir / 'report'}"
    speed = summary["tokens_per_s"]
    measured = "not known" if summary["steps"] else "nothing was trained"
    loss = "not logged" if summary["loss"] is None else f"{summary['loss']:.4f}"
    return [
        f"training loss  {loss} after {summary['steps']:,} steps, {summary['tokens']:,} tokens",
        f"held-out loss  {heldout}",
        f"agreement      {agreement}",
        "speed          " + (measured if speed is None else f"{speed:,.0f} tokens/s (median)"),
        f"model          {model}; {use}",
    ]
