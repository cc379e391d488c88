"""The vocabulary part of the objective, in one pass over chunks of tokens.

For each chunk both decoders' logits are computed into buffers that are used again for the next chunk; the
losses, top-1 agreement and the gradients of features, decoder weight and bias come out, and the logits are
gone. Gradients are computed in the forward pass, because it alone has the logits at hand; the backward pass
only multiplies them by the incoming gradient (the loss scale and DeepSpeed's 1/accumulation arrive there).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

CPU_BUFFER_BYTES = 16 * 2**20
GPU_BUFFER_BYTES = 256 * 2**20


@dataclass(frozen=True)
class TeacherRows:
    """One model's decoder inputs for the chosen tokens; of a teacher, or of a student being scored."""

    features: torch.Tensor
    """(N, width), any float dtype."""
    weight: torch.Tensor
    """(vocabulary, width), of the features' dtype."""
    bias: torch.Tensor | None
    """(vocabulary,)."""
    share: float
    """Weight in the ensemble's average; the shares of one ensemble add up to 1."""


@dataclass(frozen=True)
class VocabularyTerms:
    """Results of `vocabulary_loss`: scalars, fp32 (fp64 for fp64 features); only `loss` has a gradient."""

    loss: torch.Tensor
    kd: torch.Tensor
    mlm: torch.Tensor
    mse: torch.Tensor
    top1_agreement: torch.Tensor


@dataclass(frozen=True)
class Settings:
    """Numbers of one call."""

    temperature: float
    kd_weight: float
    mlm_weight: float
    mse_weight: float
    chunk_rows: int

    @property
    def logit_scale(self) -> float:
        """Logits are computed divided by T at once where KD is on."""
        return 1.0 / self.temperature if self.kd_weight > 0 else 1.0


def vocabulary_loss(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor | None,
    target_weights: torch.Tensor,
    teachers: Sequence[TeacherRows],
    row_weights: torch.Tensor,
    *,
    temperature: float,
    kd_weight: float,
    mlm_weight: float,
    mse_weight: float = 0.0,
    chunk_tokens: int | None = None,
) -> VocabularyTerms:
    """kd_weight T^2 KL + mlm_weight CE + mse_weight |z_s - z_t|^2 over N tokens, chunk by chunk.

    Args:
        features: (N, width) student features; gradient.
        weight: (V, width) student decoder; gradient.
        bias: (V,) or None; gradient.
        targets: (M,) int64 original tokens of the first M <= N rows, or None.
        target_weights: (M,) weight of each in the MLM mean, 0 for rows that do not count.
        teachers: their rows in the same order; tempered probabilities are averaged by share.
        row_weights: (N,) weight of each row in the KD and MSE mean.
    """
    settings = Settings(
        temperature,
        kd_weight if teachers else 0.0,
        mlm_weight if targets is not None else 0.0,
        mse_weight if teachers else 0.0,
        chunk_tokens or default_chunk(weight),
    )
    loss, values = _VocabularyLoss.apply(
        features, weight, bias, targets, target_weights, tuple(teachers), row_weights, settings
    )
    return VocabularyTerms(loss, *values.unbind())


