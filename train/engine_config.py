"""DeepSpeed's JSON: what it owns stands there, what the recipe owns stands there as "auto" and is filled in.

DeepSpeed itself does not resolve "auto". One owner per number: a literal where the recipe decides, and an
"auto" that nobody fills in, are both errors.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.shard_format.files import read_file
from train.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

# DeepSpeed's own optimizer, scheduler, TensorBoard and throughput are not used: the recipe brings its own.
REPLACED = {
    "optimizer": "the section optimizer.*",
    "scheduler": "the section schedule.*",
    **dict.fromkeys(("comet", "csv_monitor", "tensorboard", "wandb"), "run.trackers"),
    "timers": "metrics.jsonl's tokens_per_s and time_*",
}
RECIPE_OWNS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size, training.micro_batch_size and the world size",
    "gradient_clipping": "training.gradient_clipping",
    "steps_per_print": "run.log_every_steps",
}

OBJECT, BOOL, POSITIVE, DTYPE = (
    'an object such as {"enabled": true}',
    "true or false",
    "a number above 0",
    "fp16, bf16 or fp32",
)
LARGEST_BUCKET = 10**12
_FP32 = ("fp32", "float32", "float", "torch.float32")
_DTYPES = {
    *("fp16", "float16", "half", "torch.float16", "bf16", "bfloat16", "bfloat", "torch.bfloat16"),
    *_FP32,
}
# What DeepSpeed 0.19.8 reads only in calls that nothing here makes, or only beside what is refused, and what to use.
IDLE = {
    "activation_checkpointing": "deepspeed.checkpointing is not called; take a smaller training.micro_batch_size",
    "checkpoint": "checkpoints are written, checked and kept by the recipe's section checkpoint.*",
    "comms_logger": "its summary is not asked for; run.profile_steps traces every collective",
    "compile": "engine.compile() is not called; model.teacher_compile and model.student_compile do it",
    "sparse_gradients": "embeddings have dense gradients, which the optimizer needs whole",
    "zero_force_ds_cpu_optimizer": "it goes with offload_optimizer, which the optimizer refuses",
}
# Keys of sections that take no effect in stages 1 and 2, or only beside what is refused; DeepSpeed itself refuses keys
# that it does not know.
IDLE_KEYS = {
    "bf16": {"immediate_grad_update", "bf16_master_weights_and_grads", "bf16_optimizer_states"},
    "fp16": {"auto_cast", "fp16_master_weights_and_grads"},
    "zero_optimization": {
        *(
            "allgather_partitions",
            "legacy_stage1",
            "offload_param",
            "sub_group_size",
            "memory_efficient_linear",
        ),
        *("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights"),
        *("zero_quantized_gradients", "pipeline_loading_checkpoint", "override_module_apply", "leaf_module"),
        *("log_trace_cache_warnings", "enable_sanity_checks", "save_muon_momentum_buffer_in_memory"),
        *("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "prefetch_bucket_size"),
        *("param_persistence_threshold", "model_persistence_threshold", "max_live_parameters"),
        *("max_reuse_distance", "gather_16bit_weights_on_model_save", "module_granularity_threshold"),
        *("use_all_reduce_for_fetch_params", "allgather_sequential"),
    },
}
LOGGED = ("dump_state", "memory_breakdown", "wall_clock_breakdown")
"""What DeepSpeed does with these is a line of its log of level info."""

# Sections of DeepSpeed's JSON that mean something in this trainer, and what they hold; DeepSpeed itself passes unknown
# ones over, and reads those that are no objects as they come.
ENGINE_OWNS = {
    "bf16": OBJECT,
    "communication_data_type": DTYPE,
    "data_types": OBJECT,
    "disable_python_gc": BOOL,
    "dump_state": BOOL,
    "flops_profiler": OBJECT,
    "fp16": OBJECT,
    "gradient_predivide_factor": POSITIVE,
    "memory_breakdown": BOOL,
    "prescale_gradients": BOOL,
    "torch_autocast": OBJECT,
    "wall_clock_breakdown": BOOL,
    "zero_allow_untested_optimizer": BOOL,
    "zero_optimization": OBJECT,
}


def default_engine_config(device_type: str) -> Path:
    """The JSON used where deepspeed.config is null: fp16 on GPUs, fp32 on a CPU."""
    return ROOT / "ds_configs" / ("fp16.json" if device_type == "cuda" else "cpu.json")


def read_engine_config(path: str | Path) -> dict[str, Any]:
    """The JSON object of a file; UserError for no such file, no JSON object, a key twice."""
    where = f"deepspeed.config={str(path)!r}"
    try:
        config = json.loads(read_file(_found(path)), object_pairs_hook=_object, parse_constant=_refuse)
    except FileNotFoundError:
        shipped = ", ".join(
            f"ds_configs/{file.name}" for file in sorted((ROOT / "ds_configs").glob("*.json"))
        )
        raise UserError(f"{where}: no such file; this project ships {shipped}") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply; see ds_configs/ for JSONs that work") from None
    except ValueError as error:  # no JSON, no UTF-8, a number of thousands of digits
        raise UserError(f"{where} is not JSON: {error}; see ds_configs/ for JSONs that work") from None
    if not isinstance(config, dict):
        raise UserError(f"{where} holds a {type(config).__name__}; a JSON object is needed")
    return config


def _found(path: str | Path) -> Path:
    """The file itself, or the one of this project's ds_configs/ where a command was started in another folder."""
    shipped = ROOT / path
    return shipped if not Path(path).exists() and shipped.parent == ROOT / "ds_configs" else Path(path)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON's")


