"""Load models from Hugging Face folders, refusing what would compute with noise.

transformers only warns when weights are missing (and leaves them random), have another shape, or belong to layers that
the config does not have. `_load` makes an error of each, for all uses:

    load_masked_lm         a teacher, or the start of a student: its MLM head must be there
    load_encoder           the same where no term of the objective predicts tokens: without its head if it has none
    load_with_saved_head   any encoder with the head that it was saved with: ONNX export, latency
    load_finetuned         a model that was fine-tuned on a task: a teacher of task distillation
    load_with_new_head     an encoder under a new head for a task
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from train.errors import UserError, one_line, refused_pickle
from train.models.encoder_config import (
    COPY_AGAIN,
    read_config,
    read_encoder_config,
    refuse_decoder,
)
from train.models.families import FAMILIES, bare_encoder, family_of_type
from train.models.heads import head_of_class
from train.models.tokenizer_checks import TOKENIZER_FILES

WEIGHTS = ("model.safetensors", "pytorch_model.bin", "*.safetensors.index.json", "*.bin.index.json")
POOLER = ("pooler.",)
"""Not every head has one: where a model's is missing, a new head draws its own."""
NO_HEAD_REMEDY = (
    "give a checkpoint that was saved with its masked-language-model head, or an objective that predicts no tokens "
    "(kd_weight, mlm_weight and mse_weight 0; relation_weight=1, or embedding_weight=1, for example), or train a "
    "head on first (--model.teacher=null --model.start_from={name} --model.new_head=true) and take that run's model"
)
_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.")


def load_masked_lm(
    path_or_hub: str, config: Any = None, no_head_remedy: str = NO_HEAD_REMEDY
) -> PreTrainedModel:
    """A masked language model with SDPA attention, fp32 on the CPU, every weight from the checkpoint.

    Args:
        path_or_hub: a Hugging Face folder or a name on the hub.
        config: its Hugging Face config, where that has been read before.
        no_head_remedy: what to do without a head; {name} is the model's.
    Raises:
        UserError: no such folder, an unsupported architecture, or weights as in `_load`, the MLM head's among them.
    """
    model, missing = _load_with_head(path_or_hub, config)
    if missing:
        kinds = ", ".join(model.config.architectures or ["no architecture"])
        raise UserError(
            f"{path_or_hub} has no MLM head: {_listed(missing)} missing from its weights (its config.json names "
            f"{kinds}); {no_head_remedy.format(name=path_or_hub)}"
        )
    return model


def load_encoder(path_or_hub: str, config: Any = None) -> PreTrainedModel:
    """`load_masked_lm`, or where its weights hold no MLM head the bare encoder, without a pooler; a part of a head is
    refused."""
    model, missing = _load_with_head(path_or_hub, config)
    if not missing:
        return model
    head, tied = family_of_type(model.config.model_type).head, model.get_input_embeddings().weight
    own = {name for name, weight in model.named_parameters() if name.startswith(head) and weight is not tied}
    if own - set(missing):
        raise UserError(_incomplete(path_or_hub, missing))
    return bare_encoder(model)


