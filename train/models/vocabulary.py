"""A smaller vocabulary out of a larger one: which tokens to keep for a corpus, and the tokenizer that has only those.

Tokenizers are plain data here: the tree of a tokenizer.json, as `backend_tokenizer.to_str()` gives it. Kept tokens stay
in their order, so that a token's new id is its place among them. What holds of the smaller tokenizer:

* A text whose tokens are all kept, none of them unknown, gets the same tokens.
* A text of the corpus' characters gets no unknown token where it had none, if every character has a token of its own,
  as in vocabularies that were trained from characters; byte-level tokenizers have no unknown ones.

WordPiece takes the longest match, which stays the longest. BPE goes the same way if every token that is made on the way
to a kept one is kept as well, and the merges stay in order. Unigram takes the best of all segmentations, which stays
the best; an unknown character costs 10 more than the lowest score of the vocabulary, so that a token of that score
stays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from train.errors import UserError

Tree = Mapping[str, Any]
MODELS = ("WordPiece", "BPE", "Unigram")
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class Pieces:
    """What the tokens of a vocabulary are made of; UserError where the model is none of WordPiece, BPE and Unigram."""

    def __init__(self, content: Tree) -> None:
        model = content["model"]
        if model["type"] not in MODELS:
            raise UserError(
                f"its tokenizer is a {model['type']} model, whose vocabulary cannot be trimmed; give one of "
                f"{', '.join(MODELS)}"
            )
        self._prefix, self._suffix = _affixes(model)
        self._ids = model_vocabulary(content)
        self._tokens = {index: token for token, index in self._ids.items()}
        self._ranks = {tuple(pair): rank for rank, pair in enumerate(model.get("merges", ()))}

    def characters(self, token: int) -> set[int]:
        """The tokens of its characters, wherever in a word; itself too where one has none in its place."""
        text = self._tokens.get(token, "")
        forms = {
            start + character + end
            for character in self._body(text)
            for start in ("", self._prefix)
            for end in ("", self._suffix)
        }
        found = {self._ids[form] for form in forms if form in self._ids}
        return found if all(symbol in self._ids for symbol in self._symbols(text)) else {token, *found}

    def path(self, token: int) -> set[int]:
        """The token, and all that BPE makes on its way to it."""
        if not self._ranks or token not in self._tokens:
            return {token}
        symbols = self._symbols(self._tokens[token])
        made = set(symbols)
        while pairs := [pair for pair in pairwise(symbols) if pair in self._ranks]:
            best = min(pairs, key=self._ranks.__getitem__)
            place = list(pairwise(symbols)).index(best)
            symbols[place : place + 2] = [best[0] + best[1].removeprefix(self._prefix)]
            made.add(symbols[place])
        if symbols != [self._tokens[token]]:  # no text gets it by merges
            return {token}
        return {self._ids[each] for each in made}

    def _body(self, text: str) -> str:
        return text.removeprefix(self._prefix).removesuffix(self._suffix)

    def _symbols(self, text: str) -> list[str]:
        """Its characters as the model has them at the beginning of a word, within it and at its end."""
        continues, ends = (
            bool(self._prefix) and text.startswith(self._prefix),
            bool(self._suffix) and text.endswith(self._suffix),
        )
        symbols = [
            (self._prefix if place or continues else "") + each for place, each in enumerate(self._body(text))
        ]
        return [*symbols[:-1], symbols[-1] + self._suffix] if ends and symbols else symbols


def _affixes(model: Tree) -> tuple[str, str]:
    """What stands before a piece that continues a word, and behind one that ends it."""
    return model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""


def model_vocabulary(content: Tree) -> dict[str, int]:
    """Ids of the model's own tokens, without those added to it."""
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, Mapping):
        return dict(vocabulary)
    return {token: index for index, (token, _) in enumerate(vocabulary)}


