"""Figures of the DistilBERT paper (Sanh et al. 2019, arXiv:1910.01108), to be shown beside ours and never as ours.

All are of BERT-base's size: teacher of 110 million parameters, student of 66 million, trained on English Wikipedia and
the Toronto Book Corpus for about 90 hours on 8 V100 GPUs. Scores are in points of 0..100.
Table 4 stands beside the variants that it is about: launch/ablation/variants.py.
"""

from __future__ import annotations

SOURCE = "Sanh et al. 2019, arXiv:1910.01108"
LABEL = "published, BERT-base scale"
TEACHER, STUDENT, DISTILLED = "BERT-base", "DistilBERT", "DistilBERT (D)"
"""The last is fine-tuned with a fine-tuned teacher's soft labels."""

# Table 1: dev sets of GLUE, medians of 5 seeds; MRPC and QQP mean of accuracy and F1, STS-B mean of both correlations.
_TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
GLUE = {
    TEACHER: dict(zip(_TASKS, (56.3, 84.7, 88.6, 91.8, 89.6, 69.3, 92.7, 89.0, 53.5), strict=True)),
    STUDENT: dict(zip(_TASKS, (51.3, 82.1, 87.5, 89.2, 88.5, 59.9, 91.3, 86.9, 56.3), strict=True)),
}
GLUE_AVERAGE = {TEACHER: 79.5, STUDENT: 77.0}

# Table 2: IMDb's test set (accuracy), SQuAD 1.1's dev set.
DOWNSTREAM: dict[tuple[str, str], dict[str, float]] = {
    ("imdb", "accuracy"): {TEACHER: 93.46, STUDENT: 92.82},
    ("squad", "exact_match"): {TEACHER: 81.2, STUDENT: 77.7, DISTILLED: 79.1},
    ("squad", "f1"): {TEACHER: 88.5, STUDENT: 85.8, DISTILLED: 86.9},
}

# Table 3: one pass over STS-B's 1,500 dev pairs, batch 1, on a CPU (Xeon E5-2690 v3), in seconds; parameters.
STSB_PAIRS = 1500
PASS_SECONDS = {TEACHER: 668.0, STUDENT: 410.0}
PARAMETERS = {TEACHER: 110_000_000, STUDENT: 66_000_000}
