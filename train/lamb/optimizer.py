"""LAMB with exact per-tensor trust ratios, under DeepSpeed's ZeRO stages 1 and 2 as well as without it.

    optimizer = Lamb(model.named_parameters(), lr=1.5e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    optimizer.bind(engine)

The DeepSpeed config needs `"zero_allow_untested_optimizer": true` (DeepSpeed keeps a list of the classes it
knows) and `"round_robin_gradients": false` (its default); its `gradient_clipping` is 1.0 unless set;
`"data_types": {"grad_accum_dtype": "fp32"}` is advised where bf16 or fp16 gradients are accumulated. Learning
rates are set in `param_groups[0]["lr"]`, through the engine's wrapper or here. State lives in flat `exp_avg`,
`exp_avg_sq` and an integer `step`, which the engine's checkpoints, its universal checkpoints and zero_to_fp32
carry.

Without DeepSpeed, and at stage 0 in fp32, `bind` is not needed. Stage 0 in fp16 or bf16 is refused: DeepSpeed
takes a step there, with zero gradients, while it builds its engine, and weight decay would move the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.graph import increment_version

from .arguments import check_arguments, check_mode
from .binding import Binding, bind_engine
from .eager import EagerPasses
from .formula import Part, Passes, step_coefficients, trust_ratios
from .geometry import Piece, optimized_parameters, tensor_rules
from .parts import check_updatable, one_kind, ready_state
from .passes import all_ranks_have, choose_passes
from .refusals import SharedRefusals, raise_together

Entry = tuple[str, torch.Tensor, tuple[Piece, ...]]

# Attributes beside torch's own that a copied or pickled Lamb keeps.
_OWN = ("_rules", "_parameters", "_clamp", "_prenormalize", "_bias_correction", "_mode", "_fused")
_OWN_PUBLIC = ("tensor_names", "adapted", "trust_ratios")
_OF_THIS_PROCESS = ("_passes", "_kind", "_binding", "_refusals")


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
        fused: a kernel where there is one (Triton on CUDA; C loops on a CPU, built on first use when there is
            a compiler), plain torch operations elsewhere. True insists, False declines.
            Ranks that are not bound choose each for itself: say False where some lack a compiler and replicas
            must not differ by rounding.
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
        self._passes: Passes | None = None
        self._kind: tuple[torch.device, torch.dtype] | None = None
        self._binding: Binding | None = None
        self._refusals: SharedRefusals | None = None
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
        binding = bind_engine(engine, self, self._parameters)
        if self._prenormalize and engine.gradient_clipping() > 0:
            raise ValueError(
                f"prenormalize divides the gradient by its norm, so gradient_clipping "
                f"{engine.gradient_clipping()} would have no effect: set gradient_clipping to 0"
            )
        parameters = self.param_groups[0]["params"]
        device, dtype = one_kind(parameters)

        def agree(have: bool) -> bool:
            return all_ranks_have(have, device, binding.replicas)

        # Replicas that round differently would drift apart; a rank that fails alone would leave the rest waiting.
        self._passes, self._kind = choose_passes(self._fused, device, dtype, agree), (device, dtype)
        self._binding = binding
        self._refusals = None if binding.group is None else SharedRefusals(binding.group, device)
        refusal = None
        try:
            for parameter in parameters:
                ready_state("this engine's parameter", parameter, self.state[parameter])
        except ValueError as error:  # of a state loaded before, perhaps on this rank alone
            refusal = error
        raise_together(refusal, binding.replicas)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update. Collective over the data-parallel group when bound to a partitioned engine.

        Raises:
            ValueError: the parameters were replaced (by a DeepSpeed engine, say) and `bind` was not called; a
                state or a gradient does not fit. What one rank of a group refuses is raised on all of them, on
                a GPU by the next step or state_dict (see refusals.py): no parameter and no step count
                has changed by then, but the moments of the ranks that did not refuse have.
        """
        if self._refusals is not None:
            self._refusals.check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        entries = self._entries()
        if not entries:
            return loss
        parts: list[Part] = []
        refusal: Exception | None = None
        try:
            parts = self._checked_parts(entries)
        except Exception as error:
            if self._refusals is None:
                raise
            refusal = error  # the other ranks are on their way to the all-reduce
        assert self._passes is not None
        assert self._kind is not None
        device, dtype = self._kind
        grad_norm = self._grad_norm(parts, device).to(dtype) if self._prenormalize else None
        if self.adapted.device != device:
            self.adapted = self.adapted.to(device)
        if self._cut_over is None:
            self.trust_ratios = self._passes.both(parts, self._rules, self.adapted, self._clamp, grad_norm)
        else:
            self._both_over_ranks(parts, grad_norm, refusal, device)
            if refusal is not None:
                return loss
        for _, parameter, _ in entries:
            self.state[parameter]["step"] = int(self.state[parameter]["step"]) + 1
        # The fused kernels write behind autograd's back.
        increment_version([tensor for part in parts for tensor in (part.p, part.m, part.v)])
        for (_, parameter, _), part in zip(entries, parts, strict=True):
            if not parameter.is_contiguous():
                parameter.copy_(part.p)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As torch's; raises first what a rank refused in the last step."""
        if self._refusals is not None:
            self._refusals.check()
        return super().state_dict()

    @property
    def kernel(self) -> str:
        """Which passes run: "native", "triton" or "eager"; "" before `bind` or the first step."""
        return self._passes.name if self._passes else ""

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
        return None if self._binding is None else self._binding.group

    def _entries(self) -> list[Entry]:
        """What this rank updates: name, parameter with a gradient, and the tensors that lie in it."""
        parameters = self.param_groups[0]["params"]
        if self._binding is None:
            self._require_own(parameters)
            tensors: Iterable[int] = range(len(parameters))
        elif self._binding.pieces is not None:
            return [("this rank's partition", parameters[0], self._binding.pieces)]
        else:
            tensors = self._binding.tensors
        return [
            (self.tensor_names[tensor], parameter, (Piece(tensor, 0, parameter.numel()),))
            for tensor, parameter in zip(tensors, parameters, strict=True)
            if parameter.grad is not None
        ]

    def _require_own(self, parameters: list[torch.Tensor]) -> None:
        if len(parameters) == len(self._parameters):
            pairs = list(zip(parameters, self._parameters, strict=True))
            if all(a is b for a, b in pairs):
                return
            if len(pairs) > 1 and all(a.shape == b.shape for a, b in pairs):
                raise ValueError(
                    "Lamb was asked to step on copies of its parameters: DeepSpeed's stage 0 does so in fp16 and "
                    "bf16 while it builds its engine; set zero_optimization.stage to 1 or 2"
                )
        raise ValueError(
            "Lamb's parameters were replaced, most likely by a DeepSpeed engine's flat partition, and it "
            "cannot know where each tensor lies: call optimizer.bind(engine) after deepspeed.initialize"
        )

    def _checked_parts(self, entries: Sequence[Entry]) -> list[Part]:
        """The entries with gradient, moments and this step's scalars, all of them checked."""
        for name, parameter, _ in entries:
            check_updatable(name, parameter)
        self._settle_passes([parameter for _, parameter, _ in entries])
        group = self.param_groups[0]
        coefficients = functools.cache(
            functools.partial(
                step_coefficients,
                lr=float(group["lr"]),
                betas=tuple(group["betas"]),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                bias_correction=self._bias_correction,
                mode=self._mode,
            )
        )
        parts = []
        for name, parameter, pieces in entries:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            ready_state(name, parameter, state)
            c = coefficients(step=int(state["step"]) + 1)  # another optimizer's checkpoint may hold a tensor
            # Copies, where a tensor is not contiguous; the parameter's is written back after the step.
            p, g = parameter.contiguous(), gradient.resolve_neg().contiguous()
            parts.append(Part(p, g, state["exp_avg"], state["exp_avg_sq"], pieces, c))
        return parts

    def _settle_passes(self, parameters: Sequence[torch.Tensor]) -> None:
        kind = one_kind(parameters)
        if self._passes is None or kind != self._kind:
            if self._binding is not None:
                raise ValueError(
                    "the parameters have another device or dtype than when bind was called, "
                    f"{kind[1]} on {kind[0]}: call bind(engine) again, on every rank"
                )
            self._passes, self._kind = choose_passes(self._fused, *kind), kind

    def _both_over_ranks(
        self,
        parts: Sequence[Part],
        grad_norm: torch.Tensor | None,
        refusal: Exception | None,
        device: torch.device,
    ) -> None:
        """Both passes, with the sums of squares added over the ranks between them; `refusal` is shared there."""
        assert self._passes is not None
        assert self._refusals is not None
        # A row per tensor, and one that counts the ranks which refuse.
        sums = torch.zeros(len(self._rules) + 1, 2, dtype=torch.float64, device=device)
        if refusal is None:
            self._passes.first(parts, self._rules, sums[:-1], grad_norm)
        else:
            sums[-1, 0] = 1
        self._add_over_ranks(sums)
        self.trust_ratios = trust_ratios(sums[:-1], self.adapted, self._clamp)
        self._refusals.settle(sums[-1, 0], refusal)
        self.trust_ratios = torch.where(sums[-1, 0] > 0, 0.0, self.trust_ratios)
        if refusal is None:
            self._passes.second(parts, self._rules, self.trust_ratios)

    def _grad_norm(self, parts: list[Part], device: torch.device) -> torch.Tensor:
        total = EagerPasses().sum_squares(parts, self._rules, device)
        self._add_over_ranks(total)
        norm = total.sqrt()
        return torch.where(norm > 0, norm, 1.0)

    def _add_over_ranks(self, sums: torch.Tensor) -> None:
        if self._cut_over is not None:
            dist.all_reduce(sums, group=self._cut_over)
