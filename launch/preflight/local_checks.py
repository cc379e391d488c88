"""What launch/doctor.py checks once, where it runs: arithmetic, tokenizer, teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from launch.preflight.checks import Finding
from train.config import Config
from train.errors import UserError, one_line

CHECKPOINT_BYTES_PER_PARAMETER = 2 + 3 * 4
"""fp16 weights; fp32 master and two moments, all ranks' partitions together."""
MIN_DISK_GIB = 1.0
CPU_TOKENS = 16  # half-precision products have no fast path on a CPU


def needed_disk_gib(config: Config) -> float:
    """What the kept checkpoints, one in the making and the exported student come to; at least 1."""
    from launch.planner.models import models_of
    from train.models.build import count_parameters

    try:
        parameters = count_parameters(models_of(config)[0])
    except UserError:  # other checks report it
        return MIN_DISK_GIB
    copies = config.checkpoint.keep_last + 1
    return max(MIN_DISK_GIB, parameters * (copies * CHECKPOINT_BYTES_PER_PARAMETER + 4) / 2**30)


def check_batch(config: Config, world_size: int) -> Finding:
    """Does the number of ranks fit the recipe's batch?"""
    from train.data.order import check_fit

    training = config.training
    micro = 1 if training.micro_batch_size == "auto" else training.micro_batch_size
    try:
        accumulation = check_fit(training.global_batch_size, config.data.lanes, world_size, micro)
    except ValueError as error:
        what, _, remedy = str(error).partition(": ")
        return Finding("batch arithmetic", False, what, remedy)
    batch = (
        f"{training.global_batch_size} = {training.micro_batch_size} x {accumulation} x {world_size} ranks"
    )
    return Finding("batch arithmetic", True, batch)


def told(check: str, question: Callable[[], str], remedy: str) -> Finding:
    """A finding from a function that returns what is well or raises what is not; its own remedy, if it has one."""
    try:
        return Finding(check, True, question())
    except (ValueError, OSError) as error:
        return failed(check, error, remedy)


def failed(check: str, error: Exception, remedy: str) -> Finding:
    """A finding from an error, whose text may end with its own remedy."""
    text = " ".join(str(error).split())
    what, separator, own = text.rpartition("; ")
    return Finding(check, False, what, own) if separator else Finding(check, False, text, remedy)


def check_tokenizer(config: Config) -> Finding:
    """Shards, the tokenizer beside them, and every teacher: do their ids mean the same?"""
    from data_prep.shard_format.manifest import Manifest, without_scheme
    from train.models.build import teacher_config, teacher_names
    from train.models.loading import check_vocabulary, folder_fingerprint

    def question() -> str:
        tokenizer = Manifest.load(config.data.shards).tokenizer
        beside = Path(without_scheme(config.data.shards), "tokenizer")
        if beside.is_dir() and folder_fingerprint(str(beside)) != tokenizer.fingerprint:
            raise UserError(
                f"{beside} is not the tokenizer that the shards were made with; make the shards again"
            )
        for name in teacher_names(config):
            ask_hub(name)
            check_vocabulary(name, teacher_config(name), folder_fingerprint(name), tokenizer)
        return f"{tokenizer.vocab_size} entries, fingerprint {tokenizer.fingerprint[:12]}"

    return told("tokenizer and shards", question, "write the shards with --tokenizer TEACHER")


def ask_hub(name: str) -> None:
    """One question to the hub for a model that is neither a folder nor in its cache.

    Loading asks again and again, for 23 s, where nothing answers.

    Raises:
        UserError: the hub does not answer, or has no such model.
    """
    from huggingface_hub import constants, file_exists, try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    try:
        if Path(name).is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        found = file_exists(name, "config.json")
    except HFValidationError:  # a path: loading says that there is no such folder
        return
    except Exception as error:  # of whichever HTTP library the hub's client uses
        reason = one_line(error, 200)
        raise UserError(
            f"model.teacher={name!r}: no folder of that name here, not in the hub's cache, and {constants.ENDPOINT} "
            f"cannot be asked ({reason}); give a folder, or download it where there is internet: hf download {name}"
        ) from None
    if not found:
        raise UserError(
            f"model.teacher={name!r}: no folder of that name here, and no model at {constants.ENDPOINT} (or "
            "HF_TOKEN may not see it); give the folder of a masked language model, or the name of one on the hub"
        )


def check_teacher(config: Config) -> list[Finding]:
    """Every teacher loads with its head, and in its running precision still is the model it is in fp32."""
    from train.models.build import teacher_names

    names = teacher_names(config)
    if not names:
        return [Finding("teacher", True, "none: masked-language modelling alone")]
    remedy = "give a Hugging Face folder of a masked language model, or the name of one on the hub"
    return [told("teacher", lambda name=name: _compare(config, name), remedy) for name in names]  # type: ignore[misc]


def _compare(config: Config, name: str) -> str:
    import torch

    from train.evaluation.teacher_precision import check_teacher_precision
    from train.models.build import TEACHER_DTYPES
    from train.models.teacher import load_teacher

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # fp16 also where only a CPU is at hand: it is what the GPUs of the run will compute in.
    dtype = TEACHER_DTYPES[config.model.teacher_dtype] or torch.float16
    ask_hub(name)
    teacher = load_teacher(name, device=device, dtype=dtype)
    teacher.check_sequence_length(config.data.sequence_length)
    shape = (
        (2, config.data.sequence_length)
        if device == "cuda"
        else (1, min(CPU_TOKENS, config.data.sequence_length))
    )
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, teacher.vocab_size, shape, generator=generator).to(device)
    (report,) = check_teacher_precision(teacher, input_ids)
    return f"has its MLM head; {report.dtype} against fp32: KL {report.kl:.1e}, same choice {report.top1_agreement:.0%}"
