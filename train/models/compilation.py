"""A model's layers through torch.compile: they share compiled functions, made once and not for each of them."""

from __future__ import annotations

import os
import shutil

import torch
from transformers import PreTrainedModel

from train.errors import UserError
from train.models.families import family_of

VARIANTS = 64
"""Of the function that all layers share: kinds of layer (whole, recorded, skipped), training or not, shapes. What comes
after torch's own limit of 8 stays uncompiled."""


def require_compiler(option: str, device: str) -> None:
    """UserError for an option that needs a C++ compiler where there is none; a GPU's code comes from Triton."""
    compiler = os.environ.get("CXX", "g++")
    if device == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"{option}=true: on a CPU torch.compile needs a C++ compiler, and {compiler} is not found; "
            "install it (Debian: apt-get install g++), or leave the option out"
        )


def compile_layers(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, its layers compiled when they first run; parameters and their names stay as they are.

    Each shape has code of its own, so that a resumed run computes what the undisturbed one did.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for layer in family_of(model).layer_list(model):
        layer.compile(dynamic=False)
    return model
