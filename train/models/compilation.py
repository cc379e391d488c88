"""A student's layers through torch.compile: they share one compiled function, made once and not for each of them."""

from __future__ import annotations

import os
import shutil

from transformers import PreTrainedModel

from train.errors import UserError
from train.models.families import family_of


def compile_layers(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """The model itself, its layers compiled when they first run; parameters and their names stay as they are.

    Raises:
        UserError: what a CPU runs must be compiled by a C++ compiler, and there is none.
    """
    compiler = os.environ.get("CXX", "g++")
    if device == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"model.student_compile=true: on a CPU torch.compile needs a C++ compiler, and {compiler} is not found; "
            "install it (Debian: apt-get install g++), or leave student_compile out"
        )
    for layer in family_of(model).layer_list(model):
        layer.compile()
    return model
