"""DeepSpeed's own judgement of its JSON, asked for before any model is loaded, in one line that names the field."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic

from train.distributed.world import import_deepspeed
from train.errors import UserError, one_line


def check_engine_config(engine_config: Mapping[str, Any], source: str | Path | None = None) -> None:
    """Raise what DeepSpeed's configuration class refuses.

    Args:
        engine_config: as resolve_engine_config makes it.
        source: the JSON's file, to be named.
    Raises:
        UserError: names the field without which DeepSpeed would say something else.
    """
    refusal = _refusal(engine_config)
    if refusal is None:
        return
    where = f"deepspeed.config={str(source)!r}" if source else "deepspeed.config"
    for path in sorted(_paths(engine_config), key=len, reverse=True):
        if _refusal(_without(engine_config, path)) != refusal:
            raise UserError(
                f"{where}: DeepSpeed refuses {'.'.join(path)}={_value(engine_config, path)!r}: {refusal}; correct it, "
                "or leave it out"
            )
    raise UserError(f"{where}: DeepSpeed refuses it: {refusal}; see ds_configs/ for JSONs that work")


def _refusal(engine_config: Mapping[str, Any]) -> str | None:
    """What DeepSpeed says; None where it takes the configuration."""
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig  # slow

    config = copy.deepcopy(dict(engine_config))
    config.pop("train_batch_size", None)  # the doctor asks for another number of ranks than there are here
    logger = logging.getLogger("DeepSpeed")
    before, logger.disabled = logger.disabled, True  # what it remarks comes again when the engine starts
    try:
        DeepSpeedConfig(config)
    except pydantic.ValidationError as error:
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    except Exception as error:  # it reads most values as they come: whatever that raises is about a value
        return one_line(error) if isinstance(error, (ValueError, AssertionError)) else repr(error)[:300]
    finally:
        logger.disabled = before
    return None


def _paths(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            yield from _paths(item, (*path, key))


def _without(engine_config: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    config = copy.deepcopy(dict(engine_config))
    del _value(config, path[:-1])[path[-1]]
    return config


def _value(value: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        value = value[key]
    return value
