"""A teacher's folder with the part of its vocabulary that a corpus uses."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from data_prep.shard_format.files import new_folder, write_text
from data_prep.shard_format.manifest import Manifest
from data_prep.shard_format.tokenizer_files import save_tokenizer
from data_prep.shard_format.tokenizer_info import TokenizerInfo, tokenizer_info
from train.data.shards import read_histogram, read_shard, shard_tokens
from train.errors import RunError, UserError
from train.models.build import count_parameters
from train.models.encoder_config import read_tokenizer, write_length_limit
from train.models.families import POSITIONS_AFTER_PADDING
from train.models.heads import head_of_class, longest_sequence, random_inputs
from train.models.loading import check_encoder, load_encoder, load_with_saved_head
from train.models.tokenizer_checks import check_vocabulary
from train.models.vocabulary import choose_tokens, required_tokens, trimmed_tokenizer

SAMPLE_TOKENS, TEXT_TOKENS = 100_000, 64
WRITTEN_ANEW = (
    *("config.json", "*.safetensors", "*.bin", "*.pt", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.index.json"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
)
"""Patterns of the files that hold a model's weights or its tokenizer, in any library's format."""


@dataclass(frozen=True)
class Sample:
    """Passages of a corpus, decoded and tokenised again with the whole vocabulary and with the trimmed one."""

    tokens: tuple[int, int]
    dropped: int
    """Those of the first that are spelled with others now."""
    unknown: tuple[int, int]


@dataclass(frozen=True)
class Trimmed:
    """What is left of a teacher; before and after."""

    tokens: tuple[int, int]
    parameters: tuple[int, int]
    coverage: float
    """Share of the train split's tokens that are kept."""
    sample: Sample


def trim_teacher(
    teacher: Path, shards: str, out: Path, *, keep: int | None = None, coverage: float = 1.0
) -> Trimmed:
    """Write `out`, the folder of a teacher with the tokens that shards use.

    For kept tokens its hidden states are the teacher's, to the bit: compared before the folder appears.

    Args:
        teacher: its Hugging Face folder, with the tokenizer that the shards were written with.
        keep, coverage: as in `choose_tokens`.
    Raises:
        UserError: the folder has no fast tokenizer, or another than the shards'; there is nothing to trim; `keep` is
            too small.
        RunError: the folder that was written is not read back as it should be.
    """
    manifest = Manifest.load(shards)
    config, tokenizer, info = _open(teacher)
    check_vocabulary(str(teacher), config, info.fingerprint, manifest.tokenizer)
    counts = read_histogram(shards, manifest)
    if not counts.any():
        raise UserError(f"{shards} has no tokens in its train split; write shards of a corpus")
    counts = np.pad(counts, (0, config.vocab_size - len(counts)))  # a model may have more rows
    backend = tokenizer.backend_tokenizer.to_str()
    content = json.loads(backend)
    required = required_tokens(content, {*info.special_ids, *_token_ids(config).values()})
    if config.model_type in POSITIONS_AFTER_PADDING:  # the padding's id decides where positions begin
        required.update(range(config.pad_token_id + 1))
    try:
        kept = choose_tokens(content, counts, required, keep=keep, coverage=coverage)
    except UserError as error:
        raise UserError(f"{teacher}: {error}") from None
    if len(kept) == config.vocab_size:
        raise UserError(
            f"{teacher}: all of its {len(kept)} tokens would stay; give a lower --keep or --coverage, or take it so"
        )
    trimmed = json.dumps(trimmed_tokenizer(content, kept), ensure_ascii=False, indent=2)
    model = load_as_saved(teacher, config)
    with new_folder(out) as folder:
        _copy_the_rest(teacher, folder)
        trim_model(model, kept).save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        write_text(folder / "tokenizer.json", trimmed)
        write_length_limit(folder, config)
        parameters = _check_written(folder, tokenizer, model, kept)
    return Trimmed(
        tokens=(config.vocab_size, len(kept)),
        parameters=(count_parameters(model), parameters),
        coverage=int(counts[kept].sum()) / int(counts.sum()),
        sample=_tokenized_again(backend, trimmed, kept, info.unk_id, _passages(shards, manifest)),
    )


def _open(teacher: Path) -> tuple[Any, Any, TokenizerInfo]:
    """Config, tokenizer and its record."""
    if not teacher.is_dir():
        raise UserError(
            f"there is no model folder {teacher}; give a Hugging Face folder (`hf download NAME --local-dir FOLDER` "
            "fetches one from the hub)"
        )
    config, tokenizer = check_encoder(str(teacher)), read_tokenizer(teacher)
    try:
        return config, tokenizer, tokenizer_info(tokenizer)
    except UserError as error:
        raise UserError(f"{teacher}: {error}") from None


def load_as_saved(teacher: Path, config: Any) -> PreTrainedModel:
    """With its head, in eval mode; where that is none known here (ELECTRA's discriminator), as teachers are loaded.
    UserError for weights as in train/models/loading.py."""
    try:
        head_of_class(next(iter(config.architectures or []), ""), str(teacher))
    except UserError:
        return load_encoder(str(teacher), config).eval()
    return load_with_saved_head(teacher)


