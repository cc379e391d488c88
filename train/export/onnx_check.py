"""ONNX Runtime on the CPU, and how far a file's outputs are from torch's."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from data_prep.shard_format.required_packages import install_command
from train.errors import UserError, one_line
from train.models.heads import SEQUENCE, head_of, longest_sequence, random_inputs

# Outputs may differ by this share of the largest of them: fp32 sums in another order. 1e-6 is usual.
TOLERANCE = 1e-4
ERRORS = 3
"""ONNX Runtime's level of log that leaves warnings out."""


@dataclass(frozen=True)
class Check:
    """How far an ONNX file's outputs are from what it was made of."""

    largest: float
    """Largest absolute difference of an output, padding left out."""
    mean: float
    spread: float
    """Standard deviation of the outputs that were compared with."""
    scale: float
    """The largest of them, absolute."""
    top1: float | None
    """Share of rows (or tokens) with the same largest output; None where there is but one."""
    inputs: str
    """What was put in, in words."""


def require_onnx() -> None:
    """UserError with the pip command where onnx or ONNX Runtime is not installed."""
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}, not installed here: {install_command('onnx')}")


def open_session(path: Path) -> Any:
    """An ONNX Runtime session on the CPU, of torch's number of threads."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(ERRORS)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = ERRORS
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_session(session: Any, inputs: Mapping[str, torch.Tensor]) -> list[np.ndarray]:
    """The outputs of one batch, in the file's order; UserError where ONNX Runtime cannot run it on this shape."""
    try:
        return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    except Exception as error:  # its exceptions have no base class of their own
        shape = " x ".join(map(str, inputs["input_ids"].shape))
        raise UserError(f"ONNX Runtime cannot run the file at {shape} tokens: {one_line(error)}") from None


def compare(
    model: PreTrainedModel, session: Any, batches: Sequence[Mapping[str, torch.Tensor]], words: str
) -> Check:
    """Outputs of `session` beside those of `model` in torch, on the same batches; padding is left out."""
    outputs = head_of(model).outputs
    differences, references, agreed = [], [], []
    for inputs in batches:
        with torch.inference_mode():
            ours = model(**inputs, return_dict=True)
        kept = inputs["attention_mask"].bool()
        same = []
        for (name, axes), theirs in zip(outputs.items(), run_session(session, inputs), strict=True):
            reference, found = ours[name].float(), torch.from_numpy(theirs)
            if found.shape != reference.shape:
                raise UserError(
                    f"{name} has shape {tuple(found.shape)} in ONNX, {tuple(reference.shape)} in torch"
                )
            if SEQUENCE in axes and reference.dim() == 2:  # spans: the position is the choice
                same.append(
                    reference.masked_fill(~kept, -1e4).argmax(-1) == found.masked_fill(~kept, -1e4).argmax(-1)
                )
            if SEQUENCE in axes:
                reference, found = reference[kept], found[kept]
            if reference.dim() == 2:
                same.append(reference.argmax(-1) == found.argmax(-1))
            differences.append((found - reference).abs().flatten())
            references.append(reference.flatten())
        agreed.append(torch.stack(same).all(0))
    difference, reference = torch.cat(differences), torch.cat(references)
    has_choice = head_of(model).task != "feature-extraction" and getattr(model.config, "num_labels", 2) != 1
    return Check(
        largest=float(difference.max()),
        mean=float(difference.mean()),
        spread=float(reference.std(correction=0)),
        scale=float(reference.abs().max()),
        top1=float(torch.cat(agreed).float().mean()) if has_choice else None,
        inputs=words,
    )


def check_fp32(model: PreTrainedModel, path: Path) -> Check:
    """Compare a traced file with torch on shapes other than the traced one, one token to the longest, with padding.

    Raises:
        UserError: some output differs by more than rounding.
    """
    longest = longest_sequence(model)
    shapes = [(1, 1), (1, 2), (3, min(17, longest)), (2, max(1, longest // 2)), (1, longest)]
    batches = [random_inputs(model, *shape, seed=number + 1) for number, shape in enumerate(shapes)]
    words = f"{len(shapes)} shapes up to {longest} tokens, with and without padding"
    found = compare(model, open_session(path), batches, words)
    if not found.largest <= TOLERANCE * max(0.1, found.scale):
        raise UserError(
            f"the ONNX file's outputs differ from torch's by {found.largest:g} on {words}: torch "
            f"{torch.__version__} does not trace {type(model).__name__} rightly; nothing was written"
        )
    return found
