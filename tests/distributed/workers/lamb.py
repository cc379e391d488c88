"""What each gloo rank runs for test_lamb_zero.py: many small engines in one launch."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from launch.benchmarks.lamb_alternatives import LoopLamb
from tests.distributed.workers.lamb_checkpoints import adamw, save_and_resume
from tests.distributed.workers.lamb_engines import (
    BITS,
    LR,
    STEPS,
    Bag,
    clipped,
    config,
    deepspeed,
    full_parameters,
    inject,
    make_engine,
    tiny_parameters,
    train,
)
from tests.distributed.workers.lamb_half_precision import accumulated_norms, first_masters, overflow
from tests.lamb_checks import BoundedReference, make_gradients, make_parameters, worst_error
from train.lamb import Lamb
from train.lamb import native as lamb_native


def run_parity(
    dtype: str,
    settings: dict[str, Any],
    tiny: bool = False,
    lamb: Any = Lamb,
    fused: bool | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Some steps beside the reference: the worst error, and what must agree between world sizes."""
    parameters = tiny_parameters() if tiny else make_parameters()
    kernel = {"fused": fused} if lamb is Lamb else {}
    of_lamb_alone = {} if lamb is Lamb else {"adapt_all"}  # what an ordinary LAMB does anyway
    arguments = {name: value for name, value in options.items() if name not in of_lamb_alone}
    engine, optimizer = make_engine(parameters, settings, lamb, **arguments, **kernel)
    old = full_parameters(engine)
    reference = BoundedReference(old, LR, **options)
    ratios, worst = [], 0.0
    for step in range(STEPS):
        gradients = make_gradients(step, BITS[dtype])
        if tiny:
            gradients = {"w.weight": gradients["embed.weight"][:1, :3]}
        inject(engine, gradients)
        bounds, _ = reference.step_from(old, clipped(gradients, engine))
        old = full_parameters(engine)
        worst = max(worst, worst_error(old, reference, bounds))
        ratios.append(getattr(optimizer, "trust_ratios", torch.ones(1)).tolist())
    fragments = optimizer._layout.fragments if lamb is Lamb else ()
    result = {
        "worst_error": worst,
        "ratios": ratios,
        "parameters": old,
        "held": [p.tensor for p in fragments or ()],
    }
    engine.destroy()
    return result


def parity() -> dict[str, dict[str, Any]]:
    results = {}
    for dtype in ("fp32", "bf16"):
        results[f"{dtype} plain"] = run_parity(dtype, config(dtype))
        results[f"{dtype} clipping"] = run_parity(dtype, config(dtype, gradient_clipping=0.01))
        results[f"{dtype} accumulation"] = run_parity(dtype, config(dtype, accumulation=2))
        results[f"{dtype} alignment"] = run_parity(dtype, config(dtype, zero={"parameter_alignment": True}))
        results[f"{dtype} tiny"] = run_parity(dtype, config(dtype), tiny=True)
        results[f"{dtype} eager"] = run_parity(dtype, config(dtype), fused=False)
    results["fp32 stage 1"] = run_parity("fp32", config("fp32", zero={"stage": 1}))
    results["fp32 small buckets"] = run_parity(
        "fp32", config("fp32", zero={"reduce_bucket_size": 500, "allgather_bucket_size": 500})
    )
    results["fp32 prenormalize"] = run_parity("fp32", config("fp32"), prenormalize=True)
    results["fp32 deepspeed"] = run_parity("fp32", config("fp32"), mode="deepspeed")
    results["fp32 adapt_all clamp"] = run_parity("fp32", config("fp32"), adapt_all=True, clamp=(0.05, 0.1))
    # The same LAMB, which adapts all and decays nothing, with whole tensors and with flat partitions.
    ordinary: dict[str, Any] = {"lamb": LoopLamb, "adapt_all": True, "weight_decay": 0.0}
    results["whole control"] = run_parity("fp32", config("fp32", zero={"stage": 0}), **ordinary)
    results["control"] = run_parity("fp32", config("fp32"), **ordinary)
    return results


def refusals() -> dict[str, str]:
    """The message for each setting that is refused; "" where it is not."""
    messages = {}

    def attempt(name: str, settings: dict[str, Any], **options: Any) -> None:
        try:
            make_engine(make_parameters(), settings, **options)
            messages[name] = ""
        except ValueError as error:
            messages[name] = str(error)

    attempt("round_robin", config("fp32", zero={"round_robin_gradients": True}))
    attempt("stage 3", config("fp32", zero={"stage": 3}))
    offload = {"offload_optimizer": {"device": "cpu"}}
    attempt("offload", config("fp32", zero=offload, zero_force_ds_cpu_optimizer=False))
    attempt("elastic", config("fp32", zero={"elastic_checkpoint": True}))
    attempt("prenormalize", config("fp32", gradient_clipping=1.0), prenormalize=True)
    bf16_stage_1 = config("bf16", zero={"stage": 1})
    attempt("bf16 stage 1", bf16_stage_1)

    bf16_stage_0 = config("bf16", zero={"stage": 0})
    del bf16_stage_0["data_types"]
    attempt("bf16 stage 0", bf16_stage_0)

    model = Bag(make_parameters())
    optimizer = Lamb(model.named_parameters(), lr=LR)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config("fp32"))
    try:
        inject(engine, make_gradients(0, BITS["fp32"]))
        messages["unbound"] = ""
    except ValueError as error:
        messages["unbound"] = str(error)
    stranger = Lamb(make_parameters().items(), lr=LR)
    try:
        stranger.bind(engine)
    except ValueError as error:
        messages["stranger"] = str(error)
    return messages


