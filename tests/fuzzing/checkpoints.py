"""A run's newest checkpoint, with a whole one before it: as a start, an export and a rank's share of either read it.

The files are those of DeepSpeed's ZeRO-2 on two ranks, written here; tests/flip_bits.py takes a real run's.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM

from tests.fuzzing.target import Target
from tests.unit.finetuning.squad_tokenizers import wordpiece
from train.checkpointing.checkpoint import checkpoint_name, newest_checkpoint
from train.checkpointing.integrity import content_fault, listed, record_own_files, write_facts
from train.checkpointing.safe_load import weights_only
from train.checkpointing.state import TrainState
from train.distributed.world import import_deepspeed
from train.export.hugging_face import DESCRIPTION, PREFIX, find_checkpoint, load_student
from train.models.encoder_config import read_tokenizer

RUN = "run-1"
BEFORE, NEWEST = checkpoint_name(5), checkpoint_name(10)
RANKS = 2
CONTENTS_BEFORE = "contents-before"
MODEL, OPTIMIZER = "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


@cache
def _student(name: str) -> BertForMaskedLM:
    torch.manual_seed(int(name[-2:]))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertForMaskedLM(BertConfig(vocab_size=len(wordpiece()), max_position_embeddings=16, **sizes))


def _make_step(folder: Path, name: str) -> None:
    step, student = folder / name, _student(name)
    student.config.save_pretrained(step / DESCRIPTION)
    wordpiece().save_pretrained(step / DESCRIPTION)
    parameters = dict(student.named_parameters())
    names = {parameter.data_ptr(): name for name, parameter in parameters.items()}
    weights = student.state_dict()
    model = {
        "module": {PREFIX + name: value for name, value in weights.items()},
        "buffer_names": [],
        "param_shapes": [OrderedDict((PREFIX + name, value.shape) for name, value in parameters.items())],
        "shared_params": {
            PREFIX + name: PREFIX + names[value.data_ptr()]
            for name, value in weights.items()
            if name not in parameters
        },
        "halfling": asdict(TrainState(int(name[-2:]), loss_history=(9.0, 8.5))),
    }
    torch.save(model, step / MODEL)
    flat = torch.cat([value.detach().flatten() for value in parameters.values()])
    for rank, part in enumerate(torch.nn.functional.pad(flat, (0, len(flat) % RANKS)).chunk(RANKS)):
        state = {"step": 10, "exp_avg": part / 2, "exp_avg_sq": part**2}
        optimizer = {
            "zero_stage": import_deepspeed().runtime.zero.config.ZeroStageEnum.gradients,
            "partition_count": [RANKS],
            "single_partition_of_fp32_groups": [part.clone()],
            "base_optimizer_state": {"state": {0: state}, "param_groups": [{"lr": 0.001}]},
        }
        torch.save({"optimizer_state_dict": optimizer}, step / OPTIMIZER.format(rank))
    records = [record_own_files(step, rank, RANKS) for rank in range(RANKS)]
    write_facts(step, int(name[-2:]), RANKS, {**records[0], **records[1]}, heldout_mlm_loss=4.5)


def _make_checkpoints(folder: Path) -> None:
    for name in (BEFORE, NEWEST):
        _make_step(folder / RUN / "checkpoints", name)
    (folder / CONTENTS_BEFORE).write_text(_contents(folder / RUN / "checkpoints" / BEFORE))


def _contents(checkpoint: Path) -> str:
    """Digest of the weights as export takes them; of weights, moments and client state as the engine does; of the
    tokenizer."""
    student = load_student(checkpoint).state_dict()
    with weights_only(checkpoint):
        files = [
            torch.load(checkpoint / name, weights_only=False)
            for name in (MODEL, *(OPTIMIZER.format(rank) for rank in range(RANKS)))
        ]
    TrainState.from_dict(files[0]["halfling"])
    vocabulary = sorted(read_tokenizer(checkpoint / DESCRIPTION).get_vocab().items())
    return hashlib.sha256(repr(_plain([student, files, vocabulary])).encode()).hexdigest()


def _plain(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.dtype, tuple(tree.shape), tree.numpy().tobytes()
    if isinstance(tree, dict):
        return [(key, _plain(value)) for key, value in tree.items()]
    return [_plain(value) for value in tree] if isinstance(tree, list | tuple) else tree


def _read_run(folder: Path) -> tuple[str, list[str], str | None, str]:
    """The step that is read of the run, what is said, what the ranks find wrong with the newest, and the contents."""
    said: list[str] = []
    found = find_checkpoint(folder / RUN, said.append)
    newest, fault = folder / RUN / "checkpoints" / NEWEST, None
    if newest.exists():
        facts, fault = listed(newest)
        faults = [content_fault(newest, facts, rank, RANKS) for rank in range(RANKS)] if facts else []
        fault = next((each for each in faults if each is not None), fault)
    assert newest_checkpoint(folder / RUN / "checkpoints", lambda line: None) == found
    return found.name, said, fault, _contents(found)


def _named_or_equal(value: Any, expected: Any, folder: Path) -> str | None:
    """The newest as it was; or the one before, in one line that names the newest, unless there is none of that name."""
    name, said, fault, contents = value
    if name == NEWEST:
        return None if value == expected else "the damage is not noticed"
    if contents != (folder / CONTENTS_BEFORE).read_text():
        return "other weights than the step before"
    if not (folder / RUN / "checkpoints" / NEWEST).exists():
        return None
    if fault is None:
        return "the ranks do not notice"
    return None if len(said) == 1 and NEWEST in said[0] else f"not said: {said}"


def _read_named(folder: Path) -> str:
    """The newest, by name."""
    found = find_checkpoint(folder / RUN / "checkpoints" / NEWEST, lambda line: None)
    return _contents(found)


DAMAGED = (f"{RUN}/checkpoints/{NEWEST}/**/*",)
DAMAGE = ("bytes", "lines", "tree", "folders")

TARGETS = (
    Target("checkpoint", _make_checkpoints, _read_run, _named_or_equal, DAMAGED, kinds=DAMAGE),
    Target("checkpoint-named", _make_checkpoints, _read_named, damaged=DAMAGED, kinds=DAMAGE),
)
