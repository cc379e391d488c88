"""JSON files of figures that one command writes and another shows: scores, an ablation, a study, measured speeds."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep.shard_format.files import read_file
from train.errors import UserError


class Figures(BaseModel):
    """Of a JSON file: numbers are finite numbers, and keys that no table needs are passed over."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


Kind = TypeVar("Kind", bound=Figures)


def read_figures(path: Path, kind: type[Kind]) -> Kind:
    """A checked JSON file; the first thing that is wrong with it becomes a UserError that names the file."""
    try:
        return kind.model_validate_json(read_file(path))
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except ValidationError as invalid:
        error = invalid.errors()[0]
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        raise UserError(f"{path}: lacks {where!r}; make it again with this version")
    if error["type"].startswith(("float_", "int_", "finite_")):
        raise UserError(f"{path}: {where} is {error['input']!r}, no number; score or measure it again")
    raise UserError(f"{path}: is not such a file ({where}: {error['msg']}); make it again")
