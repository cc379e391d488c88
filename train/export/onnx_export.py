"""A Hugging Face encoder as ONNX: traced, checked against torch with ONNX Runtime, and quantised to int8 if asked.

Inputs, outputs and axes are named as Hugging Face's optimum names them, so that its runtime classes and pipelines read
the files. torch's tracing exporter is used (dynamo=False): the newer one needs two more packages, takes ten times
as long and gives the same results.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from train.errors import UserError, one_line
from train.export.onnx_check import Check, check_fp32, compare, open_session, require_onnx
from train.models.encoder_config import write_length_limit
from train.models.heads import (
    BATCH,
    SEQUENCE,
    head_of,
    input_names,
    longest_sequence,
    random_inputs,
    text_inputs,
)
from train.models.loading import load_with_saved_head

FP32_NAME, INT8_NAME = "model.onnx", "model_int8.onnx"
OPSET = 17
CARD = "README.md"
# One ONNX file is a protobuf message, whose size is bounded.
MAX_BYTES = 2**31
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True)
class OnnxFile:
    """One file that was written and checked."""

    path: Path
    size: int
    """Bytes."""
    task: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    check: Check


class _Outputs(torch.nn.Module):
    """The model as a function of tensors alone: inputs in their order, the named outputs as a tuple."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, input_names(model), tuple(head_of(model).outputs)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(**dict(zip(self.inputs, tensors, strict=True)), return_dict=True)
        return tuple(output[name] for name in self.outputs)


def trace(model: PreTrainedModel, path: Path, fold_constants: bool = False) -> None:
    """Write the model as ONNX with dynamic batch and sequence axes.

    Args:
        fold_constants: keep weights as the products read them, which is what quantisation looks for. Without,
            a tied embedding stands in the file once, and ONNX Runtime folds when it loads.
    Raises:
        UserError: the model is too large for one file, or torch cannot trace it.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    if size >= MAX_BYTES:
        raise UserError(f"{size:,} bytes of weights: one ONNX file holds less than 2 GiB")
    wrapped, outputs = _Outputs(model).eval(), head_of(model).outputs
    inputs = random_inputs(model, 2, min(16, longest_sequence(model)), seed=0)
    axes = {name: {0: BATCH, 1: SEQUENCE} for name in inputs}
    axes |= {name: dict(enumerate(dynamic)) for name, dynamic in outputs.items()}
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                wrapped,
                tuple(inputs.values()),
                str(path),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes=axes,
                opset_version=OPSET,
                do_constant_folding=fold_constants,
                dynamo=False,
            )
    except Exception as error:  # operators without an ONNX form raise errors of many kinds
        raise UserError(
            f"torch {torch.__version__} cannot trace {type(model).__name__} for ONNX: {one_line(error)}"
        ) from None


def quantise(model: PreTrainedModel, path: Path) -> None:
    """Write the model with int8 weights, per output channel; activations are quantised as they come (dynamic).

    Weights take 7 of the 8 bits: without VNNI instructions two products of 8 bits are added in 16, which saturates.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folded = path.with_name(f".{path.name}.fp32")
    trace(model, folded, fold_constants=True)
    try:
        with _quiet():
            quantize_dynamic(folded, path, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
    finally:
        folded.unlink(missing_ok=True)


def export_onnx(
    folder: Path, out: Path, int8: bool = False, texts: Sequence[str] | None = None
) -> list[OnnxFile]:
    """Write OUT/model.onnx, and OUT/model_int8.onnx if asked, from a Hugging Face folder.

    Args:
        out: an existing folder; config.json, the model card and the tokenizer are copied beside the files where it
            lacks them.
        texts: sentences to measure int8 on; None takes random tokens.
    Returns:
        The files, each with how it differs from torch.
    Raises:
        UserError: packages are missing, the folder cannot be read, or ONNX Runtime's outputs are not torch's.
    """
    require_onnx()
    model = load_with_saved_head(folder)
    for name in ("config.json", CARD, *TOKENIZER_FILES):
        if (folder / name).exists() and not (out / name).exists():
            shutil.copyfile(folder / name, out / name)
    write_length_limit(out, model.config)
    trace(model, out / FP32_NAME)
    files = [_described(model, out / FP32_NAME, check_fp32(model, out / FP32_NAME))]
    if int8:
        quantise(model, out / INT8_NAME)
        length = min(64, longest_sequence(model))
        if texts:
            batches, words = text_inputs(model, folder, texts, 16), f"{len(texts)} sentences"
        else:
            batches = [random_inputs(model, 16, length, seed) for seed in range(4)]
            words = f"64 sequences of {length} random tokens"
        check = compare(model, open_session(out / INT8_NAME), batches, words)
        files.append(_described(model, out / INT8_NAME, check))
    return files


def _described(model: PreTrainedModel, path: Path, check: Check) -> OnnxFile:
    head = head_of(model)
    return OnnxFile(path, path.stat().st_size, head.task, input_names(model), tuple(head.outputs), check)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the remarks of torch's tracer and ONNX Runtime's quantiser; errors still come."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
