"""LAMB with exact per-tensor trust ratios, under DeepSpeed's ZeRO stages 1 and 2 as well as without it; see README.md.

State lives in flat `exp_avg`, `exp_avg_sq` and an integer `step`, which the engine's checkpoints, its universal
checkpoints and zero_to_fp32 carry.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.graph import increment_version

from . import native
from .parameters import (
    check_arguments,
    check_mode,
    check_not_replaced,
    check_updatable,
    one_kind,
    optimized_parameters,
    ready_state,
    tensor_rules,
)
from .rank_errors import RankErrors, raise_on_all_ranks, true_on_all_ranks
from .update import Buffers, EagerKernel, Kernel, coefficients, trust_ratios
from .zero_layout import Fragment, ZeroLayout, read_layout

Entry = tuple[str, torch.Tensor, tuple[Fragment, ...]]
Kind = tuple[torch.device, torch.dtype]

# Attributes beside torch's own that a copied or pickled Lamb keeps.
_OWN = ("_rules", "_parameters", "_clamp", "_prenormalize", "_bias_correction", "_mode", "_fused")
_OWN_PUBLIC = ("tensor_names", "adapted", "trust_ratios")
_OF_THIS_PROCESS = ("_kernel", "_kind", "_layout", "_rank_errors")


class Lamb(torch.optim.Optimizer):
    """Layer-wise adaptive moments (You et al. 2020, arXiv:1904.00962), exact on flat ZeRO partitions.

    Biases and normalisation parameters, recognised by name or by having one dimension, take no decay and no
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
        fused: a kernel where there is one (Triton on CUDA, if it can launch; C loops on a CPU, built on first use
            when there is a compiler), plain torch operations elsewhere. True insists, False declines.
            Ranks that are not bound choose each for itself: give False where some lack a compiler and
            replicas must not differ by rounding.
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
        fused: bool | None = None,
    ) -> None:
        check_arguments(lr, betas, eps, weight_decay, clamp)
        check_mode(mode, prenormalize=prenormalize, adapt_all=adapt_all)
        named = optimized_parameters(named_parameters)
        like_deepspeed = mode == "deepspeed"
        self._rules = tensor_rules(named, adapt_all=adapt_all or like_deepspeed, decay_all=like_deepspeed)
        self._parameters = [parameter for _, parameter in named]
        self._clamp = (0.01, 10.0) if like_deepspeed and clamp is None else clamp
        self._prenormalize, self._bias_correction, self._mode = prenormalize, bias_correction, mode
        self._fused = fused
        self._kernel: Kernel | None = None
        self._kind: Kind | None = None
        self._layout: ZeroLayout | None = None
        self._rank_errors: RankErrors | None = None
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

        Makes the state at once, so that a checkpoint saved or loaded before the first step is whole. Collective:
        all ranks agree on a kernel that each of them has.

        Raises:
            ValueError: the engine is set up in a way that no LAMB is exact under (the message names it), or
                fused=True and a rank has no kernel.
        """
        layout = read_layout(engine, self, self._parameters)
        if self._prenormalize and engine.gradient_clipping() > 0:
            raise ValueError(
                f"prenormalize divides the gradient by its norm, so gradient_clipping "
                f"{engine.gradient_clipping()} would have no effect: set gradient_clipping to 0"
            )
        parameters = self.param_groups[0]["params"]
        kind = device, _ = one_kind(parameters)
        # Replicas that round differently would drift apart; a rank that fails alone would leave the rest waiting.
        self._kernel = choose_kernel(
            self._fused, kind, lambda here: true_on_all_ranks(here, device, layout.replicas)
        )
        self._kind, self._layout = kind, layout
        self._rank_errors = None if layout.group is None else RankErrors(layout.group, device)
        error = None
        try:
            for parameter in parameters:
                ready_state("this engine's parameter", parameter, self.state[parameter])
        except ValueError as caught:  # of a state loaded before, perhaps on this rank alone
            error = caught
        raise_on_all_ranks(error, layout.replicas)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update. Collective over the data-parallel group when bound to a partitioned engine.

        Raises:
            ValueError: the parameters were replaced (by a DeepSpeed engine, say) and `bind` was not called; a
                state or a gradient does not fit. An error on one rank of a group is raised on all of them, on
                a GPU by the next step or state_dict (see rank_errors.py): no parameter and no step count
                has changed by then, but the moments of the other ranks have.
        """
        if self._rank_errors is not None:
            self._rank_errors.raise_deferred()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        entries = self._entries()
        if entries:
            self._step(entries)
        return loss

    def _step(self, entries: Sequence[Entry]) -> None:
        buffers: list[Buffers] = []
        error: Exception | None = None
        try:
            buffers = self._checked_buffers(entries)
        except Exception as caught:
            if self._rank_errors is None:
                raise
            error = caught  # the other ranks are on their way to the all-reduce
        self._update(buffers, error)
        if error is not None:
            return
        for _, parameter, _ in entries:
            self.state[parameter]["step"] = int(self.state[parameter]["step"]) + 1
        # The fused kernels write behind autograd's back.
        increment_version([tensor for one in buffers for tensor in (one.p, one.m, one.v)])
        for (_, parameter, _), one in zip(entries, buffers, strict=True):
            if not parameter.is_contiguous():
                parameter.copy_(one.p)

    def _update(self, buffers: Sequence[Buffers], error: Exception | None) -> None:
        """The update: both passes, and between them the sums of squares and this rank's `error` go over all ranks."""
        assert self._kernel is not None
        assert self._kind is not None
        device, dtype = self._kind
        self.adapted = self.adapted.to(device)
        grad_norm = self._grad_norm(buffers, device).to(dtype) if self._prenormalize else None
        if self._cut_over is None:
            self.trust_ratios = self._kernel.both_passes(
                buffers, self._rules, self.adapted, self._clamp, grad_norm
            )
            return
        assert self._rank_errors is not None
        # A row per tensor, and one that counts the ranks with an error.
        sums = torch.zeros(len(self._rules) + 1, 2, dtype=torch.float64, device=device)
        if error is None:
            self._kernel.first_pass(buffers, self._rules, sums[:-1], grad_norm)
        else:
            sums[-1, 0] = 1
        self._add_over_ranks(sums)
        self.trust_ratios = trust_ratios(sums[:-1], self.adapted, self._clamp)
        self._rank_errors.share(sums[-1, 0], error)
        self.trust_ratios = torch.where(sums[-1, 0] > 0, 0.0, self.trust_ratios)
        if error is None:
            self._kernel.second_pass(buffers, self._rules, self.trust_ratios)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; raises first the errors of the last step on any rank."""
        if self._rank_errors is not None:
            self._rank_errors.raise_deferred()
        return super().state_dict()

    @property
    def kernel(self) -> str:
        """Which kernel runs: "native", "triton" or "eager"; "" before `bind` or the first step."""
        return self._kernel.name if self._kernel else ""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: one group is what keeps a step at one collective."""
        if self.param_groups:
            raise ValueError("Lamb has one parameter group: give it all named parameters when you build it")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        # What torch keeps and ours, but not kernel, engine and process group.
        own = {name: getattr(self, name) for name in (*_OWN, *_OWN_PUBLIC)}
        return {**super().__getstate__(), **own, **dict.fromkeys(_OF_THIS_PROCESS)}

    @property
    def _cut_over(self) -> Any:
        """The process group among whose ranks tensors are cut; None where each rank holds all of its tensors."""
        return None if self._layout is None else self._layout.group

    def _entries(self) -> list[Entry]:
        """What this rank updates: name, parameter with a gradient, and the tensors that lie in it."""
        parameters = self.param_groups[0]["params"]
        if self._layout is None:
            check_not_replaced(parameters, self._parameters)
            tensors: Iterable[int] = range(len(parameters))
        elif self._layout.fragments is not None:
            return [("this rank's partition", parameters[0], self._layout.fragments)]
        else:
            tensors = self._layout.tensors
        return [
            (self.tensor_names[tensor], parameter, (Fragment(tensor, 0, parameter.numel()),))
            for tensor, parameter in zip(tensors, parameters, strict=True)
            if parameter.grad is not None
        ]

    def _checked_buffers(self, entries: Sequence[Entry]) -> list[Buffers]:
        """The entries with gradient, moments and this step's scalars, all of them checked."""
        for name, parameter, _ in entries:
            check_updatable(name, parameter)
        self._settle_kernel(one_kind([parameter for _, parameter, _ in entries]))
        group = self.param_groups[0]
        at_step = functools.cache(
            functools.partial(
                coefficients,
                lr=float(group["lr"]),
                betas=tuple(group["betas"]),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                bias_correction=self._bias_correction,
                mode=self._mode,
            )
        )
        buffers = []
        for name, parameter, fragments in entries:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            ready_state(name, parameter, state)
            c = at_step(step=int(state["step"]) + 1)  # another optimizer's checkpoint may hold a tensor
            # Copies, where a tensor is not contiguous; the parameter's is written back after the step.
            p, g = parameter.contiguous(), gradient.resolve_neg().contiguous()
            buffers.append(Buffers(p, g, state["exp_avg"], state["exp_avg_sq"], fragments, c))
        return buffers

    def _settle_kernel(self, kind: Kind) -> None:
        if self._kernel is None or kind != self._kind:
            if self._layout is not None:
                raise ValueError(
                    "the parameters have another device or dtype than when bind was called, "
                    f"{kind[1]} on {kind[0]}: call bind(engine) again, on every rank"
                )
            self._kernel, self._kind = choose_kernel(self._fused, kind), kind

    def _grad_norm(self, buffers: Sequence[Buffers], device: torch.device) -> torch.Tensor:
        total = EagerKernel().sum_squares(buffers, device)
        self._add_over_ranks(total)
        norm = total.sqrt()
        return torch.where(norm > 0, norm, 1.0)

    def _add_over_ranks(self, sums: torch.Tensor) -> None:
        if self._cut_over is not None:
            dist.all_reduce(sums, group=self._cut_over)


