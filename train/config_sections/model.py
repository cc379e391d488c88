"""Who teaches and who learns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from train.config_sections.checks import refuse, require_positive

OF_TEACHERS = ("teacher_weights", "teacher_dtype", "teacher_compile", "layer_map")
"""Fields that stay at their defaults without a teacher."""


@dataclass(frozen=True)
class ModelConfig:
    """Who teaches and who learns."""

    teacher: str | list[str] | None = "google-bert/bert-base-uncased"
    """Hugging Face folder or hub name of the frozen teacher; a list makes an ensemble, whose tempered
    probabilities are averaged; null trains `scratch`, or `start_from` on, by masked-language modelling alone. A folder
    without an MLM head does where no term predicts tokens (kd_weight, mlm_weight and mse_weight 0)."""

    teacher_weights: list[float] | None = None
    """Weight of each teacher of an ensemble (they are normalised to sum to 1); null: equal weights."""

    teacher_dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """Number format of the teacher's weights and activations; auto: fp16 on a GPU, fp32 on a CPU."""

    teacher_compile: bool = False
    """Compile the teacher's layers by torch.compile, each on its own; on a CPU that takes a C++ compiler."""

    student_compile: bool = False
    """The same for the student; dropout then draws other masks, of the same seeds."""

    student_layers: int | None = None
    """Layers of the student; null: half the teacher's."""

    layer_map: Literal["every_other", "last_of_each", "distilbert", "random"] | list[int] = "distilbert"
    """Which teacher layers the student starts from: every other one (0, 2, ...), the last of each such group (1, 3,
    ..., the teacher's last among them), the original code's 0,2,4,7,9,11, an explicit list of teacher layers, or
    random weights in the teacher's shapes."""

    student_width: int | None = None
    """Hidden width of the student; null: the teacher's. A student narrower than its teacher inherits the hidden
    dimensions, heads and feed-forward units that carry most on 256 training windows (Minitron, Muralidharan et al.
    2024, arXiv:2407.14679), unless layer_map is random."""

    student_heads: int | None = None
    """Attention heads of the student, which its width is divided into; null: as many as keep the teacher's head
    width. Smaller heads inherit the dimensions that carry most; rotated ones (ModernBERT) stay whole."""

    student_feed_forward: int | None = None
    """Feed-forward units of each of the student's layers; null: the teacher's, in proportion to the width."""

    start_from: str | None = None
    """Hugging Face folder or hub name of a model that is trained on, whole, by masked-language modelling
    (model.teacher=null): a teacher for a corpus of its own."""

    new_head: bool = False
    """Put a new MLM head on a `start_from` that has none: random from data.seed, its decoder tied to the embeddings."""

    scratch: dict[str, Any] | None = None
    """Configuration of a model trained without a teacher: {model_type: bert, hidden_size: 256, ...}, keys as
    in that model's Hugging Face config; vocabulary and special ids come from the shards."""

    def __post_init__(self) -> None:
        sizes = ("student_layers", "student_width", "student_heads", "student_feed_forward")
        require_positive(self, "model", *sizes)
        if self.teacher == []:
            refuse(self, "model.teacher", "name at least one teacher, or null")
        if self.teacher is None:
            if self.start_from is None and (self.scratch is None or "model_type" not in self.scratch):
                refuse(
                    self,
                    "model.scratch",
                    "with model.teacher=null say what to train, for example {model_type: bert, hidden_size: 256}, or "
                    "give model.start_from",
                )
            if self.start_from is not None and self.scratch is not None:
                refuse(self, "model.scratch", "has no effect beside model.start_from; remove one")
            unset = ModelConfig.__dataclass_fields__
            for name in (*sizes, *OF_TEACHERS):
                if getattr(self, name) != unset[name].default:
                    refuse(self, f"model.{name}", "has no effect without model.teacher")
        else:
            for name in ("scratch", "start_from"):
                if getattr(self, name) is not None:
                    refuse(self, f"model.{name}", "has no effect beside model.teacher; remove one")
        if self.new_head and self.start_from is None:
            refuse(self, "model.new_head", "goes on a model.start_from without an MLM head; give that too")
        if self.teacher_weights is not None:
            count = len(self.teacher) if isinstance(self.teacher, list) else 1
            if count == 1:
                refuse(self, "model.teacher_weights", "has no effect with one teacher; remove it")
            if len(self.teacher_weights) != count or not all(0 < w < math.inf for w in self.teacher_weights):
                refuse(self, "model.teacher_weights", f"give {count} weights above 0, one for each teacher")
