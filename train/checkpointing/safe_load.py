"""torch.load that runs no code of the file, also where DeepSpeed calls it.

A pickle may name any function and have it called. DeepSpeed reads its checkpoints with `weights_only=False`; torch's
own switch overrules that, so that nothing is read twice, and nothing can change between a check and a load.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, EnumMeta
from pathlib import Path
from typing import Any

import torch

from train.errors import UserError, one_line, refused_pickle

ON, OFF = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""torch.load's switches, environment variables: processes that are started inside read them too."""


@contextmanager
def weights_only(source: Path) -> Iterator[None]:
    """Within, every torch.load of this process builds tensors, plain values and the engine's own types, and no more.

    Args:
        source: the checkpoint that is read, for the message.
    Raises:
        UserError: a file names anything else, or torch cannot read it.
    """
    before = {name: os.environ.pop(name, None) for name in (ON, OFF)}
    os.environ[ON] = "1"
    try:
        with torch.serialization.safe_globals(engine_types()):
            yield
    except (pickle.UnpicklingError, RuntimeError) as error:
        if (refusal := refused_pickle(error)) is not None:
            raise UserError(f"{source} {refusal}") from None
        if "PytorchStreamReader" in str(error):
            raise UserError(
                f"{source} is damaged ({one_line(error, 200)}); remove it to go on from the one before"
            ) from None
        raise
    finally:
        del os.environ[ON]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def engine_types() -> list[Any]:
    """What DeepSpeed pickles beside tensors; all of them hold plain values."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # Python 3.11.0 to 3.11.3 pickle a member of an enumeration as getattr(class, name).
    members = [(_member, f"{module}.getattr") for module in ("builtins", "__builtin__")]
    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, *members]


def _member(enumeration: Any, name: Any) -> Enum:
    """What getattr gives where it names a member of an enumeration, and nothing else."""
    if not isinstance(enumeration, EnumMeta) or name not in enumeration.__members__:
        raise pickle.UnpicklingError("GLOBAL getattr of something else")
    return enumeration.__members__[name]
