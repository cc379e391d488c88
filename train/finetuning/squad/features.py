"""Questions and contexts as windows of tokens: what a model reads, and where its answers lie in the text.

Windows are those of BERT's run_squad.py: [CLS] question [SEP] part of the context [SEP], the parts beginning every
`doc_stride` tokens until one reaches the context's end. Each context is tokenised once, however many questions it
has, by the fast tokenizer in batches; its offsets lead from tokens back to characters, so that an answer is always a
piece of the context as it was written.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.errors import UserError
from train.finetuning.squad.questions import Question

MAX_QUESTION_TOKENS = 64  # --max_query_length of BERT's run_squad.py
BATCH = 500
Ints = np.ndarray[Any, np.dtype[np.int32]]
Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class PairTemplate:
    """What a tokenizer puts around a pair of texts."""

    before: tuple[int, ...]
    """Ids; the first is the one whose position stands for "no answer"."""
    between: tuple[int, ...]
    after: tuple[int, ...]
    context_type: int
    """Token type of the second text and what comes after it; the first has 0."""

    @property
    def num_special(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)


@dataclass(frozen=True)
class Windows:
    """n windows over the contexts of m questions, in the questions' order. Ragged arrays, end to end."""

    input_ids: Ints
    """(tokens of all windows,)."""
    bounds: np.ndarray[Any, np.dtype[np.int64]]
    """(n + 1,): window w is input_ids[bounds[w] : bounds[w + 1]]."""
    question: Ints
    """(n,) which question, as an index."""
    context_at: Ints
    """(n,) position in the window of its first context token."""
    first: Ints
    """(n,) that token's index among the context's tokens."""
    num_context: Ints
    """(n,) tokens of the context in the window."""
    answer: Ints
    """(n, 2) positions in the window of the answer's first and last token; 0, 0 where it holds no answer."""
    offsets: list[Ints]
    """For each question, (tokens of its context, 2): [first, one past the last) character of each token."""
    context_type: int
    cut_questions: int
    """How many questions were longer than there was room for, and were cut."""

    def __len__(self) -> int:
        return len(self.question)

    @property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.diff(self.bounds)


def pair_template(tokenizer: Any) -> PairTemplate:
    """Learn from the tokenizer's own output how it joins two texts.

    Raises:
        UserError: a slow tokenizer, or one that does not put [CLS] first and separators around the texts.
    """
    name = getattr(tokenizer, "name_or_path", "") or "the model"
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{name}: answers are found by the offsets of a fast tokenizer, and there is none (tokenizer.json)"
        )
    encoded = tokenizer("a", "a", return_token_type_ids=True)
    ids, owners = encoded["input_ids"], encoded.sequence_ids(0)
    if 0 in owners and 1 in owners:
        first, last = owners.index(0), len(owners) - 1 - owners[::-1].index(0)
        second, end = owners.index(1), len(owners) - owners[::-1].index(1)
        parts = ids[:first], ids[last + 1 : second], ids[end:]
        if all(parts) and parts[0][0] == tokenizer.cls_token_id:
            before, between, after = map(tuple, parts)
            return PairTemplate(before, between, after, encoded["token_type_ids"][second])
    raise UserError(
        f"{name}: its tokenizer gives a pair of texts as {tokenizer.convert_ids_to_tokens(ids)}, without [CLS] first "
        "and separators after both; SQuAD needs them (post_processor in tokenizer.json)"
    )