def with_new_head(encoder: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A bare encoder's weights under an MLM head drawn from `seed`, whose decoder is tied to the embeddings."""
    config = copy.deepcopy(encoder.config)
    config.tie_word_embeddings = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForMaskedLM.from_config(
            config, attn_implementation=family_of_type(config.model_type).attention, trust_remote_code=False
        ).float()
    bare_encoder(model).load_state_dict(encoder.state_dict())
    return model


def _load_with_head(path_or_hub: str, config: Any) -> tuple[PreTrainedModel, list[str]]:
    """A masked language model, and which of its head's weights are missing: random numbers."""
    config = config or read_config(path_or_hub)
    refuse_decoder(path_or_hub, config)
    family = family_of_type(config.model_type)
    return _load(
        path_or_hub, AutoModelForMaskedLM, family.head, config=config, attn_implementation=family.attention
    )


def load_with_saved_head(folder: Path) -> PreTrainedModel:
    """The model of a Hugging Face folder with the head that it was saved with: fp32, CPU, eval mode.

    Raises:
        UserError: no such folder, no encoder, a head not known here, or weights as in `_load`.
    """
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is not a Hugging Face folder: it holds no config.json")
    class_name = next(iter(read_encoder_config(folder).architectures or []), "")
    if not class_name:
        raise UserError(f"{folder}/config.json names no architectures: save the model with save_pretrained")
    auto_class = getattr(transformers, head_of_class(class_name, str(folder)).auto_class)
    model: Any
    # Of a bare encoder only the last hidden states are asked for, and its pooler may not be there.
    model, absent = _load(folder, auto_class, POOLER if auto_class is AutoModel else ())
    if absent:
        model.pooler = None  # random numbers
    return model.eval()


def load_finetuned(name: str, auto_class: Any) -> PreTrainedModel:
    """A model whose head is trained already: fp32, CPU, eval mode, frozen.

    Args:
        auto_class: AutoModelForSequenceClassification or AutoModelForQuestionAnswering.
    Raises:
        UserError: weights as in `_load`, the head's among them.
    """
    model, missing = _load(name, auto_class, optional=("",))  # which begins every key
    encoder = f"{model.base_model_prefix}."
    if any(key.startswith(encoder) and POOLER[0] not in key for key in missing):
        raise UserError(_incomplete(name, missing))
    if missing:
        raise UserError(
            f"{name} is not fine-tuned: {_listed(missing)} missing from its weights; fine-tune it on the task first "
            "and give OUT/TASK/seed-N"
        )
    return model.eval().requires_grad_(False)


def load_with_new_head(name: str, auto_class: Any, seed: int, head: Mapping[str, Any]) -> PreTrainedModel:
    """A model with a new head, drawn from `seed`, over the encoder of a folder: fp32, CPU, training mode.

    Args:
        auto_class: AutoModelForSequenceClassification or AutoModelForQuestionAnswering.
        head: fields of the config, such as num_labels.
    Raises:
        UserError: weights of the encoder as in `_load`.
    """
    encoder, missing = _load(name, AutoModel, POOLER)
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(name, trust_remote_code=False, **head)
    config.dtype = torch.float32
    model: PreTrainedModel = auto_class.from_config(config, trust_remote_code=False)
    known = {key: value for key, value in encoder.state_dict().items() if key not in missing}
    found = model.base_model.load_state_dict(known, strict=False)
    assert all(key.startswith(POOLER) for key in found.missing_keys), found
    return model


def _load(
    name: str | Path,
    auto_class: Any,
    optional: tuple[str, ...] = (),
    config: Any = None,
    **options: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """`auto_class.from_pretrained`, in fp32 on the CPU, silent, without any code of the folder's.

    Args:
        optional: beginnings of the keys that may be missing.
        config: its Hugging Face config, where that has been read before.
        options: of from_pretrained.
    Returns:
        The model, and the keys of `optional` that are missing: random numbers.
    Raises:
        UserError: weights that cannot be read, are missing, no numbers, of another shape than by the config, or of more
            layers than it has.
    """
    config = config or read_config(name)
    try:
        with _quiet_transformers():
            model, info = auto_class.from_pretrained(
                name,
                config=config,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                **options,
            )
    # safetensors, pickle and torch have an error each for a damaged file.
    except Exception as error:
        if (refusal := refused_pickle(error)) is not None:
            raise UserError(f"{name}: its weights cannot be read: a file {refusal}") from None
        # A head of DeBERTa-v3, which transformers before 5.20 cannot load.
        is_too_new = "DebertaV2LMPredictionHead" in str(error)
        remedy = "update transformers to 5.20 or newer" if is_too_new else COPY_AGAIN
        raise UserError(f"{name}: its weights cannot be read: {one_line(error)}; {remedy}") from None
    absent = sorted(key for key in info["missing_keys"] if key.startswith(optional))
    missing = sorted(set(info["missing_keys"]) - set(absent))
    _refuse_gaps(name, model.config, missing, info)
    # What fp16 makes of a weight is judged by train/evaluation/teacher_precision.py, with its own remedy.
    for key, weight in model.state_dict().items() if model.dtype == torch.float32 else ():
        if key not in absent and not bool(torch.isfinite(weight).all()):
            raise UserError(
                f"{name}: {key} holds NaN or infinity; give a checkpoint of a run that did not diverge"
            )
    return model, absent


def _refuse_gaps(name: str | Path, config: Any, missing: Sequence[str], info: Mapping[str, Any]) -> None:
    """Refuse weights that leave a model partly random, or cut off.

    Args:
        missing: keys that must be there and are not.
        info: what `from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)` returned.
    """
    together = "give a folder whose weights and config belong together"
    for key, found, expected in sorted(info["mismatched_keys"]):
        raise UserError(
            f"{name}: {key} has shape {tuple(found)}, by its config.json {tuple(expected)}; {together}"
        )
    if missing:
        raise UserError(_incomplete(name, missing))
    pattern = _layers_of(config.model_type)
    layers = [int(found[1]) for key in info["unexpected_keys"] if (found := pattern.search(key))]
    if max(layers, default=-1) >= config.num_hidden_layers:  # others are something else's: an adapter's, say
        raise UserError(
            f"{name}: its weights have {max(layers) + 1} layers, its config.json {config.num_hidden_layers}; {together}"
        )


def _incomplete(name: str | Path, missing: Sequence[str]) -> str:
    return f"{name} is incomplete: {_listed(missing)} missing from its weights; give a whole checkpoint"


def _listed(names: Sequence[str]) -> str:
    """ "a, b, c, d and 3 more are": the beginning of a sentence about the keys of a checkpoint."""
    rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{', '.join(names[:4])}{rest} {'is' if len(names) == 1 else 'are'}"


def _layers_of(model_type: str) -> re.Pattern[str]:
    """What the keys of an encoder's layers look like, with their base model's name before them or without."""
    family = FAMILIES.get(model_type)
    if family is None:
        return _LAYER
    base, _, layers = family.layers.partition(".")
    return re.compile(rf"^(?:{base}\.)?{re.escape(layers)}\.(\d+)\.")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bar and table of missing keys, which would be repeated by every rank."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def check_encoder(name: str) -> Any:
    """The config of an encoder's folder (or hub name), after cheap refusals.

    Raises:
        UserError: no such folder; no config, tokenizer or weights in it; the model is no encoder.
    """
    folder = Path(name)
    if folder.is_dir():
        remedy = "give the Hugging Face folder of a model, such as RUN/model"
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no config.json; {remedy}")
        if not any((folder / file).is_file() for file in TOKENIZER_FILES):
            raise UserError(f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES[:3])}); {remedy}")
        if not any(any(folder.glob(file)) for file in WEIGHTS):
            raise UserError(f"{folder} has no weights (model.safetensors); {remedy}")
    elif name.count("/") > 1 or folder.exists():
        raise UserError(f"there is no model folder {name}; give a Hugging Face folder or a name on the hub")
    return read_encoder_config(name)