def stage_zero() -> dict[str, float]:
    """Without partitions, unbound and bound: the worst error."""
    worst: dict[str, float] = {}
    for name, bind in (("unbound", False), ("bound", True)):
        model = Bag(make_parameters())
        optimizer = Lamb(model.named_parameters(), lr=LR)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config("fp32", zero={"stage": 0})
        )
        if bind:
            optimizer.bind(engine)
        weights = dict(model.named_parameters())
        worst[name] = 0.0
        reference = BoundedReference(weights, LR)
        for step in range(2):
            gradients = make_gradients(step, BITS["bf16"])
            bounds, _ = reference.step_from(weights, gradients)
            inject(engine, gradients)
            worst[name] = max(worst[name], worst_error(weights, reference, bounds))
    return worst


def without_a_compiler() -> dict[str, Any]:
    """Rank 0 has no C compiler: the message for fused=True, and which kernels run, on every rank."""
    if dist.get_rank() == 0:
        os.environ["CC"] = "/nonexistent/cc"
    lamb_native.build.cache_clear()
    found: dict[str, Any] = {}
    for name, stage in (("partitioned", 2), ("replicas", 0)):
        try:
            make_engine(make_parameters(), config("fp32", zero={"stage": stage}), fused=True)
            found[f"{name} insisting"] = ""
        except ValueError as error:
            found[f"{name} insisting"] = str(error)
        engine, optimizer = make_engine(make_parameters(), config("fp32", zero={"stage": stage}))
        found[f"{name} early"] = optimizer.kernel
        train(engine, range(3))
        found[f"{name} kernel"], found[name] = optimizer.kernel, full_parameters(engine)
    os.environ.pop("CC", None)
    lamb_native.build.cache_clear()
    return found


def collectives() -> dict[str, list[int]]:
    """How many collectives each of two optimizer steps makes, the engine's own not counted."""
    counts: dict[str, list[int]] = {}
    names = (
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "broadcast",
        "reduce_scatter_tensor",
        "barrier",
    )
    originals = {name: getattr(dist, name) for name in names}
    calls: list[str] = []

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    for case, stage, options in (
        ("plain", 2, {}),
        ("prenormalize", 2, {"prenormalize": True}),
        ("whole", 0, {}),
    ):
        engine, optimizer = make_engine(make_parameters(), config("fp32", zero={"stage": stage}), **options)
        step, counts[case] = optimizer.step, []

        def counting_step(step: Any = step, case: str = case) -> None:
            calls.clear()
            for name in names:
                setattr(dist, name, counted(name))
            try:
                step()
            finally:
                for name in names:
                    setattr(dist, name, originals[name])
            counts[case].append(len(calls))

        optimizer.step = counting_step
        train(engine, range(2))
    return counts


def error_on_one_rank() -> dict[str, dict[str, Any]]:
    """Rank 1 alone cannot step: what every rank raises, and what is left of its parameters and step count."""
    found: dict[str, dict[str, Any]] = {}

    def spoil(state: dict[str, Any], group: dict[str, Any], how: str) -> None:
        if how == "lr":
            group["lr"] = None
        elif how == "lost":
            del state["exp_avg_sq"]
        else:
            state["exp_avg"] = state["exp_avg"][:1]

    def attempt(action: Any) -> str:
        try:
            action()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    for case, how, options in (
        ("shape", "shape", {}),
        ("prenormalize", "lost", {"prenormalize": True}),
        ("no ValueError", "lr", {}),
        ("bind", "shape", {}),
        ("later", "shape", {}),
        ("checkpoint", "shape", {}),
    ):
        engine, optimizer = make_engine(make_parameters(), config("fp32"), **options)
        train(engine, range(1))
        (flat,) = optimizer.param_groups[0]["params"]
        before = full_parameters(engine)
        if dist.get_rank() == 1:
            spoil(optimizer.state[flat], optimizer.param_groups[0], how)
        optimizer._rank_errors._deferred = case in ("later", "checkpoint")  # as on a GPU
        first = attempt(
            lambda e=engine, o=optimizer, c=case: o.bind(e) if c == "bind" else train(e, range(1, 2))
        )
        after = full_parameters(engine)
        found[case] = {
            "first": first,
            "same": all(torch.equal(before[name], after[name]) for name in before),
            "next": attempt(
                optimizer.state_dict if case == "checkpoint" else lambda e=engine: train(e, range(1))
            ),
            "step": optimizer.state[flat]["step"],
        }
    return found


def everything_else(folder: str) -> dict[str, Any]:
    return {
        "resume": save_and_resume(folder),
        "adamw": adamw(folder),
        "overflow": overflow(),
        "accumulated_norms": accumulated_norms(),
        "first_masters": first_masters(),
        "stage_zero": stage_zero(),
        "refusals": refusals(),
        "without_a_compiler": without_a_compiler(),
        "collectives": collectives(),
        "error_on_one_rank": error_on_one_rank(),
    }
