"""What the student is taught."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from train.config_sections.checks import refuse, require_positive

OBJECTIVE_WEIGHTS = (
    "kd_weight",
    "mlm_weight",
    "cosine_weight",
    "mse_weight",
    "layer_cosine_weight",
    "relation_weight",
    "embedding_weight",
)
POOLINGS = ("mean", "cls", "max")
"""What becomes of a text's token vectors in train/models/pooling.py, which is slower to import."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """L = kd_weight T^2 KL(teacher || student at T) + mlm_weight CE + cosine_weight (1 - cos) + others."""

    temperature: float = 2.0
    """T of the soft targets."""

    kd_weight: float = 5.0
    """Weight of the soft targets."""

    mlm_weight: float = 2.0
    """Weight of masked-language modelling."""

    cosine_weight: float = 1.0
    """Weight of the cosine distance between the last hidden states."""

    kd_positions: Literal["all", "masked"] = "all"
    """Where the soft targets count: at every position (the original), or at masked ones (cheaper)."""

    mse_weight: float = 0.0
    """Weight of the squared difference of the logits, at the positions of the soft targets."""

    layer_cosine_weight: float = 0.0
    """Weight of the cosine distance between the hidden states of `layer_pairs`."""

    layer_pairs: list[tuple[int, int]] = field(default_factory=list)
    """(student layer, teacher layer) pairs for that; 0 is the embeddings' output, layers count from 1."""

    projection: bool = False
    """Pass the student's hidden states through a learned linear map before each cosine of them: needed where
    student and teacher have different widths."""

    relation_weight: float = 0.0
    """Weight of the relations between the queries, keys and values of one layer of each model (MiniLMv2, Wang et
    al. 2021, arXiv:2012.15828). With it alone (the other weights 0) the student may have any width, and the
    vocabulary is not touched."""

    relation_heads: int | None = None
    """Heads that the relations are cut into; both widths must divide by it. null: as many as divide them, up to
    48 (the paper's for widths of 768)."""

    relation_layers: list[tuple[int, int]] | None = None
    """(student layer, teacher layer) for that, one pair for each teacher; layers count from 1. null: the last
    ones. For teachers of 24 layers the paper takes the 21st (BERT-large) and the 19th (RoBERTa-large)."""

    embedding_weight: float = 0.0
    """Weight of the cosine distance between the sentence vectors of student and teacher, a sentence-transformers model:
    each sequence is one text, and both are pooled as the teacher's files say."""

    @property
    def needs_teacher_logits(self) -> bool:
        """Whether a term that is on compares logits."""
        return self.kd_weight + self.mse_weight > 0

    @property
    def needs_layers(self) -> bool:
        """Whether a term that is on compares hidden states of other layers than the last."""
        return self.layer_cosine_weight > 0

    @property
    def needs_hidden(self) -> bool:
        """Whether a term that is on compares hidden states."""
        return self.cosine_weight > 0 or self.needs_layers

    @property
    def needs_teacher(self) -> bool:
        """Whether a term that is on reads any output of a teacher."""
        return self.needs_teacher_output or self.relation_weight > 0

    @property
    def needs_teacher_output(self) -> bool:
        """Whether a term that is on reads what comes out of a teacher's last layer."""
        return self.needs_teacher_logits or self.needs_hidden or self.embedding_weight > 0

    @property
    def needs_student_output(self) -> bool:
        """The same of the student's."""
        return self.needs_masks or self.needs_hidden or self.embedding_weight > 0

    def relation_pairs(self, student_layers: int, teacher_layers: Sequence[int]) -> list[tuple[int, int]]:
        """(student layer, teacher layer) of each teacher, by the models' numbers of layers and counted from 1; the last
        ones where the recipe names none."""
        return self.relation_layers or [(student_layers, each) for each in teacher_layers]

    @property
    def needs_masks(self) -> bool:
        """Whether a term that is on predicts tokens: without one the models read the text as it is."""
        return self.needs_teacher_logits or self.mlm_weight > 0

    @property
    def soft_targets(self) -> Literal["all", "masked", "none"]:
        """Positions whose teacher's logits are learnt from."""
        return self.kd_positions if self.needs_teacher_logits else "none"

    def term_weights(self) -> dict[str, float]:
        """Weights by the terms' names in metrics.jsonl."""
        return {
            "loss_kd": self.kd_weight,
            "loss_mlm": self.mlm_weight,
            "loss_cos": self.cosine_weight,
            "loss_mse": self.mse_weight,
            "loss_layer_cos": self.layer_cosine_weight,
            "loss_relation": self.relation_weight,
            "loss_embedding": self.embedding_weight,
        }

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            refuse(self, "objective.temperature", "give a number above 0")
        weights = {name: getattr(self, name) for name in OBJECTIVE_WEIGHTS}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                refuse(self, f"objective.{name}", "give 0 or more")
        if not any(weights.values()):
            refuse(
                self, "objective.kd_weight", "all weights are 0, so that there is nothing to learn; raise one"
            )
        without_kd = "has no effect with objective.kd_weight=0; remove it"
        if self.kd_positions != "all" and not self.needs_teacher_logits:
            refuse(self, "objective.kd_positions", without_kd)
        if self.temperature != ObjectiveConfig.temperature and self.kd_weight == 0:
            refuse(self, "objective.temperature", without_kd)
        if bool(self.layer_pairs) != (self.layer_cosine_weight > 0):
            weight = self.layer_cosine_weight
            refuse(
                self,
                "objective.layer_pairs",
                f"goes with objective.layer_cosine_weight={weight}: give both or neither",
            )
        if self.projection and not self.needs_hidden:
            refuse(self, "objective.projection", "has no effect without a cosine term; remove it")
        for name in ("relation_heads", "relation_layers"):
            if getattr(self, name) is not None and self.relation_weight == 0:
                refuse(self, f"objective.{name}", "has no effect with objective.relation_weight=0; remove it")
        require_positive(self, "objective", "relation_heads")
        if any(own < 1 or theirs < 1 for own, theirs in self.relation_layers or []):
            refuse(self, "objective.relation_layers", "layers count from 1")
