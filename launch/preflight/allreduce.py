"""One rank of launch/doctor.py's all-reduce: is the sum right, and how fast does it come?

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT and DOCTOR_BACKEND are set. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist

REPEATS = 5


def main() -> None:
    backend = os.environ["DOCTOR_BACKEND"]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
        _choose_interface()
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    elements = 64 * 2**20 if backend == "nccl" else 4 * 2**20
    numbers = torch.arange(elements, device=device) % 97
    expected = (numbers * world_size + world_size * (world_size - 1) // 2).float()
    seconds, right = [], True
    for _ in range(REPEATS + 1):
        values = (numbers + rank).float()
        dist.barrier()
        _wait(device)
        start = time.perf_counter()
        dist.all_reduce(values)
        _wait(device)
        seconds.append(time.perf_counter() - start)
        right = right and torch.equal(values, expected)
    middle = sorted(seconds[1:])[REPEATS // 2]
    sent = 2 * (world_size - 1) / world_size * elements * 4
    result = {"right": right, "gb_per_s": sent / middle / 1e9, "megabytes": elements * 4 / 1e6}
    print(json.dumps(result), flush=True)
    dist.destroy_process_group()


def _choose_interface() -> None:
    """The one towards rank 0, as a run does (train/distributed/world.py): gloo's own choice is often 127.0.1.1."""
    from train.distributed.rendezvous import LOOPBACK, interface_towards

    address = os.environ["MASTER_ADDR"]
    if (
        address != LOOPBACK
        and "GLOO_SOCKET_IFNAME" not in os.environ
        and (name := interface_towards(address))
    ):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
