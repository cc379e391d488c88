"""What each gloo rank runs for test_plan_memory.py: real engines, their tensors counted after some steps."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel, RobertaConfig, RobertaForMaskedLM

from launch.planner.models import describe
from train.config_sections.objective import ObjectiveConfig
from train.data.masking import MaskedBatch
from train.distributed.world import import_deepspeed
from train.lamb import Lamb
from train.loop.trainer import DistillationModule
from train.models.students import make_student
from train.models.teacher import Teacher
from train.objective.distillation import DistillationLoss


@dataclass(frozen=True)
class Size:
    """A four- or twelve-layer teacher, and the micro batch of its student."""

    vocabulary: int
    width: int
    inner: int
    heads: int
    layers: int
    length: int
    micro: int
    masked: int
    bucket: int


SIZES = {
    "small": Size(211, 32, 128, 4, 4, length=24, micro=3, masked=4, bucket=6000),
    "base": Size(30522, 768, 3072, 12, 12, length=128, micro=2, masked=19, bucket=50_000_000),
}


def make_teacher(kind: str, size: Size) -> PreTrainedModel:
    """No dropout in attention, so that its fused kernel runs as on a GPU."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": size.inner,
        "max_position_embeddings": size.length + 2,
        "attention_probs_dropout_prob": 0.0,
    }
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**settings))
    return RobertaForMaskedLM(RobertaConfig(**settings, type_vocab_size=1))


def make_batch(size: Size) -> MaskedBatch:
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(5, size.vocabulary, (size.micro, size.length), generator=generator)
    positions = torch.rand(ids.shape, generator=generator).argsort(-1)[:, : size.masked].sort(-1).values
    return MaskedBatch(ids, positions, ids.gather(1, positions), torch.ones_like(positions, dtype=torch.bool))


def engine_config(precision: str, stage: int, accumulation: int, size: Size) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": size.micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": size.bucket,
            "reduce_scatter": False,  # as in ds_configs/
        },
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def bytes_of(tensors: Any) -> int:
    """Bytes of the distinct storages behind some tensors."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None
    }
    return sum(storages.values())


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors alive at once, those made before included, but for an earlier engine's."""

    def __init__(self, not_counted: dict[int, StorageWeakRef]) -> None:
        super().__init__()
        self.not_counted = not_counted
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        for tensor in living_tensors():
            self._note(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor)
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata not in self.not_counted:
            self.alive.setdefault(reference.cdata, (reference, storage.nbytes()))


def living_tensors() -> list[torch.Tensor]:
    gc.collect()
    return [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]


def living_storages() -> dict[int, StorageWeakRef]:
    references = [StorageWeakRef(tensor.untyped_storage()) for tensor in living_tensors()]
    return {reference.cdata: reference for reference in references}


class CountedBytes:
    """Elements and bytes that torch.distributed's collectives were given since this was made."""

    def __init__(self) -> None:
        self.reduced = self.gathered = 0
        self._all_reduce, self._gather = dist.all_reduce, deepspeed.comm.all_gather_into_tensor

    def __enter__(self) -> CountedBytes:
        def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32) and tensor.numel() > 1:
                self.reduced += tensor.numel() * tensor.element_size()
            return self._all_reduce(tensor, *args, **kwargs)

        def gather(output: torch.Tensor, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.gathered += output.numel() * output.element_size()
            return self._gather(output, tensor, *args, **kwargs)

        dist.all_reduce, deepspeed.comm.all_gather_into_tensor = all_reduce, gather
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce, deepspeed.comm.all_gather_into_tensor = self._all_reduce, self._gather


def measure(
    kind: str, precision: str, stage: int, accumulation: int, size_name: str = "small"
) -> dict[str, Any]:
    """Train two steps and count: model state after them, gradients in the middle, bytes sent in one step."""
    size, before = SIZES[size_name], living_storages()
    teacher_model = make_teacher(kind, size)
    student = make_student(teacher_model)
    teacher = Teacher([teacher_model])
    module = DistillationModule(student, DistillationLoss(ObjectiveConfig()))
    optimizer = Lamb(module.named_parameters(), lr=1e-3)
    config = engine_config(precision, stage, accumulation, size)
    engine, *_ = import_deepspeed().initialize(model=module, optimizer=optimizer, config=config)
    optimizer.bind(engine)
    batch, zero = make_batch(size), engine.optimizer
    found: dict[str, Any] = {"config": config}
    for _ in range(2):
        with CountedBytes() as counted, PeakBytes(before) as peak:
            for micro in range(accumulation):
                taught = teacher(batch.input_ids)
                engine.backward(engine(batch, taught)["loss"])
                if micro == accumulation - 1:
                    held = gc_gradients(zero)
                engine.step()
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    found |= {
        "student weights": bytes_of(p.data for p in module.parameters()),
        "fp32 master (shard)": bytes_of(zero.single_partition_of_fp32_groups),
        "moments (shard)": bytes_of([state["exp_avg"], state["exp_avg_sq"]]),
        "gradients": held,
        "peak": peak.peak,
        "reduced": counted.reduced,
        "gathered": counted.gathered,
        "student": asdict(describe(student)),
        "teacher": asdict(describe(teacher_model)),
        "step": {
            "num_masked": size.masked,
            "micro_batch_size": size.micro,
            "sequence_length": size.length,
            "accumulation": accumulation,
            "world_size": dist.get_world_size(),
        },
    }
    gc.collect()
    return found


def gc_gradients(zero: Any) -> int:
    """Bytes of the accumulated gradients just before the optimizer takes them."""
    groups = [tensor for group in zero.averaged_gradients.values() for tensor in (group or [])]
    return bytes_of([t for t in groups if not getattr(t, "_zero_padding", False) or t.numel() > 64])


def measure_all(cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    return [measure(*case) for case in cases]