def default_chunk(weight: torch.Tensor) -> int:
    """Rows of fp32 logits that fill one buffer."""
    size = CPU_BUFFER_BYTES if weight.device.type == "cpu" else GPU_BUFFER_BYTES
    return max(1, size // (4 * weight.shape[0]))


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        features: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor | None,
        target_weights: torch.Tensor,
        teachers: tuple[TeacherRows, ...],
        row_weights: torch.Tensor,
        settings: Settings,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_gradient = tuple(ctx.needs_input_grad[:3])
        student = TeacherRows(features.to(weight.dtype), weight, bias, 1.0)
        with torch.autocast(features.device.type, enabled=False):
            values, gradients = _chunked_pass(
                student, teachers, targets, target_weights, row_weights, settings, needs_gradient
            )
        ctx.save_for_backward(*gradients)
        ctx.dtypes = (features.dtype, weight.dtype, None if bias is None else bias.dtype)
        weights = values.new_tensor([settings.kd_weight, settings.mlm_weight, settings.mse_weight])
        ctx.mark_non_differentiable(values)
        return (values[:3] * weights).sum(), values

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, grad_values: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        # The product is taken in fp32: under fp16 the unscaled gradients would underflow.
        scaled = (
            None if gradient is None else (gradient * grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None, None, None)


class _Buffers:
    """Chunk-sized (rows, V) scratch tensors, made once per pass."""

    def __init__(self, rows: int, student: TeacherRows, dtype: torch.dtype) -> None:
        self.rows, self.dtype, self.student = rows, dtype, student
        self._made: dict[str, torch.Tensor] = {}

    def get(self, name: str, rows: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        if name not in self._made:
            shape = (self.rows, self.student.weight.shape[0])
            self._made[name] = torch.empty(
                shape, dtype=dtype or self.dtype, device=self.student.weight.device
            )
        return self._made[name][:rows]


def _chunked_pass(
    student: TeacherRows,
    teachers: tuple[TeacherRows, ...],
    targets: torch.Tensor | None,
    target_weights: torch.Tensor,
    row_weights: torch.Tensor,
    settings: Settings,
    needs_gradient: tuple[bool, ...],
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Values (kd, mlm, mse, top1_agreement) and gradients (features, weight, bias) of the weighted sum."""
    features, weight = student.features, student.weight
    dtype = torch.promote_types(features.dtype, torch.float32)
    num_rows = features.shape[0]
    num_targets = 0 if targets is None else targets.shape[0]
    row_weights, target_weights = row_weights.to(dtype), target_weights.to(dtype)
    values = torch.zeros(4, dtype=dtype, device=features.device)
    grad_features = torch.empty_like(features, dtype=dtype) if needs_gradient[0] else None
    grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_gradient[1] else None
    grad_bias = weight.new_zeros(weight.shape[0], dtype=dtype) if needs_gradient[2] else None
    buffers = _Buffers(min(settings.chunk_rows, max(num_rows, 1)), student, dtype)
    for start in range(0, num_rows, settings.chunk_rows):
        rows = slice(start, min(start + settings.chunk_rows, num_rows))
        targets_here = slice(start, max(start, min(rows.stop, num_targets)))
        logits = _logits(student, rows, settings.logit_scale, buffers, "student")
        gradient = _chunk_terms(
            logits,
            teachers,
            rows,
            row_weights[rows],
            targets[targets_here] if targets is not None else None,
            target_weights[targets_here],
            settings,
            buffers,
            values,
        )
        if not any(needs_gradient):
            continue
        if grad_bias is not None:
            grad_bias += gradient.sum(0)
        operand = gradient.to(weight.dtype)
        if grad_features is not None:
            grad_features[rows] = operand @ weight
        if grad_weight is not None:
            if weight.dtype == dtype:
                grad_weight.addmm_(operand.t(), features[rows])
            else:
                grad_weight += operand.t() @ features[rows]
    kept = (row_weights > 0).sum()
    values[3] /= kept.clamp_min(1)
    return values, [grad_features, grad_weight, grad_bias]


def _logits(model: TeacherRows, rows: slice, scale: float, buffers: _Buffers, name: str) -> torch.Tensor:
    """scale * (features @ weight.T + bias) of some rows, in the pass's dtype, in a reused buffer."""
    features = model.features[rows]
    out = buffers.get(name, features.shape[0])
    if model.weight.dtype == out.dtype:
        product = out
    else:
        product = buffers.get(f"{name} {model.weight.dtype}", features.shape[0], model.weight.dtype)
    torch.mm(features.to(model.weight.dtype), model.weight.t(), out=product)
    if product is not out:
        out.copy_(product)
    if model.bias is not None:
        out += model.bias
    if scale != 1.0:
        out *= scale
    return out


def _chunk_terms(
    logits: torch.Tensor,
    teachers: tuple[TeacherRows, ...],
    rows: slice,
    row_weights: torch.Tensor,
    targets: torch.Tensor | None,
    target_weights: torch.Tensor,
    settings: Settings,
    buffers: _Buffers,
    values: torch.Tensor,
) -> torch.Tensor:
    """Add this chunk's terms to `values` and return the gradient of the weighted sum by its logits."""
    temperature = 1.0 / settings.logit_scale
    gradient = torch.zeros_like(logits)
    if settings.kd_weight > 0:
        probabilities = torch.zeros_like(logits)
        for teacher in teachers:
            teacher_logits = _logits(teacher, rows, settings.logit_scale, buffers, "teacher")
            probabilities += teacher.share * torch.softmax(teacher_logits, -1)
        log_student = torch.log_softmax(logits, -1)
        divergence = (torch.xlogy(probabilities, probabilities) - probabilities * log_student).sum(-1)
        values[0] += temperature**2 * (divergence * row_weights).sum()
        coefficient = settings.kd_weight * temperature * row_weights
        gradient += (log_student.exp() - probabilities) * coefficient[:, None]
        agree = probabilities.argmax(-1) == logits.argmax(-1)
        values[3] += (agree & (row_weights > 0)).sum()
    if settings.mse_weight > 0:
        difference = logits * temperature
        for teacher in teachers:
            teacher_logits = _logits(teacher, rows, 1.0, buffers, "teacher")
            difference -= teacher.share * teacher_logits
        values[2] += (difference.square().sum(-1) * row_weights).sum()
        gradient += 2 * settings.mse_weight * row_weights[:, None] * difference
    if settings.mlm_weight > 0 and targets is not None and targets.numel() > 0:
        count = targets.shape[0]
        log_student = torch.log_softmax(logits[:count] * temperature, -1)
        chosen = log_student.gather(1, targets[:, None]).squeeze(1)
        values[1] -= (chosen * target_weights).sum()
        part = log_student.exp()
        part[torch.arange(count, device=part.device), targets] -= 1
        gradient[:count] += settings.mlm_weight * target_weights[:, None] * part
    return gradient


def hidden_cosine(student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum over tokens of 1 - cos(student, teacher).

    Args:
        student: (N, width); gradient.
        teacher: (N, width); may be an inference tensor.
        weights: (N,) weight of each token in the mean.
    Returns:
        Scalar in fp32 (fp64 for fp64 inputs).
    """
    return _HiddenCosine.apply(student, teacher, weights)


class _HiddenCosine(torch.autograd.Function):
    # A Function of its own because autograd cannot save the teacher's inference tensors, and because the
    # gradient is at hand in the forward pass.
    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:  # type: ignore[override]
        dtype = torch.promote_types(student.dtype, torch.float32)
        s, t, w = student.to(dtype), teacher.to(dtype), weights.to(dtype)
        # The epsilon of torch.nn.CosineEmbeddingLoss, under both squared norms.
        s_square = s.square().sum(-1) + 1e-12
        t_square = t.square().sum(-1) + 1e-12
        cosine = (s * t).sum(-1) / (s_square * t_square).sqrt()
        scale = -w / (s_square * t_square).sqrt()
        ctx.save_for_backward(t * scale[:, None] + s * (w * cosine / s_square)[:, None])
        ctx.dtype = student.dtype
        return (w * (1 - cosine)).sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(ctx.dtype), None, None


def heldout_sums(
    student: TeacherRows,
    teachers: Sequence[TeacherRows],
    targets: torch.Tensor,
    keep: torch.Tensor,
    chunk_tokens: int | None = None,
) -> dict[str, torch.Tensor]:
    """Sums at T = 1 over the kept rows; see train.objective.HeldoutSums."""
    dtype = torch.promote_types(student.features.dtype, torch.float32)
    names = ["student_loss", "student_correct"]
    if teachers:
        names += ["teacher_loss", "teacher_correct", "kl", "agreement"]
    sums = {name: torch.zeros((), dtype=torch.float64, device=targets.device) for name in names}
    sums["count"] = keep.sum().double()
    chunk = chunk_tokens or default_chunk(student.weight)
    buffers = _Buffers(min(chunk, max(1, targets.shape[0])), student, dtype)
    for start in range(0, targets.shape[0], chunk):
        rows = slice(start, min(start + chunk, targets.shape[0]))
        here, kept = targets[rows][:, None], keep[rows].double()
        log_student = torch.log_softmax(_logits(student, rows, 1.0, buffers, "student"), -1)
        student_best = log_student.argmax(-1)
        sums["student_loss"] -= (log_student.gather(1, here).squeeze(1) * kept).sum()
        sums["student_correct"] += ((student_best == here.squeeze(1)) * kept).sum()
        if not teachers:
            continue
        probabilities = torch.zeros_like(log_student)
        for teacher in teachers:
            probabilities += teacher.share * torch.softmax(
                _logits(teacher, rows, 1.0, buffers, "teacher"), -1
            )
        teacher_best = probabilities.argmax(-1)
        chosen = probabilities.gather(1, here).squeeze(1).log()
        divergence = (torch.xlogy(probabilities, probabilities) - probabilities * log_student).sum(-1)
        # torch.where, not a product: a teacher's probability may underflow to 0 and 0 * inf is NaN.
        sums["teacher_loss"] -= torch.where(keep[rows], chosen, 0).double().sum()
        sums["teacher_correct"] += ((teacher_best == here.squeeze(1)) * kept).sum()
        sums["kl"] += (divergence * kept).sum()
        sums["agreement"] += ((teacher_best == student_best) * kept).sum()
    return sums
