"""Before any training: do all ranks see the same configuration, shards, code and packages?"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from data_prep.shard_format.manifest import Manifest
from train.config import Config
from train.distributed.world import World
from train.errors import UserError
from train.run_folder import flatten, provenance

Result = TypeVar("Result")


def manifest_digest(shards: str) -> str:
    """Digest of the shards' manifest; "unreadable" where there is none, of which assembling says more."""
    try:
        return Manifest.load(shards).digest()
    except (OSError, ValueError):
        return "unreadable"


def start_up_facts(config: Config, shards_digest: str) -> dict[str, str]:
    """What must be the same on every rank, by name.

    Args:
        shards_digest: as `manifest_digest` gives it.
    """
    return {
        **{key: json.dumps(value) for key, value in flatten(dataclasses.asdict(config)).items()},
        f"manifest of {config.data.shards}": shards_digest,
        **provenance(),
    }


def refuse_differences(facts: dict[str, str], world: World) -> None:
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
    """Do something on rank 0 alone; a user's error there is raised on every rank, so that none is left waiting.

    Raises:
        OSError: the machine is at fault (a full disk). ValueError: everything else.
    """
    result: Result | None = None
    fault: list[ValueError | OSError | None] = [None]
    if world.is_first:
        try:
            result = action()
        except (ValueError, OSError) as error:
            # An OSError of no class of its own is no wrong path: full disk, too many files, faulty device.
            fault = [OSError(str(error)) if type(error) is OSError else ValueError(str(error))]
    dist.broadcast_object_list(fault)
    if fault[0] is not None:
        raise fault[0]
    return result


def as_on_first_rank(value: Result) -> Result:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _short(value: str | None) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
