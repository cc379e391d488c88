"""The masks: exact counts, a pure function of their four numbers, and the statistics that they promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_prep.shard_format.tokenizer_info import TokenizerInfo
from tests.tiny_shards import TOKENIZER
from train.data import masking
from train.data.masking import MaskedBatch, Masker, continuation_table

LENGTH = 64
GOLDEN_POSITIONS = [[1, 4, 5, 9], [3, 4, 5, 11]]
GOLDEN_IDS = [
    [2, 4, 62, 3, 4, 4, 18, 52, 20, 4, 10, 3, 63, 49, 20, 3],
    [2, 55, 29, 4, 4, 46, 20, 63, 52, 49, 18, 4, 58, 54, 15, 3],
]
SPECIAL = torch.tensor(TOKENIZER.special_ids)


def windows(rows: int, length: int = LENGTH, seed: int = 0, special_share: float = 0.05) -> torch.Tensor:
    """(rows, length) int32: [CLS], ordinary tokens with some special ones among them, [SEP]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, TOKENIZER.vocab_size, (rows, length), generator=generator, dtype=torch.int32)
    ids[torch.rand(rows, length, generator=generator) < special_share] = TOKENIZER.sep_id
    ids[:, 0], ids[:, -1] = TOKENIZER.cls_id, TOKENIZER.sep_id
    return ids


def same(a: MaskedBatch, b: MaskedBatch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)


def check_promises(masked: MaskedBatch, ids: torch.Tensor, num_masked: int) -> None:
    rows = len(ids)
    assert masked.input_ids.shape == ids.shape
    assert masked.positions.shape == masked.targets.shape == masked.valid.shape == (rows, num_masked)
    assert (masked.positions.diff(dim=1) > 0).all()
    assert torch.equal(masked.targets, torch.gather(ids.long(), 1, masked.positions))
    maskable = ~torch.isin(ids, SPECIAL)
    assert torch.equal(masked.valid.sum(1), maskable.sum(1).clamp(max=num_masked))
    assert not torch.isin(masked.targets[masked.valid], SPECIAL).any()
    untouched = torch.ones_like(ids, dtype=torch.bool).scatter(1, masked.positions, ~masked.valid)
    assert torch.equal(masked.input_ids[untouched], ids.long()[untouched])
    changed = masked.input_ids[~untouched]
    assert not (torch.isin(changed, SPECIAL) & (changed != TOKENIZER.mask_id)).any()


@settings(max_examples=150, deadline=None)
@given(
    st.integers(8, 80),
    st.floats(0.08, 0.9),
    st.floats(0, 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**40),
    st.booleans(),
    st.booleans(),
)
def test_counts_are_exact_and_special_tokens_stay(
    length: int, probability: float, special_share: float, seed: int, epoch: int, words: bool, smooth: bool
) -> None:
    count = round(probability * length)
    assume(1 <= count <= length - 2)
    masker = Masker(
        TOKENIZER,
        length,
        seed,
        probability,
        whole_word=np.arange(64) % 2 == 0 if words else None,
        histogram=np.arange(64) if smooth else None,
    )
    ids = windows(5, length, seed % 1000, special_share)
    check_promises(masker(ids, torch.arange(5) * 2**33, epoch), ids, count)


def test_a_row_depends_on_seed_epoch_and_window_alone() -> None:
    ids, numbers = windows(40), torch.arange(40) + 10**9
    whole = Masker(TOKENIZER, LENGTH, seed=3)(ids, numbers, epoch=2)
    rows = torch.tensor([7, 3, 39])
    part = Masker(TOKENIZER, LENGTH, seed=3)(ids[rows].long(), numbers[rows], epoch=2)
    assert same(part, MaskedBatch(*(getattr(whole, name)[rows] for name in whole.__dataclass_fields__)))
    for seed, epoch, shift in ((4, 2, 0), (3, 3, 0), (3, 2, 1)):
        other = Masker(TOKENIZER, LENGTH, seed)(ids, numbers + shift, epoch)
        # Two independent draws of 10 out of 62 positions share 1.6 of them.
        shared = (whole.positions.unsqueeze(2) == other.positions.unsqueeze(1)).sum() / len(ids)
        assert 0.8 < shared < 2.4