def _token_ids(config: Any) -> dict[str, int]:
    """The fields of a config that hold ids of its vocabulary."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if name.endswith("_token_id") and isinstance(value, int) and 0 <= value < config.vocab_size
    }


def _copy_the_rest(teacher: Path, folder: Path) -> None:
    """Model card, licence, and what sentence-transformers has beside the model: files, and folders such as 1_Pooling.

    Hidden files belong to version control, other folders (onnx/, say) hold the whole model.
    """
    for path in sorted(teacher.iterdir()):
        if path.is_dir() and re.match(r"\d+_", path.name):
            shutil.copytree(path, folder / path.name, copy_function=shutil.copyfile)
        elif path.is_file() and not any(fnmatch(path.name, pattern) for pattern in (".*", *WRITTEN_ANEW)):
            shutil.copyfile(path, folder / path.name)


def trim_model(model: PreTrainedModel, kept: np.ndarray) -> PreTrainedModel:
    """The model with a part of its vocabulary: rows of embeddings, decoder and bias, in eval mode.

    Whatever has another shape with the smaller vocabulary belongs to it, in every architecture and under every head.

    Args:
        kept: (n,) int64, ascending ids; those that the config names among them.
    """
    config = copy.deepcopy(model.config)
    places = {int(old): new for new, old in enumerate(kept)}
    config.update({name: places[index] for name, index in _token_ids(config).items()})
    config.vocab_size = len(kept)
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn, and go
        trimmed: Any = type(model)(config)
    if getattr(model, "pooler", trimmed) is None:
        trimmed.pooler = None
    rows = torch.from_numpy(kept)
    shapes = {name: tensor.shape for name, tensor in trimmed.state_dict().items()}
    trimmed.load_state_dict(
        {
            name: tensor if tensor.shape == shapes[name] else tensor[rows]
            for name, tensor in model.state_dict().items()
        }
    )
    return trimmed.eval()


def _check_written(folder: Path, tokenizer: Any, model: PreTrainedModel, kept: np.ndarray) -> int:
    """Parameters of the model in a folder; RunError where it, or its tokenizer, is not the kept part of the others."""
    places = {int(old): new for new, old in enumerate(kept)}
    vocabulary = {token: places[old] for token, old in tokenizer.get_vocab().items() if old in places}
    if read_tokenizer(folder).get_vocab() != vocabulary:
        raise RunError(f"{folder}: its tokenizer is read back with other ids than were written")
    written = load_with_saved_head(folder)
    inputs = random_inputs(written, 4, longest_sequence(written, 64), seed=0)
    before = {**inputs, "input_ids": torch.from_numpy(kept)[inputs["input_ids"]]}
    with torch.inference_mode():
        states = [
            one.base_model(**given, output_hidden_states=True).hidden_states
            for one, given in ((model, before), (written, inputs))
        ]
    if not all(map(torch.equal, *states)):
        raise RunError(f"{folder}: its hidden states differ from the teacher's; the disk may be faulty")
    return count_parameters(written)


def _passages(shards: str, manifest: Manifest) -> Iterator[np.ndarray]:
    """Runs of up to TEXT_TOKENS tokens, SAMPLE_TOKENS in all, of the held-out split; of the other where it is empty."""
    left = SAMPLE_TOKENS
    for shard in manifest.splits["heldout"] or manifest.splits["train"]:
        tokens = shard_tokens(read_shard(shards, shard), shard, manifest.tokenizer)[:left]
        left -= len(tokens)
        ends = np.flatnonzero(tokens == manifest.tokenizer.sep_id)
        for document in np.split(tokens, ends + 1):
            yield from (
                document[start : start + TEXT_TOKENS] for start in range(0, len(document), TEXT_TOKENS)
            )
        if left == 0:
            return


def _tokenized_again(
    before: str, after: str, kept: np.ndarray, unknown: int, passages: Iterator[np.ndarray]
) -> Sample:
    """Compare two tokenizers, each as its tokenizer.json, on decoded passages."""
    both = [Tokenizer.from_str(before), Tokenizer.from_str(after)]
    for each in both:
        each.no_truncation()
        each.no_padding()
    texts = [text for text in both[0].decode_batch([ids.tolist() for ids in passages]) if text.strip()]
    old, new = ([one.ids for one in each.encode_batch(texts, add_special_tokens=False)] for each in both)
    places = {int(token): place for place, token in enumerate(kept)}
    dropped = 0
    for whole, part in zip(old, new, strict=True):
        expected = [places.get(token) for token in whole]
        dropped += expected.count(None)
        assert None in expected or unknown in whole or expected == part, (whole, part)
    return Sample(
        tokens=(sum(map(len, old)), sum(map(len, new))),
        dropped=dropped,
        unknown=(sum(ids.count(unknown) for ids in old), sum(ids.count(places[unknown]) for ids in new)),
    )
