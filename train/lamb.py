"""LAMB with exact per-tensor trust ratios, under DeepSpeed's ZeRO stages 1 and 2 as well as without it.

    optimizer = Lamb(model.named_parameters(), lr=1.5e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    optimizer.bind(engine)

The DeepSpeed config needs `"zero_allow_untested_optimizer": true` (DeepSpeed keeps a list of the classes it
knows) and `"round_robin_gradients": false` (its default); `"data_types": {"grad_accum_dtype": "fp32"}` is
advised when bf16 or fp16 gradients are accumulated. Learning rates are set in `param_groups[0]["lr"]`, through
the engine's wrapper or here. State lives in flat `exp_avg`, `exp_avg_sq` and an integer `step`, which the
engine's checkpoints, its universal checkpoints and zero_to_fp32 carry.

Without DeepSpeed, and at stage 0 in fp32, `bind` is not needed. At stage 0 in fp16 or bf16 it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from train.lamb_binding import Binding, bind_engine
from train.lamb_geometry import Piece, optimized_parameters, tensor_rules
from train.lamb_math import (
    StepCoefficients,
    step_coefficients,
    trust_ratios,
    update_direction,
    update_moments,
)


class Lamb(torch.optim.Optimizer):
    """Layer-wise adaptive moments (You et al. 2020, arXiv:1904.00962), exact on flat ZeRO partitions.

    Biases and normalisation parameters, told by name or by having one dimension, take no decay and no
    adaptation. A tied weight counts once. There is one param group; the per-tensor rules are private.

    Args:
        named_parameters: (name, parameter) pairs, as from `model.named_parameters()`; frozen ones are left out.
        lr: learning rate > 0; 0 is allowed for schedules that start there.
        betas, eps, weight_decay: as in the paper; decay is decoupled and inside the trust ratio.
        adapt_all: adapt biases and norms too.
        clamp: (low, high) limits of the trust ratio.
        prenormalize: divide the gradient by its global norm first (NVIDIA's variant); keep the engine's
            gradient_clipping at 0 then. Costs one more read of the gradients and one 8-byte collective.
        bias_correction: correct both moments for their start at zero.
        mode: "decoupled", or "deepspeed" for the formula of DeepSpeed's own FusedLamb: all tensors decayed
            and adapted, ratio clamped to [0.01, 10] unless `clamp` says otherwise, bias correction outside it.
    Raises:
        ValueError: an argument out of range, or a combination of which one part would have no effect.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.Tensor]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        adapt_all: bool = False,
        clamp: tuple[float, float] | None = None,
        prenormalize: bool = False,
        bias_correction: bool = True,
        mode: str = "decoupled",
    ) -> None:
        _check_arguments(lr, betas, eps, weight_decay, clamp, mode, prenormalize)
        named = optimized_parameters(named_parameters)
        like_deepspeed = mode == "deepspeed"
        self._rules = tensor_rules(named, adapt_all=adapt_all or like_deepspeed, decay_all=like_deepspeed)
        self._parameters = [parameter for _, parameter in named]
        self._clamp = (0.01, 10.0) if like_deepspeed and clamp is None else clamp
        self._prenormalize, self._bias_correction, self._mode = prenormalize, bias_correction, mode
        self._binding: Binding | None = None
        self.tensor_names: tuple[str, ...] = tuple(rule.name for rule in self._rules)
        device = self._parameters[0].device
        self.adapted = torch.tensor([rule.adapt for rule in self._rules], device=device)
        """(T,) bool: which tensors have a trust ratio of their own."""
        self.trust_ratios = torch.ones(len(self._rules), device=device)
        """(T,) fp32, the last step's, in the order of tensor_names; 1 before the first step."""
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(self._parameters, defaults)

    def bind(self, engine: Any) -> None:
        """Learn from a DeepSpeed engine where each tensor lies; call once, after deepspeed.initialize.

        Makes the state at once, so that a checkpoint saved or loaded before the first step is whole.

        Raises:
            ValueError: the engine is set up in a way that no LAMB is exact under (the message names it).
        """
        binding = bind_engine(engine, self, self._parameters)
        if binding.pieces is not None and self._prenormalize and engine.gradient_clipping() > 0:
            raise ValueError(
                f"prenormalize divides the gradient by its norm, so gradient_clipping "
                f"{engine.gradient_clipping()} would have no effect: set gradient_clipping to 0"
            )
        self._binding = binding
        for parameter in self.param_groups[0]["params"]:
            self._state_of(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update. Collective over the data-parallel group when bound to a partitioned engine.

        Raises:
            ValueError: the parameters were replaced (by a DeepSpeed engine, say) and `bind` was not called.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        slices = self._slices()
        if self._prenormalize:
            slices = self._normalized(slices)
        sums = torch.zeros(len(self._rules), 2, dtype=torch.float64, device=self._device())
        for part in slices:
            update_moments(part.m, part.v, part.g, part.c)
            rule = self._rules[part.tensor]
            if rule.adapt:
                u = update_direction(part.p, part.m, part.v, part.c, rule.decay, torch.empty_like(part.p))
                sums[part.tensor, 0] += part.p.double().square().sum()
                sums[part.tensor, 1] += u.double().square().sum()
        if self._binding is not None and self._binding.group is not None:
            dist.all_reduce(sums, group=self._binding.group)
        if self.adapted.device != sums.device:
            self.adapted = self.adapted.to(sums.device)
        self.trust_ratios = trust_ratios(sums, self.adapted, self._clamp)
        for part in slices:
            decay = self._rules[part.tensor].decay
            u = update_direction(part.p, part.m, part.v, part.c, decay, torch.empty_like(part.p))
            part.p.sub_(u.mul_(self.trust_ratios[part.tensor] * part.c.step_size))
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: one group is what keeps a step at one collective."""
        if self.param_groups:
            raise ValueError("Lamb has one parameter group: give it all named parameters when you build it")
        super().add_param_group(param_group)

    def _device(self) -> torch.device:
        return self.param_groups[0]["params"][0].device

    def _state_of(self, parameter: torch.Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        return state

    def _slices(self) -> list[_Slice]:
        """What this rank updates, as 1-D views; advances every step counter."""
        parameters = self.param_groups[0]["params"]
        tensors: Iterable[int] = range(len(self._parameters))
        if self._binding is not None:
            tensors = self._binding.tensors
        elif any(a is not b for a, b in zip(parameters, self._parameters, strict=False)) or len(
            parameters
        ) != len(self._parameters):
            raise ValueError(
                "Lamb's parameters were replaced, most likely by a DeepSpeed engine, and it cannot know where "
                "each tensor lies: call optimizer.bind(engine) after deepspeed.initialize"
            )
        if self._binding is not None and self._binding.pieces is not None:
            (flat,) = parameters
            return self._views(flat, self._binding.pieces)
        slices = []
        for tensor, parameter in zip(tensors, parameters, strict=True):
            if parameter.grad is not None:
                slices += self._views(parameter, (Piece(tensor, 0, parameter.numel()),))
        return slices

    def _views(self, parameter: torch.Tensor, pieces: tuple[Piece, ...]) -> list[_Slice]:
        state = self._state_of(parameter)
        state["step"] += 1
        group = self.param_groups[0]
        c = step_coefficients(
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=state["step"],
            bias_correction=self._bias_correction,
            mode=self._mode,
        )
        assert parameter.grad is not None
        p, g = parameter.detach().view(-1), parameter.grad.reshape(-1)
        m, v = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        return [
            _Slice(piece.tensor, *(x[piece.start : piece.stop] for x in (p, g, m, v)), c) for piece in pieces
        ]

    def _normalized(self, slices: list[_Slice]) -> list[_Slice]:
        total = torch.zeros((), dtype=torch.float64, device=self._device())
        for part in slices:
            total += part.g.double().square().sum()
        if self._binding is not None and self._binding.group is not None:
            dist.all_reduce(total, group=self._binding.group)
        scale = torch.where(total > 0, total.rsqrt(), 1.0).float()
        return [_Slice(s.tensor, s.p, s.g * scale, s.m, s.v, s.c) for s in slices]


class _Slice:
    """Views of one tensor's elements on this rank: parameter, gradient, moments; and its coefficients."""

    __slots__ = ("c", "g", "m", "p", "tensor", "v")

    def __init__(
        self,
        tensor: int,
        p: torch.Tensor,
        g: torch.Tensor,
        m: torch.Tensor,
        v: torch.Tensor,
        c: StepCoefficients,
    ) -> None:
        self.tensor, self.p, self.g, self.m, self.v, self.c = tensor, p, g, m, v, c


def _check_arguments(
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clamp: tuple[float, float] | None,
    mode: str,
    prenormalize: bool,
) -> None:
    if not lr >= 0:
        raise ValueError(f"lr is {lr}: it must be 0 or more")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are {betas}: both must be at least 0 and below 1")
    if not eps > 0:
        raise ValueError(f"eps is {eps}: it must be above 0")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay is {weight_decay}: it must be 0 or more")
    if clamp is not None and not 0 <= clamp[0] <= clamp[1]:
        raise ValueError(f"clamp is {clamp}: give (low, high) with 0 <= low <= high")
    if mode not in ("decoupled", "deepspeed"):
        raise ValueError(f"mode is {mode!r}: choose 'decoupled' or 'deepspeed'")
    if mode == "deepspeed" and prenormalize:
        raise ValueError(
            "prenormalize has no place in mode 'deepspeed', whose formula has none: drop one of them"
        )
