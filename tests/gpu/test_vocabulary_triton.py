"""The Triton kernel of the losses over the vocabulary against torch operations in fp64, on a GPU.

Without one, on a CPU in Triton's interpreter:
`TRITON_INTERPRET=1 python -m pytest tests/gpu/test_vocabulary_triton.py`.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.unit.objective.given import random_decoder, selected
from train.models.families import DecoderInputs
from train.objective import fused_loss
from train.objective.chunk_terms import Chunk, VocabularyWeights, Workspace, chunk_terms
from train.objective.token_selection import SelectedTokens

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from train.objective.vocabulary_triton import deviation, triton_chunk_terms  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = 6


def moved(decoder: DecoderInputs, dtype: torch.dtype) -> DecoderInputs:
    parts = (decoder.features, decoder.weight, decoder.bias)
    return DecoderInputs(*(None if part is None else part.to(DEVICE, dtype) for part in parts))


def both(
    decoders: list[DecoderInputs], tokens: SelectedTokens, weights: VocabularyWeights, dtype: torch.dtype
) -> Any:
    """(gradient, values) of the kernel on fp32 logits, its gradient in `dtype`, and of torch operations in fp64."""
    found = []
    for precision, terms in ((torch.float32, triton_chunk_terms), (torch.float64, chunk_terms)):
        student, *teachers = (moved(decoder, precision) for decoder in decoders)
        order, *of_tokens = (tokens.order, tokens.row_weights, tokens.targets, tokens.target_weights)
        floats = [
            part.to(DEVICE, precision if part.is_floating_point() else part.dtype) for part in of_tokens
        ]
        chunk = Chunk(
            student, tuple(teachers), SelectedTokens(order, *floats), weights, Workspace(), precision, dtype
        )
        values = torch.zeros(4, device=DEVICE, dtype=precision)
        found.append((terms(chunk, values).double(), values.double()))
    return found


@pytest.mark.parametrize("vocabulary", [1, 50, 2047, 2049, 5000])
@pytest.mark.parametrize(
    ("weights", "taught", "targets"),
    [
        (VocabularyWeights(2.0, kd=5.0, mlm=2.0), True, 3),
        (VocabularyWeights(2.0, kd=5.0, mlm=0.0), True, 0),
        (VocabularyWeights(0.5, kd=0.3, mlm=1.0, mse=0.2), True, ROWS),
        (VocabularyWeights(1.0, kd=0.0, mlm=1.0), False, ROWS),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(
    vocabulary: int, weights: VocabularyWeights, taught: bool, targets: int, bias: bool
) -> None:
    """fp32: some 30 roundings of numbers of up to 40, the largest logits here."""
    generator = torch.Generator().manual_seed(vocabulary)
    decoders = [random_decoder((ROWS, vocabulary, 8), generator, has) for has in (bias, True)][: 1 + taught]
    row_weights = torch.rand(ROWS, generator=generator)
    row_weights[-1] = 0.0
    chosen = torch.randint(vocabulary, (targets,), generator=generator)
    tokens = selected(row_weights, chosen, torch.rand(targets, generator=generator))
    (gradient, values), (expected, wanted) = both(decoders, tokens, weights, torch.float32)
    assert (values - wanted).abs().max() <= 1e-4 * max(1.0, float(wanted.abs().max()))
    assert (gradient - expected).abs().max() <= 1e-4 * max(1e-3, float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_the_format_of_the_products(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    decoders = [random_decoder((ROWS, 301, 8), generator, True) for _ in range(2)]
    tokens = selected(torch.ones(ROWS), [3, 300], [1.0, 0.5])
    (gradient, _), (expected, _) = both(decoders, tokens, VocabularyWeights(2.0, kd=5.0, mlm=2.0), dtype)
    assert (gradient - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


def test_agreement_where_models_are_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = random_decoder((40, 3000, 8), generator, True)
    noise = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    student = replace(teacher, features=teacher.features + 0.5 * noise)
    weights = VocabularyWeights(2.0, kd=1.0, mlm=0.0)
    (_, values), (_, wanted) = both([student, teacher], selected(torch.ones(40)), weights, torch.float32)
    assert 5 < values[3] < 35
    assert values[3] == wanted[3]


def test_what_is_no_number_stays_so() -> None:
    generator = torch.Generator().manual_seed(0)
    decoders = [random_decoder((ROWS, 301, 8), generator, True) for _ in range(2)]
    features = decoders[0].features.clone()
    features[2, 1] = math.nan
    decoders[0] = replace(decoders[0], features=features)
    (gradient, values), _ = both(
        decoders, selected(torch.ones(ROWS)), VocabularyWeights(2.0, 1.0, 0.0), torch.float32
    )
    assert values[0].isnan()
    assert gradient[2].isnan().any()
    assert gradient[[0, 1, 3, 4, 5]].isfinite().all()


def test_it_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried at first use; torch operations, and one remark, where it differs."""
    assert deviation(DEVICE) < 1e-5
    if DEVICE.type == "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert fused_loss.fastest_terms.__wrapped__(DEVICE, torch.float32) is triton_chunk_terms
        monkeypatch.setattr(fused_loss, "TRITON_DEVIATION", 0.0)
        with pytest.warns(UserWarning, match="its results differ from theirs by"):
            assert fused_loss.fastest_terms.__wrapped__(DEVICE, torch.float32) is chunk_terms
