"""From a checkpoint to an ordinary Hugging Face folder: safetensors, tokenizer, model card. No GPU needed."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, PreTrainedModel

from data_prep.shard_format.files import new_folder
from train.checkpointing.checkpoint import newest_checkpoint
from train.checkpointing.integrity import COMPLETE, checkpoint_fault
from train.checkpointing.safe_load import weights_only
from train.distributed.world import import_deepspeed
from train.errors import RunError, UserError
from train.export.model_card import Stated, model_card
from train.export.sentence_files import MODULES, carry_sentence_files
from train.models.encoder_config import read_config, read_tokenizer, write_length_limit
from train.models.families import bare_encoder, family_of
from train.models.loading import load_encoder

# Inside each checkpoint: the student's config.json, its tokenizer, and the teacher's files for sentence-transformers.
DESCRIPTION = "student-config"
PREFIX = "student."


def save_student_description(
    run_dir: Path, student: PreTrainedModel, tokenizer_source: str, origin: str | None
) -> None:
    """Leave what each checkpoint takes along, so that it can be exported without the teacher or the shards.

    Args:
        origin: folder or hub name of what the student was made from; None from scratch.
    """
    folder = description_folder(run_dir)
    student.config.save_pretrained(folder)
    read_tokenizer(tokenizer_source).save_pretrained(folder)
    write_length_limit(folder, student.config)
    if origin is not None:
        carry_sentence_files(origin, folder, student.config)


def description_folder(run_dir: Path) -> Path:
    """Where a run keeps the student's config.json and tokenizer for its checkpoints."""
    return run_dir / "checkpoints" / DESCRIPTION


def find_checkpoint(run_or_checkpoint: Path, say: Callable[[str], None]) -> Path:
    """The checkpoint itself, or the newest whole one of a run folder; `say` is called for each that is passed over.

    Raises:
        UserError: there is none, or the one that was named is damaged.
    """
    if (run_or_checkpoint / COMPLETE).exists():
        if (fault := checkpoint_fault(run_or_checkpoint)) is not None:
            raise UserError(f"{run_or_checkpoint} is not whole: {fault}; export another one of its run")
        return run_or_checkpoint
    passed_over: list[str] = []
    found = newest_checkpoint(run_or_checkpoint / "checkpoints", passed_over.append)
    if found is None:
        raise UserError(
            "; ".join(
                [f"{run_or_checkpoint} is neither a run folder nor a complete checkpoint", *passed_over]
            )
        )
    for line in passed_over:
        say(line)
    return found


def load_student(checkpoint: Path) -> PreTrainedModel:
    """The student of a checkpoint: fp32 weights, on the CPU, in eval mode.

    The weights are the optimizer's fp32 master copy, gathered from the partitions of all ranks, not the
    engine's rounded fp16 or bf16 ones.
    """
    if not (checkpoint / DESCRIPTION / "config.json").exists():
        raise UserError(
            f"{checkpoint} lacks {DESCRIPTION}/config.json: it is not a whole checkpoint of this project"
        )
    import_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with (
        weights_only(checkpoint),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):  # it is talkative
        state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    config = read_config(checkpoint / DESCRIPTION)
    student: PreTrainedModel = AutoModelForMaskedLM.from_config(config, trust_remote_code=False).float()
    weights = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    if not any(name.startswith(family_of(student).head) for name in weights):
        student = bare_encoder(student)
    student.load_state_dict(weights)
    return student.eval()


def export_checkpoint(
    checkpoint: Path, out: Path, summary: Mapping[str, Any] | None = None, stated: Stated | None = None
) -> float:
    """Write the student of a checkpoint as a Hugging Face folder, load it back and compare its outputs: logits, or
    without a head the last hidden states.

    The folder appears whole or not at all.

    Args:
        summary: the run's figures for the model card (RUN/summary.json); None leaves them out.
        stated: what the user says for it.
    Returns:
        The largest difference between the outputs of the checkpoint's student and of the folder's.
    Raises:
        RunError: the folder that was written does not give the same.
    """
    student = load_student(checkpoint)
    with new_folder(out) as folder:
        student.save_pretrained(folder, safe_serialization=True)
        read_tokenizer(checkpoint / DESCRIPTION).save_pretrained(folder)
        write_length_limit(folder, student.config)
        carry_sentence_files(str(checkpoint / DESCRIPTION), folder, student.config)
        of_sentences = (checkpoint / DESCRIPTION / MODULES).exists()
        card = model_card(student, checkpoint, summary, of_sentences, stated)
        (folder / "README.md").write_text(card)
        difference = _largest_difference(student, load_encoder(str(folder)).eval())
        if difference != 0:
            raise RunError(
                f"{out}: its outputs differ from the checkpoint's by {difference}; the disk may be faulty"
            )
    return difference


@torch.no_grad()
def _largest_difference(left: PreTrainedModel, right: PreTrainedModel) -> float:
    vocabulary = left.config.vocab_size
    input_ids = torch.randint(0, vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    return float((left(input_ids)[0] - right(input_ids)[0]).abs().max())