def required_tokens(content: Tree, special: Iterable[int]) -> set[int]:
    """Ids that stay whatever the corpus is.

    Special and added tokens; what the post-processor and the padding write; the bytes that stand for unknown
    characters; for Unigram a token of the lowest score, and all below the unknown token's id, which some of
    transformers' classes have as a constant.
    """
    model, ids = content["model"], model_vocabulary(content)
    found = {*special, *(token["id"] for token in content["added_tokens"])}

    def noted(index: int) -> int:
        found.add(index)
        return index

    _with_ids(content, noted)
    if model["type"] == "Unigram":
        scores = [score for _, score in model["vocab"]]
        found.add(scores.index(min(scores)))
        found.update(range(0 if model["unk_id"] is None else model["unk_id"] + 1))
    elif model["unk_token"] in ids:
        found.add(ids[model["unk_token"]])
    alphabet = ByteLevel.alphabet() if "ByteLevel" in str(content["pre_tokenizer"]) else ()
    found.update(ids[character] for character in alphabet if character in ids)
    if model.get("byte_fallback"):
        found.update(index for token, index in ids.items() if _BYTE.fullmatch(token))
    return found


def choose_tokens(
    content: Tree,
    counts: np.ndarray,
    required: Iterable[int],
    *,
    keep: int | None = None,
    coverage: float = 1.0,
) -> np.ndarray:
    """The tokens to keep: the required ones, the characters of all that the corpus uses, then the most frequent.

    Args:
        content: of tokenizer.json.
        counts: (V,) int64, how often the corpus has each token.
        keep: how many at most, `required` and characters among them.
        coverage: otherwise, the share of the corpus' tokens to reach, above 0 and at most 1.
    Returns:
        (kept,) int64, ascending.
    Raises:
        UserError: `keep` is too small for what must stay.
    """
    pieces, numbers = Pieces(content), counts.tolist()
    by_count = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist()
    kept = set(required)
    kept.update(*map(pieces.characters, by_count))
    kept.update(*map(pieces.path, list(kept)))
    if keep is not None and keep < len(kept):
        raise UserError(
            f"--keep {keep}: special tokens and the characters of the corpus alone are {len(kept)} tokens; give that "
            "or more"
        )
    covered, wanted = sum(numbers[token] for token in kept), math.ceil(coverage * sum(numbers))
    for token in by_count:
        if keep is None and covered >= wanted:
            break
        new = pieces.path(token) - kept
        if keep is None or len(kept) + len(new) <= keep:
            kept |= new
            covered += sum(numbers[each] for each in new)
    return np.array(sorted(kept), np.int64)


def trimmed_tokenizer(content: Tree, kept: Sequence[int] | np.ndarray) -> dict[str, Any]:
    """The tree of a tokenizer.json with the kept tokens alone, numbered from 0 in their order."""
    new = {int(old): index for index, old in enumerate(kept)}
    model = dict(content["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in new]
        model["unk_id"] = None if model["unk_id"] is None else new[model["unk_id"]]
    else:
        ids = {token: new[old] for token, old in model["vocab"].items() if old in new}
        model["vocab"] = dict(sorted(ids.items(), key=lambda item: item[1]))
    if model["type"] == "BPE":
        prefix, _ = _affixes(model)
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if {left, right, left + right.removeprefix(prefix)} <= model["vocab"].keys()
        ]
    added = [{**token, "id": new[token["id"]]} for token in content["added_tokens"]]
    return {**_with_ids(content, new.__getitem__), "added_tokens": added, "model": model}


def _with_ids(content: Tree, new_id: Callable[[int], int]) -> dict[str, Any]:
    """The tree with other ids in its post-processor and its padding."""

    def processor(tree: Any) -> Any:
        changed = dict(tree)
        for end in ("sep", "cls"):  # of BertProcessing and RobertaProcessing
            if end in tree:
                changed[end] = [tree[end][0], new_id(tree[end][1])]
        if "special_tokens" in tree:  # of TemplateProcessing
            changed["special_tokens"] = {
                name: {**entry, "ids": [new_id(index) for index in entry["ids"]]}
                for name, entry in tree["special_tokens"].items()
            }
        if "processors" in tree:  # of Sequence
            changed["processors"] = [processor(each) for each in tree["processors"]]
        return changed

    changed = dict(content)
    if content["post_processor"]:
        changed["post_processor"] = processor(content["post_processor"])
    if content["padding"]:
        changed["padding"] = {**content["padding"], "pad_id": new_id(content["padding"]["pad_id"])}
    return changed
