"""Before any training: do all ranks see the same configuration, shards, code and packages?"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from train.config import Config
from train.distributed.world import World
from train.errors import BAD_USAGE, ReportedElsewhereError, RunError, UserError, exit_code
from train.run_folder import flatten, provenance

Result = TypeVar("Result")


def start_up_facts(config: Config, corpus: Mapping[str, str]) -> dict[str, str]:
    """What must be the same on every rank, by name; `corpus`: the digests of train/data/corpus.py."""
    return {
        **{key: json.dumps(value) for key, value in flatten(dataclasses.asdict(config)).items()},
        **{f"{name} in {config.data.shards}": digest for name, digest in corpus.items()},
        **provenance(),
    }


def check_same_on_all_ranks(facts: dict[str, str], world: World) -> None:
    """UserError on every rank where a fact differs from rank 0's; names facts, ranks and hosts."""
    gathered: list[Any] = [None] * world.world_size
    dist.all_gather_object(gathered, {"host": platform.node(), "facts": facts})
    first = gathered[0]["facts"]
    differences = [
        f"{name}: rank {rank} on {other['host']} has {_short(other['facts'].get(name))}, "
        f"rank 0 has {_short(first[name])}"
        for rank, other in enumerate(gathered)
        for name in first
        if other["facts"].get(name) != first[name]
    ]
    if differences:
        raise UserError(
            "the ranks differ, and would train something that nobody asked for; make them equal:\n  "
            + "\n  ".join(differences[:10])
        )


def on_first_rank(world: World, action: Callable[[], Result]) -> Result | None:
    """Do something on rank 0 alone; None elsewhere.

    Raises:
        What `action` raises on rank 0; ReportedElsewhereError on the others, so that none is left waiting.
    """
    if not world.is_first:
        failure = as_on_first_rank(None)
        if failure is not None:
            raise ReportedElsewhereError from failure
        return None
    try:
        result = action()
    except Exception as error:
        # Not the error itself: those of libraries cannot all be pickled.
        of_user = exit_code(error) == BAD_USAGE
        as_on_first_rank(UserError(str(error)) if of_user else RunError(str(error)))
        raise
    as_on_first_rank(None)
    return result


def from_first_rank(world: World, action: Callable[[], Result]) -> Result:
    """What an action gives on rank 0, on every rank; a fault there ends all, as `on_first_rank` says."""
    return as_on_first_rank(on_first_rank(world, action))  # type: ignore[return-value]


def as_on_first_rank(value: Result) -> Result:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _short(value: str | None) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
