"""The cosine term on hidden states."""

from __future__ import annotations

from typing import Any

import torch

EPSILON = 1e-12
"""Added to both squared norms, as torch.nn.CosineEmbeddingLoss does."""


@torch.compiler.disable
def hidden_cosine(student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum over tokens of 1 - cos(student, teacher).

    Args:
        student: (N, width); gradient.
        teacher: (N, width); no gradient, may be an inference tensor.
        weights: (N,) weight of each token in the mean.
    Returns:
        Scalar, fp32 (fp64 for fp64 students).
    """
    if not torch.is_grad_enabled():  # autograd would ask for the gradient all the same
        student = student.detach()
    return _HiddenCosine.apply(student, teacher, weights)


class _HiddenCosine(torch.autograd.Function):
    # A Function because autograd cannot save inference tensors; the gradient is at hand in the forward pass.
    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        s, t, w = student.to(dtype), teacher.to(dtype), weights.to(dtype)
        s_square = s.square().sum(-1) + EPSILON
        t_square = t.square().sum(-1) + EPSILON
        inverse = (s_square * t_square).rsqrt()
        cosine = (s * t).sum(-1) * inverse
        dropped = w == 0  # 0 times the NaN that padding may hold would be a NaN
        if ctx.needs_input_grad[0]:
            from_norm = (w * cosine / s_square)[:, None] * s
            gradient = from_norm.addcmul_(t, (w * inverse)[:, None], value=-1)
            ctx.save_for_backward(gradient.masked_fill_(dropped[:, None], 0.0))
        ctx.dtype = student.dtype
        return (w * (1 - cosine)).masked_fill_(dropped, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(ctx.dtype), None, None