def test_the_hash_is_splitmix64() -> None:
    # The first outputs of SplitMix64 from state 0 (Vigna's reference implementation, prng.di.unimi.it).
    assert masking._mix_int(0) == 0xE220A8397B1DCDAF
    assert masking._mix_int(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4
    values = [0, 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15]
    mixed = masking._mix(torch.tensor([masking._signed(value) for value in values]))
    assert mixed.tolist() == [masking._signed(masking._mix_int(value)) for value in values]


def test_the_masks_never_change() -> None:
    # Other numbers here would be other masks for every run.
    masked = Masker(TOKENIZER, 16, seed=1, probability=0.25)(
        windows(2, 16), torch.tensor([0, 2**40]), epoch=3
    )
    assert masked.positions.tolist() == GOLDEN_POSITIONS
    assert masked.input_ids.tolist() == GOLDEN_IDS


def test_positions_are_uniform() -> None:
    rows = 20_000
    ids = windows(rows, special_share=0)
    masked = Masker(TOKENIZER, LENGTH, seed=0)(ids, torch.arange(rows), epoch=0)
    counts = torch.bincount(masked.positions.flatten(), minlength=LENGTH).double()
    assert counts[0] == counts[-1] == 0
    expected = rows * 10 / 62
    # Drawn without replacement the counts vary less than a multinomial's, by (62 - 10) / 62; 61 degrees of
    # freedom give a chi-square above 100 once in a thousand.
    chi_square = ((counts[1:-1] - expected) ** 2 / expected).sum() * 62 / 52
    assert 30 < chi_square < 100


def test_eighty_ten_ten() -> None:
    rows = 20_000
    ids = windows(rows)
    masked = Masker(TOKENIZER, LENGTH, seed=0)(ids, torch.arange(rows), epoch=0)
    shown = torch.gather(masked.input_ids, 1, masked.positions)[masked.valid]
    targets = masked.targets[masked.valid]
    total = len(shown)
    hidden, kept = (shown == TOKENIZER.mask_id).sum() / total, (shown == targets).sum() / total
    # A random token is the right one once in 59 times. 4 standard deviations of a share of 0.1 are 0.0027.
    assert abs(hidden - 0.8) < 4 * (0.16 / total) ** 0.5
    assert abs(kept - (0.1 + 0.1 / 59)) < 4 * (0.09 / total) ** 0.5
    random_tokens = shown[(shown != TOKENIZER.mask_id) & (shown != targets)]
    counts = torch.bincount(random_tokens, minlength=64).double()
    assert counts[:5].sum() == 0
    expected = counts[5:].sum() / 59
    assert ((counts[5:] - expected) ** 2 / expected).sum() < 100  # 58 degrees of freedom
    # What is done to a position does not depend on where it is: chi-square per row half.
    first_half = masked.positions < LENGTH // 2
    replaced = torch.gather(masked.input_ids, 1, masked.positions) == TOKENIZER.mask_id
    assert abs(replaced[first_half].double().mean() - replaced[~first_half].double().mean()) < 0.01


def test_smoothing_draws_by_frequency_without_replacement() -> None:
    rows, length = 40_000, 16
    histogram = np.full(64, 1000)
    histogram[5:10] = [1, 10, 100, 1000, 100_000]
    ids = torch.full((rows, length), 20, dtype=torch.int32)
    ids[:, 0], ids[:, -1] = TOKENIZER.cls_id, TOKENIZER.sep_id
    ids[:, 1:6] = torch.arange(5, 10)
    masker = Masker(TOKENIZER, length, 0, probability=0.25, histogram=histogram, smoothing=0.7)
    ours = masker(ids, torch.arange(rows), epoch=0).positions
    weights = torch.from_numpy(np.maximum(histogram, 1.0) ** -0.7)[ids[0].long()]
    weights[[0, -1]] = 0
    generator = torch.Generator().manual_seed(0)
    theirs = torch.multinomial(weights.expand(rows, -1), 4, replacement=False, generator=generator)
    share = [torch.bincount(p.flatten(), minlength=length) / rows for p in (ours, theirs)]
    assert torch.allclose(share[0], share[1], atol=4 * (2 * 0.25 / rows) ** 0.5)
    assert share[0][1] > 0.99 > 0.1 > share[0][5]
    assert not torch.allclose(share[0], share[0].roll(1), atol=0.1)


def test_smoothing_of_equal_counts_is_uniform() -> None:
    rows = 20_000
    ids = windows(rows, 16, special_share=0)
    masker = Masker(TOKENIZER, 16, 0, probability=0.25, histogram=np.full(64, 9))
    counts = torch.bincount(masker(ids, torch.arange(rows), 0).positions.flatten(), minlength=16)
    assert torch.allclose(counts[1:-1] / rows, torch.full((14,), 4 / 14), atol=4 * (0.2 / rows) ** 0.5)


def test_whole_words_are_masked_whole() -> None:
    rows = 2000
    continues = np.zeros(64, dtype=bool)
    continues[32:] = True
    ids = windows(rows)
    masked = Masker(TOKENIZER, LENGTH, 0, whole_word=continues)(ids, torch.arange(rows), epoch=0)
    check_promises(masked, ids, 10)
    chosen = torch.zeros(rows, LENGTH, dtype=torch.bool).scatter(1, masked.positions, masked.valid)
    cut_words = full_words = 0
    for row, picks in zip(ids.tolist(), chosen.tolist(), strict=True):
        words: list[list[int]] = []
        for position, token in enumerate(row):
            special = token < 5
            if special or not words or not continues[token] or row[position - 1] < 5:
                words.append([])
            if not special:
                words[-1].append(position)
        cut = 0
        for word in words:
            picked = [picks[position] for position in word]
            if any(picked) and not all(picked):
                cut += 1
                assert picked == sorted(picked, reverse=True)  # its first pieces
            full_words += bool(picked) and all(picked)
        assert cut <= 1  # the last word alone
        cut_words += cut
    assert 0 < cut_words < full_words / 5


def test_every_word_is_as_likely_whatever_its_length() -> None:
    rows, length = 30_000, 26
    continues = np.zeros(64, dtype=bool)
    continues[32:] = True
    ids = torch.full((rows, length), 10, dtype=torch.int32)
    ids[:, 5:11] = torch.tensor([10, 40, 40, 40, 40, 40])  # one word of six pieces among 18 of one
    ids[:, 0], ids[:, -1] = TOKENIZER.cls_id, TOKENIZER.sep_id
    masker = Masker(TOKENIZER, length, 0, probability=1 / 26, whole_word=continues)
    position = masker(ids, torch.arange(rows), epoch=0).positions
    share = torch.bincount(position.flatten(), minlength=length) / rows
    starts = [*range(1, 6), *range(11, 25)]
    assert torch.allclose(share[starts], torch.full((19,), 1 / 19), atol=0.006)
    assert share[6:11].sum() == 0


def test_what_follows_a_special_token_is_a_word_like_any_other() -> None:
    """The rest of a word that the window cuts; a document's first word in byte-level BPE. [CLS], which is in no shard,
    has the smallest count of all, and no part in it."""
    rows = 20_000
    continues, histogram = np.zeros(64, dtype=bool), np.full(64, 100_000)
    continues[32:] = True
    histogram[[TOKENIZER.cls_id, TOKENIZER.sep_id]] = 0, 1000
    ids = torch.full((rows, LENGTH), 10, dtype=torch.int32)
    ids[:, [0, 30, -1]] = torch.tensor(
        [TOKENIZER.cls_id, TOKENIZER.sep_id, TOKENIZER.sep_id], dtype=torch.int32
    )
    ids[:, [1, 31]] = 40
    masker = Masker(TOKENIZER, LENGTH, 0, whole_word=continues, histogram=histogram)
    share = torch.bincount(masker(ids, torch.arange(rows), 0).positions.flatten(), minlength=LENGTH) / rows
    assert torch.allclose(share[[1, 31, 20]], torch.full((3,), 10 / 61), atol=0.01)


def test_continuations_of_the_three_kinds_of_vocabulary() -> None:
    pieces = ["[CLS]", "##", "play", "##ing", "#"]
    assert continuation_table(pieces, [0]).tolist() == [False, False, False, True, False]
    assert continuation_table(["<s>", "Ġplay", "ing"], [0]).tolist() == [False, False, True]
    assert continuation_table(["<s>", "▁play", "ing"], [0]).tolist() == [False, False, True]
    # Ids without a piece continue nothing.
    assert continuation_table(["[CLS]", None, "##a", "b"], [0]).tolist() == [False, False, True, False]
    assert continuation_table(["<s>", None, "a", "Ġb"], [0]).tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match=r"masking\.whole_word is on, but .* turn it off"):
        continuation_table(["a", "b"], [0])


