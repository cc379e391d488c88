"""Trimmed tokenizers of every kind beside the whole ones, on random vocabularies, corpora and texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from train.errors import UserError
from train.models.vocabulary import choose_tokens, required_tokens, trimmed_tokenizer

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
UNKNOWN = 1
LETTERS = "abcd"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def random_words(rng: Random, most: int, letters: str, longest: int) -> list[str]:
    return ["".join(rng.choices(letters, k=rng.randint(1, longest))) for _ in range(rng.randint(0, most))]


def random_texts(rng: Random, letters: str) -> list[str]:
    return [text for _ in range(6) if (text := " ".join(random_words(rng, 6, letters, 8)))]


def numbered(rng: Random, tokens: list[str]) -> dict[str, int]:
    """Ids by token: special ones first, the others in any order."""
    tokens = [*dict.fromkeys(tokens)]
    return {token: index for index, token in enumerate([*SPECIAL, *rng.sample(tokens, len(tokens))])}


def random_wordpiece(rng: Random) -> Tokenizer:
    longer = [rng.choice(["", "##"]) + word for word in random_words(rng, 16, LETTERS, 5)]
    vocabulary = numbered(rng, [*LETTERS, *("##" + letter for letter in LETTERS), *longer])
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=7))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def random_bpe(rng: Random, prefix: str = "", suffix: str = "", of_bytes: bool = False) -> Tokenizer:
    symbols = [start + letter + end for letter in LETTERS for start in {"", prefix} for end in {"", suffix}]
    merges: list[tuple[str, str]] = []
    for _ in range(rng.randint(0, 16)):
        left = rng.choice([each for each in symbols if not suffix or not each.endswith(suffix)])
        right = rng.choice([each for each in symbols if each.startswith(prefix)])
        if (left, right) not in merges:  # several may make the same token
            merges.append((left, right))
            symbols.append(left + right.removeprefix(prefix))
    options: dict[str, Any] = {"continuing_subword_prefix": prefix, "end_of_word_suffix": suffix}
    options["unk_token"] = "" if of_bytes else "<unk>"
    options = {name: affix for name, affix in options.items() if affix}
    vocabulary = numbered(rng, [*symbols, *(BYTES if of_bytes else ())])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rng.random() < 0.2, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel() if of_bytes else pre_tokenizers.WhitespaceSplit()
    return tokenizer


def random_unigram(rng: Random) -> Tokenizer:
    with_z = [word for word in random_words(rng, 16, LETTERS + "z", 5) if word != "z"]
    tokens = numbered(rng, [*LETTERS, "▁", *with_z])
    scored = [(token, float(-rng.randint(1, 30)) if index > 3 else 0.0) for token, index in tokens.items()]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


KINDS: dict[str, Callable[[Random], Tokenizer]] = {
    "WordPiece": random_wordpiece,
    "BPE": random_bpe,
    "BPE, continued": lambda rng: random_bpe(rng, prefix="##"),
    "BPE, ends marked": lambda rng: random_bpe(rng, suffix="</w>"),
    "BPE of bytes": lambda rng: random_bpe(rng, of_bytes=True),
    "Unigram": random_unigram,
}


def trim(tokenizer: Tokenizer, counts: np.ndarray, *special: int, **size: Any) -> tuple[list[int], Tokenizer]:
    content = json.loads(tokenizer.to_str())
    kept = choose_tokens(content, counts, required_tokens(content, [*range(len(SPECIAL)), *special]), **size)
    return kept.tolist(), Tokenizer.from_str(json.dumps(trimmed_tokenizer(content, kept)))


def counted(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    ids = [index for text in texts for index in tokenizer.encode(text).ids]
    return np.bincount(np.array(ids, np.int64), minlength=tokenizer.get_vocab_size())


def spelled(tokens: list[str]) -> str:
    return "".join(tokens).replace("##", "").replace("</w>", "")


@pytest.mark.parametrize("kind", KINDS)
def test_kept_texts_map_one_to_one_and_others_are_spelled_with_kept_tokens(kind: str) -> None:
    mapped = respelled = 0
    for seed in range(100):
        rng = Random(seed)
        whole = KINDS[kind](rng)
        corpus = random_texts(rng, LETTERS[: rng.randint(1, 4)])
        counts, coverage = counted(whole, corpus), rng.choice([0.3, 0.6, 0.9, 1.0])
        kept, part = trim(whole, counts, rng.randrange(whole.get_vocab_size()), coverage=coverage)
        assert kept == sorted(set(kept))
        assert counts[kept].sum() >= coverage * counts.sum()
        places = {old: new for new, old in enumerate(kept)}
        assert part.get_vocab() == {
            token: places[old] for token, old in whole.get_vocab().items() if old in places
        }
        letters = {*spelled([whole.id_to_token(index) for index in np.flatnonzero(counts)]), " "} - {"z"}
        for text in [*corpus, *random_texts(rng, LETTERS + "z")]:  # which is no token of any vocabulary
            before, after = whole.encode(text), part.encode(text)
            if set(before.ids) <= set(kept):
                assert [kept[new] for new in after.ids] == before.ids
                mapped += 1
            elif UNKNOWN not in before.ids and set(text) <= letters:
                assert UNKNOWN not in after.ids
                assert spelled(after.tokens) == spelled(before.tokens)
                respelled += 1
            assert coverage < 1 or text not in corpus or set(before.ids) <= set(kept)
    assert mapped > 200
    assert respelled > 40


@pytest.mark.parametrize("kind", KINDS)
def test_keep_is_reached_and_never_exceeded(kind: str) -> None:
    for seed in range(10):
        whole = KINDS[kind](rng := Random(seed))
        counts = counted(whole, ["a", *random_texts(rng, LETTERS)])
        least, most = (len(trim(whole, counts, coverage=share)[0]) for share in (1e-9, 1.0))
        for keep in range(least, most + 1):
            size = len(trim(whole, counts, keep=keep)[0])
            assert size <= keep
            assert size == keep or kind.startswith("BPE")  # a token may need others
        assert len(trim(whole, counts, keep=most + 5)[0]) == most
        with pytest.raises(UserError, match=f"--keep {least - 1}: .* are {least} tokens; give that or more"):
            trim(whole, counts, keep=least - 1)


def small(vocabulary: list[str], **parts: Any) -> dict[str, Any]:
    """The tree of a WordPiece tokenizer."""
    tokenizer = Tokenizer(
        models.WordPiece({token: index for index, token in enumerate(vocabulary)}, unk_token="<unk>")
    )
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return json.loads(tokenizer.to_str())


PAIRS = [("</s>", 6), ("<s>", 5)]
PROCESSORS = {
    "bert": processors.BertProcessing(*PAIRS),
    "roberta": processors.RobertaProcessing(*PAIRS),
    "template": processors.TemplateProcessing(single="<s> $A </s>", special_tokens=PAIRS),
}


@pytest.mark.parametrize("processor", [*PROCESSORS.values(), processors.Sequence([*PROCESSORS.values()])])
def test_ids_beside_the_vocabulary_follow(processor: Any) -> None:
    """Of the post-processor, the padding and added tokens, none of which the corpus or the caller names."""
    tokenizer = Tokenizer.from_str(
        json.dumps(small(["x", "y", "<unk>", "a", "<pad>", "<s>", "</s>"], post_processor=processor))
    )
    tokenizer.add_tokens(["added"])
    tokenizer.enable_padding(pad_id=4, pad_token="<pad>")
    content = json.loads(tokenizer.to_str())
    kept = choose_tokens(content, np.array([0, 1, 0, 0, 0, 0, 0, 0]), required_tokens(content, ()))
    assert kept.tolist() == [1, 2, 4, 5, 6, 7]
    part = Tokenizer.from_str(json.dumps(trimmed_tokenizer(content, kept)))
    assert part.get_vocab() == {"y": 0, "<unk>": 1, "<pad>": 2, "<s>": 3, "</s>": 4, "added": 5}
    encoded = part.encode_batch(["y", "added y"])[0]
    assert encoded.tokens == tokenizer.encode_batch(["y", "added y"])[0].tokens
    assert encoded.ids == [part.token_to_id(token) for token in encoded.tokens]


def test_a_token_whose_characters_have_none_stays() -> None:
    content = small(["<unk>", "a", "##b", "ab", "abc"])
    assert choose_tokens(content, np.array([0, 99, 0, 1, 1]), {0}, coverage=0.9).tolist() == [0, 1, 2, 4]


def test_unigram_keeps_the_unknown_id_and_score() -> None:
    """AlbertTokenizer and XLMRobertaTokenizer have the id as a constant; the score decides what is taken."""
    entries = [
        ("unused", -3.0),
        ("<unk>", 0.0),
        ("rare", -30.0),
        ("ab", -1.0),
        ("a", -12.0),
        ("bx", -12.0),
        ("b", -9.0),
    ]
    whole = Tokenizer(models.Unigram(entries, unk_id=1))
    content = json.loads(whole.to_str())
    assert required_tokens(content, ()) == {0, 1, 2}
    part = Tokenizer.from_str(json.dumps(trimmed_tokenizer(content, [0, 1, 2, 3, 4, 5, 6])))
    assert part.encode("abx").tokens == whole.encode("abx").tokens == ["a", "bx"]
    part = Tokenizer.from_str(json.dumps(trimmed_tokenizer(content, [0, 1, 3, 4, 5, 6])))
    assert part.encode("abx").tokens == ["ab", "x"]


def test_bytes_stay() -> None:
    vocabulary = {"<unk>": 0, "<0x00>": 1, "<0xFF>": 2, "a": 3, "b": 4}
    content = json.loads(
        Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)).to_str()
    )
    assert required_tokens(content, ()) == {0, 1, 2}
    whole = random_bpe(Random(0), of_bytes=True)
    part = trim(whole, counted(whole, ["abc"]))[1]
    assert spelled(part.encode("déjà vu").tokens) == spelled(whole.encode("déjà vu").tokens)


def test_a_list_of_words_is_refused() -> None:
    content = json.loads(Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>")).to_str())
    with pytest.raises(UserError, match=r"WordLevel model.*give one of WordPiece, BPE, Unigram"):
        choose_tokens(content, np.array([1]), {0})
