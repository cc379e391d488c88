"""Which tokens the objective looks at, and with what weight in each mean: fixed shapes, no device sync."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from train.data.masking import MaskedBatch


@dataclass(frozen=True)
class SelectedTokens:
    """Tokens whose logits are needed, those with a target first."""

    order: torch.Tensor
    """(N,) int64 indices into the flattened (B * L) tokens."""
    row_weights: torch.Tensor
    """(N,) fp64 weight of each row in the KD and MSE mean; 0 drops it."""
    targets: torch.Tensor
    """(M,) int64, M <= N: original tokens of the first M rows (any entry where the weight is 0)."""
    target_weights: torch.Tensor
    """(M,) fp64 weight of each of them in the MLM mean; 0 drops it."""

    def of(self, rows: slice) -> SelectedTokens:
        """A part of the tokens."""
        parts = (self.order, self.row_weights, self.targets, self.target_weights)
        return SelectedTokens(*(part[rows] for part in parts))

    def without_targets(self) -> SelectedTokens:
        """For an objective without an MLM term."""
        return replace(self, targets=self.targets[:0], target_weights=self.target_weights[:0])


def select_tokens(
    masked: MaskedBatch,
    attention_mask: torch.Tensor | None,
    *,
    all_positions: bool,
    num_tokens: float | torch.Tensor | None = None,
    num_masked_tokens: float | torch.Tensor | None = None,
) -> SelectedTokens:
    """Choose all positions or the masked ones, masked first, so that the MLM part of a chunk is a slice.

    Args:
        attention_mask: (B, L), non-zero where a token counts, or None.
        all_positions: False for the masked positions only.
        num_tokens, num_masked_tokens: denominators of the means; None for this batch's own counts.
    """
    batch, length = masked.input_ids.shape
    device = masked.input_ids.device
    offsets = torch.arange(batch, device=device)[:, None] * length
    flat = (masked.positions + offsets).flatten()
    valid = masked.valid.flatten()
    masked_mean = mean_weights(valid, num_masked_tokens)
    if not all_positions:
        return SelectedTokens(flat, masked_mean, masked.targets.flatten(), masked_mean)
    # Invalid entries go to a spare slot at the end, so that they cannot overwrite a real one.
    slot = torch.where(valid, flat, batch * length)
    targets = torch.zeros(batch * length + 1, dtype=torch.int64, device=device)
    targets[slot] = masked.targets.flatten()
    weights = torch.zeros(batch * length + 1, dtype=torch.float64, device=device)
    weights[slot] = masked_mean
    is_masked = torch.zeros(batch * length + 1, dtype=torch.uint8, device=device)
    is_masked.index_fill_(
        0, slot, 1
    )  # a host scalar assigned by index would be copied to the GPU, and waited for
    order = torch.argsort(is_masked[:-1], descending=True, stable=True)
    first = order[: flat.numel()]
    keep = keep_weights(masked.input_ids, attention_mask, num_tokens)
    return SelectedTokens(order, keep[order], targets[first], weights[first])


def keep_weights(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, num_tokens: float | torch.Tensor | None
) -> torch.Tensor:
    """(B * L,) fp64 weights of the mean over non-padding positions."""
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    return mean_weights(keep.flatten(), num_tokens)


def mean_weights(keep: torch.Tensor, count: float | torch.Tensor | None) -> torch.Tensor:
    """keep / count in fp64 (fp32 weights would spoil an fp64 pass); zero where nothing is kept, never 0/0."""
    if count is None:
        count = keep.sum()
    if isinstance(count, torch.Tensor):
        divisor = count.to(keep.device, torch.float64)
    else:
        divisor = torch.full((), count, dtype=torch.float64, device=keep.device)
    return torch.where(keep, 1.0 / divisor.clamp_min(1e-300), 0.0)
