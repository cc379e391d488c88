"""The distillation objective (Sanh et al. 2019, arXiv:1910.01108).

    L = a_kd T^2 KL(softmax(z_t/T) || softmax(z_s/T)) + a_mlm CE(z_s, token) + a_cos (1 - cos(h_s, h_t))
      + a_rel (the relations' divergence: relations.py) + a_emb (1 - cos(v_s, v_t)), v the pooled h of each sequence

`DistillationLoss` is the module the trainer wraps together with the student; train/evaluation/scores.py is its
counterpart for evaluation. Both run the encoder, then hand the vocabulary part to fused_loss.py, which never holds the
logits of more than one chunk of tokens. reference.py is the plain version.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from train.config_sections.objective import ObjectiveConfig
from train.data.masking import MaskedBatch
from train.models.attention_vectors import AttentionVectors
from train.models.families import EncoderOutput, family_of, has_head
from train.models.pooling import pooled
from train.models.teacher import TeacherMember, TeacherOutput
from train.objective.chunk_terms import VocabularyWeights, Workspace
from train.objective.fused_loss import VocabularyTerms, vocabulary_loss
from train.objective.hidden_loss import hidden_cosine
from train.objective.relations import relation_loss
from train.objective.tied_embedding import TiedGradient, tied_lookup
from train.objective.token_selection import SelectedTokens, keep_weights, select_tokens


@dataclass(frozen=True)
class Relations:
    """What the relation term needs to know of the student."""

    student: AttentionVectors
    heads: int
    """Relation heads; divides the widths of the student and of every teacher."""


class DistillationLoss(nn.Module):
    """The objective with its settings, and the learned projection if there is one.

    Has parameters only with `projection_widths`; keep it inside the module given to deepspeed.initialize so
    that they are trained.

    Args:
        settings: the recipe's section objective.*, which owns defaults and checks. A weight of 0 computes nothing.
        projection_widths: (student width, teacher width) of each teacher: learned linear maps bring the student's
            hidden states to the teachers' widths before each cosine. Empty: widths must agree.
        relations: where the student's queries, keys and values are, and into how many relation heads they are cut;
            None where that term is off.
        pooling: one of POOLINGS, for the embedding term; None where that is off.
        chunk_tokens: rows of logits that exist at once; None for what fills 64 MiB (GPU: 256 MiB) a buffer.
    """

    def __init__(
        self,
        settings: ObjectiveConfig,
        projection_widths: Sequence[tuple[int, int]] = (),
        relations: Relations | None = None,
        pooling: str | None = None,
        chunk_tokens: int | None = None,
    ) -> None:
        super().__init__()
        assert (relations is not None) == (settings.relation_weight > 0)
        assert (pooling is not None) == (settings.embedding_weight > 0)
        assert chunk_tokens is None or chunk_tokens > 0
        self.settings = settings
        self.relations = relations
        self.pooling = pooling
        self.chunk_tokens = chunk_tokens
        self._workspace = Workspace()
        self.projections = nn.ModuleList(nn.Linear(*pair, bias=False) for pair in projection_widths)

    def forward(
        self,
        student: PreTrainedModel,
        masked: MaskedBatch,
        teacher: TeacherOutput | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        num_tokens: float | torch.Tensor | None = None,
        num_masked_tokens: float | torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Run the student on a masked micro batch and compare.

        Args:
            student: any model of train/models/families.py, with an MLM head where a term predicts tokens.
            masked: input_ids (B, L) int64; positions, targets (B, n) int64; valid (B, n) bool.
            teacher: the teacher's output on masked.input_ids; None if no term needs it.
            attention_mask: (B, L), non-zero where a token counts; None when nothing is padded.
            num_tokens: denominator of the means over non-padding positions (KD and MSE with "all", cosine).
                None: this micro batch's own count. For a global per-token mean when counts differ, pass the
                count of the whole global batch divided by (ranks x accumulation steps), because the engine
                averages over those.
            num_masked_tokens: the same for the means over masked positions (MLM; KD and MSE with "masked").
        Returns:
            By their names in metrics.jsonl the terms that are on, fp32 scalars on the device; "loss" alone has a
            gradient:

            loss: weighted sum, nats per token.
            loss_kd: T^2 KL(teacher || student), mean over the kept tokens; unweighted, as are all below.
            loss_mlm: cross entropy with the original token, mean over masked positions.
            loss_cos: 1 - cos(h_s, h_t) of the last hidden states, mean over non-padding positions.
            loss_mse: squared logit difference summed over the vocabulary, mean over the kept tokens.
            loss_layer_cos: as loss_cos, averaged over the mapped layers.
            loss_relation: KL(teacher || student) of the relations, summed over queries, keys and values; mean over
                heads and non-padding positions.
            loss_embedding: 1 - cos of the sequences' pooled vectors, each weighted by its non-padding positions.
            top1_agreement: share of the kept tokens at which student and teacher prefer the same token; plain mean of
                this batch.
        """
        settings, weights = self.settings, self.settings.term_weights()
        assert teacher is not None or not settings.needs_teacher
        encoded, tied = self._encoded(student, masked.input_ids, attention_mask)
        loss = torch.zeros((), device=masked.input_ids.device)
        found: dict[str, torch.Tensor] = {}
        if settings.needs_masks:
            tokens = select_tokens(
                masked,
                attention_mask,
                all_positions=settings.soft_targets == "all",
                num_tokens=num_tokens,
                num_masked_tokens=num_masked_tokens,
            )
            terms = self._vocabulary_terms(student, encoded, teacher, tokens, tied)
            loss = terms.loss
            found = {"loss_kd": terms.kd, "loss_mlm": terms.mlm, "loss_mse": terms.mse}
            found["top1_agreement"] = terms.top1_agreement
        keep = keep_weights(masked.input_ids, attention_mask, num_tokens).view(masked.input_ids.shape)
        for name, value in self._encoder_terms(encoded, teacher, keep, attention_mask).items():
            loss = loss + weights[name] * value
            found[name] = value.detach()
        names = [name for name, weight in weights.items() if weight > 0]
        names += ["top1_agreement"] if settings.needs_teacher_logits else []
        return {"loss": loss, **{name: found[name] for name in names}}

    def _encoded(
        self, student: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[EncoderOutput, TiedGradient | None]:
        """The student's hidden states, and where its decoder is tied to the embeddings their common gradient."""
        settings, family = self.settings, family_of(student)
        embedding, tied, embedded = student.get_input_embeddings(), None, None
        if has_head(student) and embedding.weight is family.decoder(student)[0]:
            tied = TiedGradient()
            embedded = tied_lookup(embedding, input_ids, tied)
        relations = None if settings.needs_student_output else self.relations
        with nullcontext() if relations is None else relations.student.alone():
            encoded = family.encode(
                student, input_ids, attention_mask, settings.needs_layers, inputs_embeds=embedded
            )
        return encoded, tied

    def _vocabulary_terms(
        self,
        student: PreTrainedModel,
        encoded: EncoderOutput,
        teacher: TeacherOutput | None,
        tokens: SelectedTokens,
        tied: TiedGradient | None,
    ) -> VocabularyTerms:
        """What is compared over the vocabulary, in one pass over the selected tokens."""
        settings = self.settings
        features = encoded.last_hidden.flatten(0, 1).index_select(0, tokens.order)
        return vocabulary_loss(
            family_of(student).decoder_inputs(student, features),
            teacher.decoder_inputs(tokens.order) if teacher and settings.needs_teacher_logits else (),
            tokens,
            VocabularyWeights(
                settings.temperature, settings.kd_weight, settings.mlm_weight, settings.mse_weight
            ),
            chunk_tokens=self.chunk_tokens,
            workspace=self._workspace,
            tied=tied,
        )

    @torch.no_grad()
    def score_text(
        self, student: PreTrainedModel, teacher: TeacherOutput, input_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The terms that read no logits, of text as it is.

        Args:
            student: in eval mode.
            teacher: its output on the same input_ids (B, L).
        Returns:
            Sums over the tokens, fp32 scalars on the device, of those that are on: "loss_cos",
            "loss_layer_cos", "loss_relation", "loss_embedding".
        """
        encoded = family_of(student).encode(student, input_ids, None, self.settings.needs_layers)
        keep = torch.ones(input_ids.shape, device=input_ids.device)
        return self._encoder_terms(encoded, teacher, keep, None)

    def _encoder_terms(
        self,
        encoded: EncoderOutput,
        teacher: TeacherOutput | None,
        keep: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """Relations, the cosine of the last hidden states, of the mapped layers and of the pooled vectors: those that
        are on.

        Args:
            keep: (B, L) weight of each position in the mean.
        """
        settings, terms = self.settings, {}
        members = () if teacher is None else teacher.members
        if self.relations is not None:
            terms["loss_relation"] = self._relation(self.relations, members, keep, attention_mask)
        if settings.cosine_weight > 0:
            theirs = [member.last_hidden for member in members]
            terms["loss_cos"] = self._cosine(encoded.last_hidden, theirs, members, keep)
        if settings.layer_cosine_weight > 0:
            pairs = []
            for layer, teacher_layer in settings.layer_pairs:
                theirs = [member.hidden_states[teacher_layer] for member in members]
                pairs.append(self._cosine(encoded.hidden_states[layer], theirs, members, keep))
            terms["loss_layer_cos"] = torch.stack(pairs).mean()
        if self.pooling is not None:
            vectors = [
                pooled(hidden, attention_mask, self.pooling)
                for hidden in (encoded.last_hidden, members[0].last_hidden)
            ]
            terms["loss_embedding"] = hidden_cosine(*vectors, keep.sum(1))
        return terms

    def _relation(
        self,
        relations: Relations,
        members: Sequence[TeacherMember],
        weights: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The relations' divergence after a forward pass of the student and of the teacher; members by their share."""
        student = relations.student.take()
        parts = []
        for member in members:
            value = relation_loss(
                student,
                member.vectors,
                weights,
                attention_mask,
                heads=relations.heads,
                workspace=self._workspace,
            )
            parts.append(member.share * value)
        return torch.stack(parts).sum()

    def _cosine(
        self,
        student: torch.Tensor,
        theirs: Sequence[torch.Tensor],
        members: Sequence[TeacherMember],
        keep: torch.Tensor,
    ) -> torch.Tensor:
        """Cosine term of (B, L, width) hidden states, the student's and each member's; members by their share."""
        student, keep = student.flatten(0, 1), keep.flatten()
        total = torch.zeros((), device=keep.device)
        for index, (member, hidden) in enumerate(zip(members, theirs, strict=True)):
            mapped = self.projections[index](student) if self.projections else student
            total = total + member.share * hidden_cosine(mapped, hidden.flatten(0, 1), keep)
        return total
