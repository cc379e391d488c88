"""What each gloo rank runs for test_lamb_zero.py: many small engines in one launch."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param

from launch.benchmarks.lamb_alternatives import LoopLamb
from tests.lamb_checks import BoundedReference, U, make_gradients, make_parameters, worst_error
from train.build import start_engine
from train.config import Config
from train.config_sections.training import OptimizerConfig
from train.distributed.world import import_deepspeed
from train.lamb import Lamb
from train.lamb import native as lamb_native
from train.optimizer import after_loading, bind_optimizer, build_optimizer, own_settings

deepspeed = import_deepspeed()

LR = 0.01
STEPS = 4
# Significant bits of the injected gradients: few enough that means over three ranks, and bf16, are exact.
BITS = {"fp32": 18, "bf16": 5}


class Bag(torch.nn.Module):
    """Parameters under the names of lamb_checks.SHAPES; the loss below gives them the wanted gradients."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            owner, _, leaf = name.rpartition(".")
            if not hasattr(self, owner):
                setattr(self, owner, torch.nn.Module())
            getattr(self, owner).register_parameter(leaf, parameter)

    def forward(self, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum((p.float() * gradients[name]).sum() for name, p in self.named_parameters())  # type: ignore


def tiny_parameters() -> dict[str, torch.nn.Parameter]:
    """Three elements: from three ranks on, the last ones hold nothing but padding."""
    return {"w.weight": torch.nn.Parameter(torch.tensor([[1.0, -2.0, 0.5]]))}


def config(
    dtype: str, accumulation: int = 1, zero: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    base: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": 2, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed's own default is 1.0
    }
    if dtype == "bf16":
        base["bf16"] = {"enabled": True}
        base["data_types"] = {"grad_accum_dtype": "fp32"}
    return {**base, **more}


def make_engine(
    parameters: dict[str, torch.nn.Parameter], settings: dict[str, Any], lamb: Any = Lamb, **options: Any
) -> tuple[Any, Any]:
    model = Bag(parameters)
    named = model.named_parameters() if lamb is Lamb else model.parameters()
    optimizer = lamb(named, lr=LR, **options)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if lamb is Lamb:
        optimizer.bind(engine)
    return engine, optimizer


def inject(engine: Any, gradients: dict[str, torch.Tensor], scale: float = 1.0) -> None:
    """Give the engine mean gradients of exactly `gradients` over all ranks and accumulation steps.

    Element i comes from rank i mod W alone, in one micro step alone, times W and the number of micro steps.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    accumulation = engine.gradient_accumulation_steps()
    for micro_step in range(accumulation):
        mine = {}
        for name, gradient in gradients.items():
            index = torch.arange(gradient.numel()).view(gradient.shape)
            chosen = (index % world_size == rank) & (index // world_size % accumulation == micro_step)
            mine[name] = gradient * chosen * (world_size * accumulation * scale)
        engine.backward(engine(mine))
        engine.step()


def full_parameters(engine: Any) -> dict[str, torch.Tensor]:
    named = engine.module.named_parameters()
    if engine.zero_optimization_stage() == 0:
        return {name: p.detach().clone() for name, p in named}
    return {name: safe_get_full_fp32_param(p).clone() for name, p in named}


def clipped(gradients: dict[str, torch.Tensor], engine: Any) -> dict[str, torch.Tensor]:
    """As DeepSpeed clips (stage_1_and_2.py, unscale_and_clip_grads), from the norm that it reports."""
    limit = engine.gradient_clipping()
    if not limit:
        return gradients
    norm = torch.as_tensor(engine.get_global_grad_norm())
    true_norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
    elements = sum(g.numel() for g in gradients.values())
    assert abs(float(norm) / true_norm - 1) <= elements * U  # an fp32 sum of their squares, in any order
    clip = torch.clamp((norm + 1e-6) / limit, min=1.0)
    assert clip > 1, "the scenario must clip"
    return {name: g * (1.0 / clip) for name, g in gradients.items()}


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


def train(engine: Any, steps: range) -> None:
    for step in steps:
        inject(engine, make_gradients(step, BITS["fp32"]))


def save_and_resume(folder: str) -> dict[str, Any]:
    """Six steps, a checkpoint after three; resumed at this world size; converted for the others."""
    engine, _ = make_engine(make_parameters(), config("fp32"))
    train(engine, range(3))
    engine.save_checkpoint(folder, tag="three")
    at_three = full_parameters(engine)
    train(engine, range(3, 6))
    straight = full_parameters(engine)

    engine, optimizer = make_engine(make_parameters(), config("fp32"))
    optimizer.param_groups[0]["lr"] = 123.0
    engine.load_checkpoint(folder, tag="three")
    train(engine, range(3, 6))
    resumed = full_parameters(engine)

    engine, optimizer = make_engine(make_parameters(), config("fp32"))
    engine.save_checkpoint(folder, tag="zero")  # before the first step: the state must be there already
    dist.barrier()
    if dist.get_rank() == 0:
        with contextlib.redirect_stdout(io.StringIO()):
            convert_to_universal(folder, "three")
    dist.barrier()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    consolidated = dict(get_fp32_state_dict_from_zero_checkpoint(folder, tag="three"))
    return {"at_three": at_three, "straight": straight, "resumed": resumed, "consolidated": consolidated}


def convert_to_universal(folder: str, tag: str) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    main(
        argparse.Namespace(
            input_folder=str(Path(folder, tag)),
            output_folder=str(Path(folder, f"{tag}_universal")),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def adamw_engine(settings: dict[str, Any]) -> tuple[Any, torch.optim.Optimizer]:
    model = Bag(make_parameters())
    optimizer = build_optimizer(
        OptimizerConfig(name="adamw", lr=LR, weight_decay=0.1), model.named_parameters()
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    bind_optimizer(optimizer, engine)
    return engine, optimizer


def plain_adamw(
    start: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    """One process, whole tensors, torch's loop over them; what is decayed is written out by hand."""
    whole = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    decayed = {"embed.weight", "zero.weight", "layer.weight", "tiny.weight", "out.weight"}
    groups = [
        {"params": [whole[name] for name in whole if name in decayed], "weight_decay": 0.1},
        {"params": [whole[name] for name in whole if name not in decayed], "weight_decay": 0.0},
    ]
    return whole, torch.optim.AdamW(groups, lr=LR, eps=1e-6, fused=False, foreach=False)


def adamw(folder: str) -> dict[str, Any]:
    """Six steps beside torch's AdamW, under several engines; a checkpoint after three, resumed, and converted."""
    worst = {}
    for name, settings in (
        ("plain", config("fp32")),
        ("clipping", config("fp32", gradient_clipping=0.01)),
        ("bf16", config("bf16")),
        ("stage 1", config("fp32", zero={"stage": 1})),
    ):
        engine, _ = adamw_engine(settings)
        whole, plain = plain_adamw(full_parameters(engine))
        for step in range(6):
            gradients = make_gradients(step, BITS["bf16" if name == "bf16" else "fp32"])
            inject(engine, gradients)
            for key, gradient in clipped(gradients, engine).items():
                whole[key].grad = gradient
            plain.step()
            if (step, name) == (2, "plain"):
                engine.save_checkpoint(folder, tag="adamw")
        found = full_parameters(engine)
        worst[name] = max(float((found[key] - whole[key]).abs().max()) for key in whole)
        if name == "plain":
            straight = found
    engine, _ = adamw_engine(config("fp32"))
    engine.load_checkpoint(folder, tag="adamw")
    train(engine, range(3, 6))
    resumed = full_parameters(engine)
    dist.barrier()
    if dist.get_rank() == 0:
        with contextlib.redirect_stdout(io.StringIO()):
            convert_to_universal(folder, "adamw")
    dist.barrier()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    consolidated = dict(get_fp32_state_dict_from_zero_checkpoint(folder, tag="adamw"))
    return {
        "worst": worst,
        "straight": straight,
        "resumed": resumed,
        "shapes": {k: v.shape for k, v in consolidated.items()},
    }


def adamw_universal(folder: str) -> dict[str, torch.Tensor]:
    engine, optimizer = adamw_engine(config("fp32", checkpoint={"load_universal": True}))
    own = own_settings(optimizer)
    engine.load_checkpoint(folder, tag="adamw_universal")
    after_loading(optimizer, own)
    train(engine, range(3, 6))
    return full_parameters(engine)


def resume_universal(folder: str) -> dict[str, dict[str, torch.Tensor]]:
    return {"lamb": lamb_universal(folder), "adamw": adamw_universal(folder)}


def lamb_universal(folder: str) -> dict[str, torch.Tensor]:
    settings = config("fp32", checkpoint={"load_universal": True})
    engine, optimizer = make_engine(make_parameters(), settings)
    engine.load_checkpoint(folder, tag="three_universal")
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 3
    train(engine, range(3, 6))
    return full_parameters(engine)


def overflow() -> dict[str, Any]:
    """fp16 with loss scaling; at step 1 the gradient overflows in elements that rank 0 alone holds."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    settings = config("fp32", fp16={"enabled": True, "initial_scale_power": 4, "hysteresis": 1})
    engine, optimizer = make_engine(make_parameters(), settings)
    (flat,) = optimizer.param_groups[0]["params"]
    history = []
    for step in range(3):
        before = full_parameters(engine), optimizer.state[flat]["exp_avg"].clone()
        gradients = make_gradients(step, BITS["bf16"])
        if step == 1:
            gradients["embed.weight"][0, 0] = float("inf") if dist.get_rank() == 0 else 0.0
        inject(engine, gradients)
        after = full_parameters(engine), optimizer.state[flat]["exp_avg"]
        history.append(
            {
                "same": all(torch.equal(before[0][n], after[0][n]) for n in before[0])
                and torch.equal(before[1], after[1]),
                "finite": all(bool(torch.isfinite(p).all()) for p in after[0].values()),
                "skipped": engine.skipped_steps,
                "step": optimizer.state[flat]["step"],
                "scale": engine.optimizer.loss_scale,
            }
        )
    return {"history": history, "parameters": after[0]}


def accumulated_norms() -> dict[str, float]:
    """The gradient norm of eight fp16 micro steps, by the format they are added up in."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    fp16 = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}
    norms = {}
    for name, kept in {"fp32": {"grad_accum_dtype": "fp32"}, "fp16": {"grad_accum_dtype": "fp16"}}.items():
        engine, _ = make_engine(tiny_parameters(), config("fp32", 8, fp16=fp16, data_types=kept))
        for size in [1.0, *[2.0**-12] * 7]:
            engine.backward(engine({"w.weight": torch.full((1, 3), size)}))
            engine.step()
        norms[name] = float(engine.get_global_grad_norm())
    return norms


def first_masters() -> dict[str, dict[str, torch.Tensor]]:
    """The fp32 masters of engines in 16 bits before their first step, and the weights that they were made from."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    found = {"given": {name: p.detach().clone() for name, p in Bag(make_parameters()).named_parameters()}}
    for name, dtype, more in (("bf16", "bf16", {}), ("fp16", "fp32", {"fp16": {"enabled": True}})):
        recipe = Config(optimizer=OptimizerConfig(lr=LR))
        module: Any = Bag(make_parameters())
        found[name] = full_parameters(start_engine(recipe, module, config(dtype, **more), "cpu"))
        found[f"{name} weights"] = {each: p.detach().clone() for each, p in module.named_parameters()}
    return found


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
