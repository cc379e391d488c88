"""The masking that held-out scores are taken under: one for every run, whatever masks it trains with.

Losses of other masks or other lengths are losses of another task, and are never shown side by side: each row, table
and chart of held-out scores names its masking by `masking_label`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_prep.shard_format.tokenizer_info import TokenizerInfo
from train.data.masking import Masker

EVALUATION = {"probability": 0.15, "smoothing": 0.0, "whole_word": False}
"""Every token alike (Devlin et al. 2019, section 3.1), 80/10/10; keys as in MaskingConfig."""
EVALUATION_SEED = 0
LABEL = "heldout_masking"
"""Key of a held-out row of metrics.jsonl."""


def evaluation_masker(tokenizer: TokenizerInfo, sequence_length: int) -> Masker:
    """Hides the same tokens of the same windows in every run."""
    return Masker(tokenizer, sequence_length, EVALUATION_SEED, probability=EVALUATION["probability"])


def evaluation_label(sequence_length: int) -> str:
    """Of the rows that are written now."""
    return masking_label(EVALUATION, str(sequence_length))


def masking_label(masking: Mapping[str, Any], lengths: str, seed: int = 0) -> str:
    """A masking in words, such as "15 % of 128 tokens, uniform": equal for equal maskings alone.

    Args:
        masking: keys as in MaskingConfig.
        lengths: of the sequences.
        seed: of the masks, where it matters which tokens they hide.
    """
    smoothing = masking["smoothing"]
    words = [f"{100 * masking['probability']:g} % of {lengths} tokens"]
    words.append(f"by count**-{smoothing:g}" if smoothing else "uniform")
    words += ["whole words"] if masking["whole_word"] else []
    words += [f"mask seed {seed}"] if seed else []
    return ", ".join(words)


def label_of_row(row: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The masking of a held-out row; rows from before it was recorded were masked as the run trained.

    Args:
        config: the tree in RUN/config.yaml; may lack sections.
    """
    if LABEL in row:
        return str(row[LABEL])
    try:
        data = config["data"]
        return masking_label(config["masking"], str(data["sequence_length"]), data["seed"])
    except (KeyError, TypeError, ValueError):
        return "masking not recorded"


def training_label(config: Mapping[str, Any]) -> str:
    """The masking that a run trains with, with the lengths of its phases."""
    try:
        lengths = [config["schedule"]["short_sequence_length"], config["data"]["sequence_length"]]
        return masking_label(config["masking"], " then ".join(str(each) for each in lengths if each))
    except (KeyError, TypeError, ValueError):
        return "masking not recorded"
