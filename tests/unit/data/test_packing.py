"""Cutting documents into windows, against the same thing on Python lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import packing

SEP = 3


def shard(lengths: list[int]) -> tuple[np.ndarray, list[list[int]]]:
    """Documents of distinct token values, so that a misplaced token shows."""
    documents, value = [], 10
    for length in lengths:
        documents.append([*range(value, value + length), SEP])
        value += length
    return np.array([t for d in documents for t in d], dtype=np.uint16), documents


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 12), max_size=40),
    st.randoms(use_true_random=False),
    st.sampled_from([1, 7, 1 << 16]),
)
def test_documents_are_permuted_whole(lengths: list[int], random: object, group: int) -> None:
    tokens, documents = shard(lengths)
    order = list(range(len(documents)))
    random.shuffle(order)  # type: ignore[attr-defined]
    bounds = packing.document_bounds(tokens, SEP)
    assert bounds.tolist() == [0, *np.cumsum([len(d) for d in documents]).tolist()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_GROUP_TOKENS", group)
        permuted = packing.permute_documents(tokens, bounds, np.array(order, dtype=np.int64))
    assert permuted.tolist() == [t for index in order for t in documents[index]]
    assert permuted.dtype == tokens.dtype


def test_windows_are_cut_and_framed() -> None:
    tokens, _ = shard([4, 5, 3])
    windows = packing.cut_windows(tokens, 6)
    assert windows.tolist() == [tokens[:6].tolist(), tokens[6:12].tolist()]  # three tokens are left over
    assert windows.base is not None  # a view
    out = np.full((2, 8), -1, dtype=np.int32)
    packing.frame_windows(windows, out, cls_id=1, sep_id=SEP)
    assert out.tolist() == [[1, *tokens[:6].tolist(), SEP], [1, *tokens[6:12].tolist(), SEP]]
    assert packing.cut_windows(tokens[:5], 6).shape == (0, 6)