def resolve_engine_config(
    template: dict[str, Any],
    *,
    global_batch_size: int,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    gradient_clipping: float,
    source: str | Path | None = None,
    log_level: str = "info",
) -> dict[str, Any]:
    """`template` with every "auto" filled in, ready for deepspeed.initialize.

    Args:
        template: the parsed JSON; not changed.
        global_batch_size, micro_batch_size: sequences.
        gradient_clipping: largest global gradient norm; 0 for none.
        source: the JSON's file, to be named.
        log_level: deepspeed.log_level.
    Raises:
        UserError: an unknown section or one without effect, one that holds what it cannot, a literal where the recipe
            decides, a ZeRO stage above 2, or an "auto" left over.
    """
    where = f"deepspeed.config={str(source)!r}" if source else "deepspeed.config"
    values = {
        "train_batch_size": global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_clipping": gradient_clipping,
        "steps_per_print": None,  # the engine's own step lines; metrics.jsonl has them
    }
    _refuse_unknown_sections(template, where)
    resolved = copy.deepcopy(template)
    for key, owner in {**RECIPE_OWNS, **REPLACED}.items():
        if resolved.get(key, "auto") != "auto":
            raise UserError(
                f'{where}: {key}={resolved[key]!r} belongs to {owner}; write "auto" there or leave it out'
            )
    for key in REPLACED:
        resolved.pop(key, None)
    resolved.update(values)
    if left := _left_over(resolved):
        raise UserError(f'{where}: nothing fills in "auto" at {", ".join(left)}; give a value there')
    resolved.setdefault("zero_optimization", None)
    for key, needed in ENGINE_OWNS.items():
        if key in resolved and not _holds(resolved[key], needed):
            raise UserError(f"{where}: {key}={resolved[key]!r}; give {needed}")
    _refuse_idle_keys(resolved, where, log_level)
    # DeepSpeed keeps a list of the optimizer classes it knows, which lacks our LAMB.
    resolved["zero_allow_untested_optimizer"] = True
    # It would wait for the GPU before and after every micro batch from the third step on.
    resolved["timers"] = {"throughput": {"enabled": False}}
    _refuse_values(resolved, where)
    _refuse_combinations(resolved, where)
    return resolved


def _refuse_unknown_sections(template: dict[str, Any], where: str) -> None:
    known = sorted({*ENGINE_OWNS, *RECIPE_OWNS, *REPLACED})
    for key in template:
        if key in IDLE:
            raise UserError(f"{where}: {key} does nothing in this trainer: {IDLE[key]}; leave {key} out")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            of_use = sorted({*ENGINE_OWNS, *RECIPE_OWNS})
            hint = f"did you mean {near[0]!r}?" if near else f"remove it; known are {', '.join(of_use)}"
            raise UserError(f"{where}: unknown section {key!r}; {hint}")


def _refuse_values(resolved: dict[str, Any], where: str) -> None:
    """What DeepSpeed would take as it comes, and this trainer cannot run."""
    zero = resolved["zero_optimization"]
    stage, bucket = zero.get("stage", 0), zero.get("reduce_bucket_size", 1)
    if stage not in (1, 2):
        raise UserError(f"{where}: zero_optimization.stage={stage!r}; this trainer runs stages 1 and 2")
    dtype = resolved.get("data_types", {}).get("grad_accum_dtype")
    if not _holds(dtype, DTYPE):
        raise UserError(f"{where}: data_types.grad_accum_dtype={dtype!r}; give {DTYPE}")
    if not _holds(bucket, POSITIVE) or bucket > LARGEST_BUCKET:
        raise UserError(
            f"{where}: zero_optimization.reduce_bucket_size={bucket!r}; give {POSITIVE}, up to {LARGEST_BUCKET:,}"
        )