def test_what_cannot_be_masked_is_refused() -> None:
    for probability in (0.0, 0.01, 0.99):
        with pytest.raises(
            ValueError, match=r"masking\.probability .* choose a probability that gives 1 to 14"
        ):
            Masker(TOKENIZER, 16, 0, probability=probability)
    with pytest.raises(ValueError, match=r"at most 65535"):
        Masker(TOKENIZER, 1 << 16, 0)


def test_a_large_vocabulary_is_drawn_from_to_its_end() -> None:
    size = 250_002
    tokenizer = TokenizerInfo("large", size, 1, 3, 0, 2, size - 1, (0, 1, 2, 3, size - 1))
    ids = torch.full((4000, 128), 9, dtype=torch.int32)
    masked = Masker(tokenizer, 128, 0, probability=0.9)(ids, torch.arange(4000), epoch=0)
    shown = masked.input_ids[(masked.input_ids != 9) & (masked.input_ids != size - 1)]
    assert len(shown) > 40_000
    assert 4 <= shown.min() < 50
    assert size - 50 < shown.max() <= size - 2
    assert abs(shown.double().mean() / size - 0.5) < 0.006


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_the_same_masks_without_waiting() -> None:
    ids, numbers = windows(64), torch.arange(64)
    for options in ({}, {"whole_word": np.arange(64) > 31}, {"histogram": np.arange(64) ** 2}):
        masker = Masker(TOKENIZER, LENGTH, 5, **options)
        on_cpu = masker(ids, numbers, 1)
        device_ids, device_numbers = ids.cuda(), numbers.cuda()
        masker(device_ids, device_numbers, 0)  # copies the tables
        torch.cuda.set_sync_debug_mode("error")
        try:
            on_gpu = masker(device_ids, device_numbers, 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert same(
            on_cpu, MaskedBatch(*(getattr(on_gpu, name).cpu() for name in on_gpu.__dataclass_fields__))
        )