def question_room(max_length: int, template: PairTemplate) -> tuple[int, int]:
    """How long a question may be in a window of `max_length` tokens, and the room for context beside the longest.

    Questions are cut at MAX_QUESTION_TOKENS as by BERT's run_squad.py, and never take more than half of a window.
    """
    longest_question = min(MAX_QUESTION_TOKENS, (max_length - template.num_special) // 2)
    return longest_question, max_length - template.num_special - longest_question


def make_windows(
    questions: Sequence[Question],
    tokenizer: Any,
    max_length: int,
    doc_stride: int,
    watch: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Windows:
    """All windows of all questions, each with the place of the question's first answer in it.

    Args:
        max_length: tokens of a window, special ones included.
        doc_stride: tokens between the beginnings of neighbouring windows.
        watch: wraps the iteration over batches of texts; for a progress bar.
    Raises:
        UserError: no room for context, or a stride that would leave out text.
    """
    template = pair_template(tokenizer)
    longest_question, room = question_room(max_length, template)
    if longest_question < 1 or not 1 <= doc_stride <= room:
        raise UserError(
            f"windows of {max_length} tokens that begin every {doc_stride} tokens: beside a question of "
            f"{max(longest_question, 0)} tokens there is room for {max(room, 0)} of the context; the stride must be "
            "between 1 and that"
        )
    contexts = list(dict.fromkeys(question.context for question in questions))
    number = {context: index for index, context in enumerate(contexts)}
    distinct = list(dict.fromkeys(question.question.strip() for question in questions))
    encoded = list(_encoded(tokenizer, [*contexts, *distinct], watch))
    asked = dict(zip(distinct, (ids for ids, _ in encoded[len(contexts) :]), strict=True))

    ids: list[Ints] = []
    rows: list[tuple[int, ...]] = []
    before, between, after = (
        np.array(part, np.int32) for part in (template.before, template.between, template.after)
    )
    for index, question in enumerate(questions):
        context_ids, offsets = encoded[number[question.context]]
        head = np.concatenate([before, asked[question.question.strip()][:longest_question], between])
        span = answer_tokens(offsets, question.span)
        for first, count in window_parts(len(context_ids), max_length - len(head) - len(after), doc_stride):
            ids.append(np.concatenate([head, context_ids[first : first + count], after]))
            inside = span is not None and first <= span[0] and span[1] < first + count
            answer = (span[0] - first + len(head), span[1] - first + len(head)) if inside and span else (0, 0)
            rows.append((index, len(head), first, count, *answer))
    table = np.array(rows, np.int32).reshape(-1, 6)
    return Windows(
        input_ids=np.concatenate(ids),
        bounds=np.cumsum([0, *map(len, ids)], dtype=np.int64),
        question=table[:, 0],
        context_at=table[:, 1],
        first=table[:, 2],
        num_context=table[:, 3],
        answer=table[:, 4:],
        offsets=[encoded[number[question.context]][1] for question in questions],
        context_type=template.context_type,
        cut_questions=sum(len(asked[question.question.strip()]) > longest_question for question in questions),
    )


def window_parts(num_tokens: int, room: int, doc_stride: int) -> list[tuple[int, int]]:
    """(first token, how many) of each window over a context; one empty window where no token is.

    As in BERT's run_squad.py: a window every `doc_stride` tokens, the last is the first that reaches the end.
    """
    parts = []
    for first in range(0, max(num_tokens, 1), doc_stride):
        parts.append((first, min(room, num_tokens - first)))
        if first + room >= num_tokens:
            break
    return parts


def answer_tokens(offsets: Ints, span: tuple[int, int] | None) -> tuple[int, int] | None:
    """First and last token of those that share a character with `span`; None where no token does.

    Args:
        offsets: (tokens, 2) [first, one past the last) character; several tokens may lie in one character (bytes).
    """
    if span is None or not len(offsets):
        return None
    first = int(np.searchsorted(offsets[:, 1], span[0], side="right"))
    last = int(np.searchsorted(offsets[:, 0], span[1], side="left")) - 1
    return (first, last) if first <= last else None


def text_of(context: str, offsets: Ints, first: int, last: int) -> str:
    """The piece of `context` from the `first` to the `last` token, without blanks around it.

    A tokenizer that strips accents ends a token before a combining accent; the text keeps it.
    """
    end = int(offsets[last, 1])
    while end < len(context) and unicodedata.combining(context[end]):
        end += 1
    return context[int(offsets[first, 0]) : end].strip()


def widest_context(windows: Windows) -> list[np.ndarray[Any, np.dtype[np.bool_]]]:
    """For each window, (its context tokens,) bool: whether none of the question's windows shows this token amid more.

    A token in several windows is judged in the one where the smaller of what stands left and right of it is largest
    (`_check_is_max_context` of BERT's run_squad.py).
    """
    chosen = []
    ends = np.flatnonzero(np.diff(windows.question, append=-1)) + 1
    begin = 0
    for end in ends:
        parts = [(int(windows.first[w]), int(windows.num_context[w])) for w in range(begin, end)]
        if len(parts) == 1:
            chosen.append(np.ones(parts[0][1], bool))
        else:
            scores = np.full((len(parts), parts[-1][0] + parts[-1][1]), -1.0)
            for row, (first, count) in enumerate(parts):
                place = np.arange(count)
                scores[row, first : first + count] = np.minimum(place, count - 1 - place)
            # Of equals the first, which is the longest: what BERT's bonus for length comes to.
            best = scores.argmax(axis=0)
            chosen += [best[first : first + count] == row for row, (first, count) in enumerate(parts)]
        begin = end
    return chosen


def _encoded(
    tokenizer: Any, texts: Sequence[str], watch: Callable[[Iterable[Any]], Iterable[Any]]
) -> Iterable[tuple[Ints, Ints]]:
    """Ids, and offsets, of each text."""
    for begin in watch(range(0, len(texts), BATCH)):
        batch = tokenizer(
            list(texts[begin : begin + BATCH]),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True):
            yield np.array(ids, np.int32), np.array(offsets, np.int32).reshape(-1, 2)
