"""Two small tokenizers as real models have them: WordPiece around BERT's pairs, bytes around RoBERTa's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.conftest import SPECIAL, WORDS


def wordpiece(with_pairs: bool = True, cls_token: str = "[CLS]", words: Sequence[str] = tuple(WORDS)) -> Any:
    """Lower-cases and strips accents; single letters for what it does not know."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.?'"
    pieces = dict.fromkeys([*SPECIAL, *words, *letters, *("##" + letter for letter in letters)])
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    pair = {"pair": "[CLS] $A [SEP] $B:1 [SEP]:1"} if with_pairs else {}
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends, **pair
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token=cls_token,
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def byte_pairs() -> Any:
    """One token a byte, almost: a character beyond ASCII is several tokens with one offset."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {piece: index for index, piece in enumerate([*special, *bytes_, "th", "the"])}
    backend = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
    )