def choose_kernel(fused: bool | None, kind: Kind, on_all_ranks: Callable[[bool], bool] = bool) -> Kernel:
    """The fastest kernel for tensors of a device and dtype.

    Args:
        fused: False for plain torch operations; True to insist on a fused kernel; None for one where it can be had.
        on_all_ranks: whether all ranks have a fused kernel, from whether this rank has; collective.
    Raises:
        ValueError: fused is True, and there is none here, or none on another rank: then on every rank.
    """
    device, dtype = kind
    kernel = None if fused is False else _fused_kernel(device, dtype)
    everywhere = on_all_ranks(kernel is not None)
    if kernel is not None and everywhere:
        return kernel
    if fused:
        where = "here" if kernel is None else "on another rank"
        raise ValueError(
            f"fused=True, but there is no fused LAMB for {dtype} on {device.type} {where}: it takes fp32 and a C "
            "compiler, on CUDA Triton and Python's headers too; leave fused at None for plain torch operations"
        )
    return EagerKernel()


def _fused_kernel(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    if dtype != torch.float32:
        return None
    if device.type == "cpu" and (library := native.build()) is not None:
        return native.NativeKernel(library)
    if device.type == "cuda":
        try:
            from .triton_kernels import started_kernel  # optional: not every torch brings Triton

            return started_kernel(device)
        except Exception as error:  # of Triton, a compiler, the linker, the driver, a full or read-only disk
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            warnings.warn(
                f"LAMB runs in plain torch operations on this GPU, more slowly: Triton cannot start its kernels "
                f"({reason}); it needs a C compiler and Python's headers (apt install gcc python3-dev)",
                stacklevel=2,
            )
    return None
