"""The relation term (MiniLMv2, Wang et al. 2021, arXiv:2012.15828, section 3), in one pass over chunks of maps.

    sum over A in {queries, keys, values} of the mean over heads of
        KL(softmax(A_t A_t' / sqrt(d_t)) || softmax(A_s A_s' / sqrt(d_s)))

Each model's vectors are cut into the same number of relation heads, which need not be its attention heads: so widths,
heads and depths of the two models are free. The (L, L) maps of a few sequences' heads exist at once, in buffers used
again; values and the student's gradients come out of the same pass. On a CPU with a C compiler a few rows of one map
exist at once (relations_native.py). reference.py has the plain version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from train.objective.chunk_terms import Workspace
from train.objective.relations_native import build, native_pass

CPU_MAPS_BYTES = 2**20
GPU_MAPS_BYTES = 256 * 2**20
"""Of one fp32 buffer of maps; a pass uses three. A CPU's must stay in its second-level cache."""


@torch.compiler.disable
def relation_loss(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    weights: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    heads: int,
    chunk_maps: int | None = None,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """Weighted sum over query positions of the relations' divergence, in nats.

    One backward pass only: it hands over the gradients that the forward pass made.

    Args:
        student: (B, L, width) queries, keys and values of one layer, any float dtype; gradient.
        teacher: as many tensors (B, L, its width); no gradient, may be inference tensors.
        weights: (B, L) weight of each position in the mean; 0 where it is padding.
        attention_mask: (B, L), non-zero where a token counts; None when nothing is padded.
        heads: relation heads; divides both widths.
        chunk_maps: maps (L, L) that exist at once in torch operations; None for the C loops on a CPU, and otherwise for
            what fills 1 MiB (GPU: 256 MiB) per buffer.
        workspace: buffers to use again; None makes them afresh.
    Returns:
        Scalar, fp32 (fp64 for fp64 students).
    """
    assert len(student) == len(teacher)
    assert all(vectors.shape[-1] % heads == 0 for vectors in (*student, *teacher))
    if not torch.is_grad_enabled():  # autograd would ask for the gradients all the same
        student = [vectors.detach() for vectors in student]
    padding = None if attention_mask is None else attention_mask == 0
    # A GPU's allocator keeps freed blocks at hand; holding them would only take memory from activations.
    kept = workspace if workspace is not None and weights.device.type == "cpu" else Workspace()
    run = _Pass(tuple(teacher), weights, padding, heads, chunk_maps, kept)
    return _RelationLoss.apply(run, *student)


class _RelationLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Pass, *student: torch.Tensor) -> torch.Tensor:
        with torch.autocast(student[0].device.type, enabled=False):
            value, ctx.gradients = run.run(student, any(ctx.needs_input_grad))
        ctx.dtype = student[0].dtype
        return value

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError(
                "the relation term keeps its gradients for one backward pass; run forward again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        # In fp32 and in place: fp16 would underflow before the loss scale.
        return (None, *(gradient.mul_(grad_loss).to(ctx.dtype) for gradient in gradients))


@dataclass(frozen=True)
class _Pass:
    """Arguments of one pass, see `relation_loss`."""

    teacher: tuple[torch.Tensor, ...]
    weights: torch.Tensor
    padding: torch.Tensor | None
    """(B, L) bool."""
    heads: int
    chunk_maps: int | None
    workspace: Workspace

    def run(
        self, student: Sequence[torch.Tensor], needs_gradient: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        """The value, and the gradients (B, L, width) of the student's vectors."""
        dtype = torch.promote_types(student[0].dtype, torch.float32)
        on_cpu = self.weights.device.type == "cpu"
        if self.chunk_maps is None and on_cpu and (library := build(dtype)) is not None:
            weights = self.weights.to(dtype) / self.heads
            return native_pass(
                library, student, self.teacher, weights, self.padding, self.heads, needs_gradient
            )
        row_weights = (self.weights.to(dtype) / self.heads).repeat_interleave(self.heads, 0)[..., None]
        padded_keys = None if self.padding is None else self.padding.repeat_interleave(self.heads, 0)[:, None]
        value = torch.zeros((), dtype=dtype, device=student[0].device)
        gradients: list[torch.Tensor] | None = [] if needs_gradient else None
        for own, theirs in zip(student, self.teacher, strict=True):
            of_student, of_teacher = self._by_head(own, dtype), self._by_head(theirs, dtype)
            gradient = torch.empty_like(of_student) if needs_gradient else None
            size = self._chunk_size(of_student)
            for start in range(0, of_student.shape[0], size):
                maps = slice(start, start + size)
                value += self._chunk(
                    of_student[maps],
                    of_teacher[maps],
                    row_weights[maps],
                    None if padded_keys is None else padded_keys[maps],
                    None if gradient is None else gradient[maps],
                )
            if gradients is not None and gradient is not None:
                gradients.append(self._joined(gradient))
        return value, gradients

    def _by_head(self, vectors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(B * heads, L, d) from (B, L, heads * d), times d ** -0.25, so that products are relations.

        Zeros where there is padding: a weight of 0 times a NaN would be a NaN.
        """
        batch, length, width = vectors.shape
        size = width // self.heads
        vectors = vectors.to(dtype) * size**-0.25
        if self.padding is not None:
            vectors = vectors.masked_fill_(self.padding[..., None], 0.0)
        return vectors.view(batch, length, self.heads, size).transpose(1, 2).reshape(-1, length, size)

    def _joined(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient (B, L, heads * d) of the vectors that `_by_head` cut up, from (B * heads, L, d)."""
        maps, length, size = gradient.shape
        parts = gradient.view(maps // self.heads, self.heads, length, size).transpose(1, 2)
        return parts.reshape(-1, length, self.heads * size).mul_(size**-0.25)

    def _chunk_size(self, vectors: torch.Tensor) -> int:
        if self.chunk_maps is not None:
            return self.chunk_maps
        available = CPU_MAPS_BYTES if vectors.device.type == "cpu" else GPU_MAPS_BYTES
        return max(1, available // (vectors.element_size() * vectors.shape[1] ** 2))

    def _chunk(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        row_weights: torch.Tensor,
        padded_keys: torch.Tensor | None,
        gradient: torch.Tensor | None,
    ) -> torch.Tensor:
        """Value of n maps; writes the gradient by `student`.

        Each exponential is taken once, and normalisers are multiplied in as late as possible, with the rows' weights.

        Args:
            student, teacher: (n, L, d). row_weights: (n, L, 1). padded_keys: (n, 1, L). gradient: (n, L, d).
        """
        of_student, of_teacher = (
            self._relations(vectors, padded_keys, name)
            for vectors, name in ((student, "student maps"), (teacher, "teacher maps"))
        )
        numerators = torch.exp(of_teacher, out=self._buffer(student, "targets"))
        normalisers = numerators.sum(-1, keepdim=True)
        divergence = of_teacher.sub_(of_student).mul_(numerators).sum(-1, keepdim=True) / normalisers
        exponentials = of_student.exp_()
        sums = exponentials.sum(-1, keepdim=True)
        value = ((divergence + (sums / normalisers).log()) * row_weights).sum()
        if gradient is not None:
            exponentials.mul_(row_weights / sums).sub_(numerators.mul_(row_weights / normalisers))
            # A relation is a product of the vectors with themselves: each of them is a row and a column.
            symmetric = torch.add(exponentials, exponentials.transpose(1, 2), out=of_teacher)
            torch.bmm(symmetric, student, out=gradient)
        return value

    def _relations(self, vectors: torch.Tensor, padded_keys: torch.Tensor | None, name: str) -> torch.Tensor:
        """(n, L, L) scaled dot products, less each row's largest; padding's keys at the end of the range."""
        maps = torch.bmm(vectors, vectors.transpose(1, 2), out=self._buffer(vectors, name))
        if padded_keys is not None:
            maps.masked_fill_(padded_keys, torch.finfo(maps.dtype).min / 4)
        return maps.sub_(maps.amax(-1, keepdim=True))

    def _buffer(self, vectors: torch.Tensor, name: str) -> torch.Tensor:
        num_maps, length, _ = vectors.shape
        return self.workspace.get(name, num_maps * length, vectors[0], vectors.dtype).view(
            num_maps, length, length
        )
