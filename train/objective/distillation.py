"""The distillation objective (Sanh et al. 2019, arXiv:1910.01108).

    L = a_kd T^2 KL(softmax(z_t/T) || softmax(z_s/T)) + a_mlm CE(z_s, token) + a_cos (1 - cos(h_s, h_t))

`DistillationLoss` is the module the trainer wraps together with the student; train/evaluation/scores.py is its
counterpart for evaluation. Both run the encoder, then hand the vocabulary part to fused_loss.py, which never holds the
logits of more than one chunk of tokens. reference.py is the plain version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from train.errors import UserError
from train.models.families import EncoderOutput, Family, family_of
from train.objective.chunk_terms import Workspace
from train.objective.fused_loss import VocabularyTerms, vocabulary_loss
from train.objective.hidden_loss import hidden_cosine
from train.objective.tied_embedding import TiedGradient, tied_lookup
from train.objective.token_selection import keep_weights, select_rows

if TYPE_CHECKING:
    from train.data.masking import MaskedBatch
    from train.models.teacher import TeacherOutput


@dataclass(frozen=True)
class LossTerms:
    """What one micro batch yields. All are fp32 scalars on the device; None for a term that is off."""

    loss: torch.Tensor
    """Weighted sum, with gradient. Nats per token."""
    kd: torch.Tensor | None = None
    """T^2 KL(teacher || student), mean over the kept tokens; detached, as are all below; unweighted."""
    mlm: torch.Tensor | None = None
    """Cross entropy with the original token, mean over masked positions."""
    cosine: torch.Tensor | None = None
    """1 - cos(h_s, h_t) of the last hidden states, mean over non-padding positions."""
    layer_cosine: torch.Tensor | None = None
    """The same averaged over the mapped layers."""
    mse: torch.Tensor | None = None
    """Squared logit difference summed over the vocabulary, mean over the kept tokens."""
    top1_agreement: torch.Tensor | None = None
    """Share of the kept tokens at which student and teacher prefer the same token; plain mean of this batch."""

    def as_dict(self) -> dict[str, torch.Tensor]:
        """The detached terms that are on, under the names of metrics.jsonl."""
        named = {
            "loss": self.loss.detach(),
            "loss_kd": self.kd,
            "loss_mlm": self.mlm,
            "loss_cos": self.cosine,
            "loss_layer_cos": self.layer_cosine,
            "loss_mse": self.mse,
            "top1_agreement": self.top1_agreement,
        }
        return {name: value for name, value in named.items() if value is not None}


class DistillationLoss(nn.Module):
    """The objective with its settings, and the learned projection if there is one.

    Has parameters only with `projection_widths`; keep it inside the module given to deepspeed.initialize so
    that they are trained.

    Args:
        temperature: T > 0 of the soft targets.
        kd_weight, mlm_weight, cosine_weight: the recipe's 5, 2, 1. Zero computes nothing.
        mse_weight: of the squared difference of logits (positions as for KD); 0 in the recipe.
        kd_positions: "all" non-padding positions (the original) or "masked" only (cheaper).
        layer_cosine_weight: of the cosine term on `layer_pairs`.
        layer_pairs: (student, teacher) indices into `hidden_states`: 0 is the embeddings' output, i the
            output of layer i counted from 1.
        projection_widths: (student width, teacher width) of each teacher, see train.objective.compatibility: learned
            linear maps bring the student's hidden states to the teachers' widths before each cosine. None:
            widths must agree.
        chunk_tokens: rows of logits that exist at once; None for what fills 32 MiB (GPU: 256 MiB) a buffer.
    Raises:
        UserError: a negative weight, T <= 0, an unknown kd_positions, all weights zero.
    """

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        kd_weight: float = 5.0,
        mlm_weight: float = 2.0,
        cosine_weight: float = 1.0,
        mse_weight: float = 0.0,
        kd_positions: str = "all",
        layer_cosine_weight: float = 0.0,
        layer_pairs: Sequence[tuple[int, int]] = (),
        projection_widths: Sequence[tuple[int, int]] | None = None,
        chunk_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.kd_weight = kd_weight
        self.mlm_weight = mlm_weight
        self.cosine_weight = cosine_weight
        self.mse_weight = mse_weight
        self.kd_positions = kd_positions
        self.layer_cosine_weight = layer_cosine_weight
        self.layer_pairs = tuple(layer_pairs)
        self.chunk_tokens = chunk_tokens
        self._workspace = Workspace()
        self._check()
        self.projection_widths = list(projection_widths or ())
        self.projections = nn.ModuleList(nn.Linear(*pair, bias=False) for pair in self.projection_widths)

    def _check(self) -> None:
        weights = ("kd_weight", "mlm_weight", "cosine_weight", "mse_weight", "layer_cosine_weight")
        for name in weights:
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"objective.{name} is {getattr(self, name)}; give a number >= 0")
        if all(getattr(self, name) == 0 for name in weights):
            raise UserError("all weights of the objective are 0: nothing would be trained; set one above 0")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"objective.temperature is {self.temperature}; give a number above 0 (usual: 2)")
        if self.kd_positions not in ("all", "masked"):
            raise UserError(f"objective.kd_positions is {self.kd_positions!r}; choose 'all' or 'masked'")
        if bool(self.layer_pairs) != (self.layer_cosine_weight > 0):
            raise UserError(
                f"layer_cosine_weight is {self.layer_cosine_weight} but layer_pairs is {self.layer_pairs}: "
                "one has no effect without the other; set both or neither"
            )
        for pair in self.layer_pairs:
            if len(pair) != 2 or not all(isinstance(layer, int) for layer in pair):
                raise UserError(
                    f"objective.layer_pairs names {pair}; give (student layer, teacher layer), two whole numbers"
                )
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise UserError(
                f"objective.chunk_tokens is {self.chunk_tokens}; give a number >= 1 or leave it out"
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether any term that is on reads the teacher; if not, load none and pass None."""
        return self.needs_teacher_logits or self.needs_hidden

    @property
    def needs_hidden(self) -> bool:
        """Whether hidden states are compared."""
        return self.cosine_weight > 0 or self.layer_cosine_weight > 0

    @property
    def needs_teacher_logits(self) -> bool:
        return self.kd_weight > 0 or self.mse_weight > 0

    @property
    def needs_hidden_states(self) -> bool:
        """Whether the teacher must return the hidden states of all layers (mapped-layer cosine)."""
        return self.layer_cosine_weight > 0

    def forward(
        self,
        student: PreTrainedModel,
        masked: MaskedBatch,
        teacher: TeacherOutput | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        num_tokens: float | torch.Tensor | None = None,
        num_masked_tokens: float | torch.Tensor | None = None,
    ) -> LossTerms:
        """Run the student on a masked micro batch and compare.

        Args:
            student: any model of train/models/families.py with an MLM head; see check_models.
            masked: input_ids (B, L) int64; positions, targets (B, n) int64; valid (B, n) bool.
            teacher: the teacher's output on masked.input_ids; None if `needs_teacher` is False.
            attention_mask: (B, L), non-zero where a token counts; None when nothing is padded.
            num_tokens: denominator of the means over non-padding positions (KD and MSE with "all", cosine).
                None: this micro batch's own count. For a global per-token mean when counts differ, pass the
                count of the whole global batch divided by (ranks x accumulation steps), because the engine
                averages over those.
            num_masked_tokens: the same for the means over masked positions (MLM; KD and MSE with "masked").
        """
        if self.needs_teacher and teacher is None:
            raise UserError("this objective needs a teacher's output; pass it, or set its weights to 0")
        family = family_of(student)
        embedding, tied, embedded = student.get_input_embeddings(), None, None
        if embedding.weight is family.decoder(student)[0]:
            tied = TiedGradient()
            embedded = tied_lookup(embedding, masked.input_ids, tied)
        encoded = family.encode(
            student, masked.input_ids, attention_mask, self.needs_hidden_states, inputs_embeds=embedded
        )
        terms = self._vocabulary_terms(
            family,
            student,
            encoded.last_hidden,
            masked,
            teacher,
            attention_mask,
            num_tokens,
            num_masked_tokens,
            tied,
        )
        loss = torch.zeros((), device=masked.input_ids.device) if terms is None else terms.loss
        cosine = layer_cosine = None
        if self.needs_hidden:
            assert teacher is not None
            keep = keep_weights(masked.input_ids, attention_mask, num_tokens)
            cosine, layer_cosine = self._hidden_terms(encoded, teacher, keep)
        if cosine is not None:
            loss = loss + self.cosine_weight * cosine
        if layer_cosine is not None:
            loss = loss + self.layer_cosine_weight * layer_cosine
        return LossTerms(
            loss=loss,
            kd=terms.kd if terms is not None and self.kd_weight > 0 else None,
            mlm=terms.mlm if terms is not None and self.mlm_weight > 0 else None,
            cosine=None if cosine is None else cosine.detach(),
            layer_cosine=None if layer_cosine is None else layer_cosine.detach(),
            mse=terms.mse if terms is not None and self.mse_weight > 0 else None,
            top1_agreement=terms.top1_agreement if terms is not None and self.needs_teacher_logits else None,
        )

    def _vocabulary_terms(
        self,
        family: Family,
        student: PreTrainedModel,
        hidden: torch.Tensor,
        masked: MaskedBatch,
        teacher: TeacherOutput | None,
        attention_mask: torch.Tensor | None,
        num_tokens: float | torch.Tensor | None,
        num_masked_tokens: float | torch.Tensor | None,
        tied: TiedGradient | None,
    ) -> VocabularyTerms | None:
        if not self.needs_teacher_logits and self.mlm_weight == 0:
            return None
        rows = select_rows(
            masked,
            attention_mask,
            all_positions=self.needs_teacher_logits and self.kd_positions == "all",
            num_tokens=num_tokens,
            num_masked_tokens=num_masked_tokens,
        )
        weight, bias = family.decoder(student)
        return vocabulary_loss(
            family.transform(student, hidden.flatten(0, 1).index_select(0, rows.order)),
            weight,
            bias,
            rows.targets if self.mlm_weight > 0 else None,
            rows.target_weights,
            teacher.rows(rows.order) if teacher is not None and self.needs_teacher_logits else (),
            rows.row_weights,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            mlm_weight=self.mlm_weight,
            mse_weight=self.mse_weight,
            chunk_tokens=self.chunk_tokens,
            workspace=self._workspace,
            tied=tied,
        )

    def _hidden_terms(
        self, encoded: EncoderOutput, teacher: TeacherOutput, keep: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Cosine terms of the last hidden states and of the mapped layers; None for one that is off."""
        last = self._cosine(encoded, teacher, keep, None) if self.cosine_weight > 0 else None
        if self.layer_cosine_weight == 0:
            return last, None
        mapped = [self._cosine(encoded, teacher, keep, pair) for pair in self.layer_pairs]
        return last, torch.stack(mapped).mean()

    def _cosine(
        self,
        encoded: EncoderOutput,
        teacher: TeacherOutput,
        keep: torch.Tensor,
        pair: tuple[int, int] | None,
    ) -> torch.Tensor:
        """Cosine term of the last hidden states, or of one (student, teacher) pair; members by their share."""
        if pair is None:
            student_hidden = encoded.last_hidden
        else:
            assert encoded.hidden_states is not None
            student_hidden = encoded.hidden_states[pair[0]]
        student_hidden = student_hidden.flatten(0, 1)
        total = torch.zeros((), device=keep.device)
        for index, member in enumerate(teacher.members):
            hidden = member.last_hidden
            if pair is not None:
                assert member.hidden_states is not None
                hidden = member.hidden_states[pair[1]]
            mapped = self.projections[index](student_hidden) if self.projections else student_hidden
            total = total + member.share * hidden_cosine(mapped, hidden.flatten(0, 1), keep)
        return total