def _refuse_idle_keys(resolved: dict[str, Any], where: str, log_level: str) -> None:
    for section, idle in IDLE_KEYS.items():
        for key in resolved.get(section, {}):
            if key.removeprefix("stage3_") in idle or key.startswith("stage3_"):
                raise UserError(
                    f"{where}: {section}.{key} is not for this trainer, which runs ZeRO stages 1 and 2 with its own "
                    "optimizers on fp32 master weights; leave it out"
                )
    for key in LOGGED:
        if resolved.get(key) and log_level not in ("debug", "info"):
            raise UserError(
                f"{where}: {key} shows in DeepSpeed's log alone, which deepspeed.log_level={log_level!r} holds back; "
                "give deepspeed.log_level=info too, or leave it out"
            )


def _refuse_combinations(resolved: dict[str, Any], where: str) -> None:
    """What DeepSpeed 0.19 asserts only when the model is there (runtime/zero/stage_1_and_2.py)."""
    zero = resolved["zero_optimization"]
    size = zero.get("allgather_bucket_size", 2)
    if isinstance(size, (int, float)) and size % 2:
        raise UserError(f"{where}: zero_optimization.allgather_bucket_size={size!r}; give an even number")
    if zero.get("stage") == 2 and zero.get("reduce_scatter", True):
        for key, needed in (("gradient_predivide_factor", 1), ("prescale_gradients", False)):
            if resolved.get(key, needed) != needed:
                raise UserError(
                    f"{where}: {key}={resolved[key]!r} does not go with zero_optimization.reduce_scatter in stage 2; "
                    f"leave it out, or set reduce_scatter to false"
                )


def _holds(value: Any, needed: str) -> bool:
    if needed is OBJECT:
        return isinstance(value, dict)
    if needed is DTYPE:  # with DeepSpeed's other names for them
        return value is None or (isinstance(value, str) and value in _DTYPES)
    number = isinstance(value, (int, float))
    return number and (value in (0, 1) if needed is BOOL else value > 0)


def _left_over(value: Any, path: str = "") -> list[str]:
    if value == "auto":
        return [path]
    if isinstance(value, dict):
        return [name for key, item in value.items() for name in _left_over(item, f"{path}.{key}".lstrip("."))]
    return []


ALIGNMENT = 2
"""Elements per rank to which ZeRO pads its flat buffer (DeepSpeed 0.19, runtime/zero/stage_1_and_2.py)."""


@dataclass(frozen=True)
class EngineSettings:
    """What DeepSpeed's JSON decides about memory and communication."""

    stage: int
    bytes_per_element: int
    """Of a weight, an activation and a gradient: 2 in fp16 and bf16, 4 in fp32."""
    accumulation_bytes: int
    """Of an accumulated gradient."""
    reduce_bucket_size: int
    """Elements reduced at a time."""
    reduces_copies: bool
    """Whether slices of a bucket are copied into one tensor before they are sent, and back (reduce_scatter)."""
    overlap: bool
    """Whether gradients are reduced while the backward pass goes on."""
    precision: str
    """fp16, bf16 or fp32."""

    @property
    def takes_stage_1(self) -> bool:
        """Whether the optimizers are tested at stage 1: not where gradients in bf16 are accumulated in fp32."""
        return self.precision != "bf16" or self.accumulation_bytes == 2


def engine_settings(engine_config: Mapping[str, Any]) -> EngineSettings:
    """The settings in a DeepSpeed JSON; defaults as in DeepSpeed 0.19."""
    enabled = (name for name in ("bf16", "fp16") if engine_config.get(name, {}).get("enabled"))
    precision = next(enabled, "fp32")
    accumulation = engine_config.get("data_types", {}).get("grad_accum_dtype") or precision
    zero = engine_config.get("zero_optimization", {})
    return EngineSettings(
        stage=int(zero.get("stage", 0)),
        bytes_per_element=4 if precision == "fp32" else 2,
        accumulation_bytes=4 if accumulation in _FP32 else 2,
        reduce_bucket_size=int(zero.get("reduce_bucket_size", 5e8)),
        reduces_copies=bool(zero.get("reduce_scatter", True)),
        overlap=bool(zero.get("overlap_comm", False)),
        precision=precision,
    )


def partition_size(parameters: int, world_size: int) -> int:
    """Elements of ZeRO's flat buffer that one rank owns, padding included."""
    step = ALIGNMENT * world_size
    return -(-parameters // step) * step // world_size
