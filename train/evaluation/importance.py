"""How much each hidden dimension, head and feed-forward unit of a model carries: measured on training windows.

It decides what a narrower student keeps (train/models/narrowing.py).
"""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from data_prep.shard_format.manifest import Manifest
from train.config import Config
from train.data.loader import BatchLoader
from train.data.order import windows_per_shard
from train.distributed.consistency import from_first_rank
from train.distributed.world import World
from train.models.families import Family
from train.models.narrowing import Importance
from train.models.teacher import running_copy

NUM_WINDOWS = 256
BATCH = 16


def importance_from_first_rank(
    config: Config, manifest: Manifest, world: World, family: Family, model: PreTrainedModel
) -> Importance:
    """Measured on the first rank and the same on all: the last bits of another machine's could keep something else."""
    return from_first_rank(world, lambda: importance(config, manifest, world.device, family, model))


def importance(
    config: Config, manifest: Manifest, device: str, family: Family, model: PreTrainedModel
) -> Importance:
    """What each part of a model carries on the recipe's first training windows; see `measure`."""
    return measure(family, model, sample_windows(config, manifest), device)


def sample_windows(config: Config, manifest: Manifest, count: int = NUM_WINDOWS) -> torch.Tensor:
    """(at most `count`, sequence_length) int32: the first training windows of the seed's order, as one lane reads them.

    Documents lie in random order, so that one shard or few, which hold them, are a sample of the corpus.
    """
    length = config.data.sequence_length
    there = sum(windows_per_shard([shard.tokens for shard in manifest.splits["train"]], length))
    loader = BatchLoader(
        config.data.shards,
        manifest,
        sequence_length=length,
        global_batch_size=min(count, there),
        micro_batch_size=min(count, there),
        seed=config.data.seed,
        lanes=1,
        cache_dir=config.data.cache_dir,
        check_at_start=False,
    )
    (batch,) = loader.batches(0, 1)
    return batch.input_ids


@torch.inference_mode()
def measure(family: Family, model: PreTrainedModel, input_ids: torch.Tensor, device: str) -> Importance:
    """What each part of a model carries on a text (Minitron, Muralidharan et al. 2024, arXiv:2407.14679, section 2.2).

    A hidden dimension counts with its mean absolute value, summed over the embeddings' and all layers' outputs; a
    value's dimension and a feed-forward unit with the mean square of what it adds to the residual stream; a
    dimension of queries and keys with the mean squares of both, multiplied.

    Args:
        model: fp32, on the CPU.
        input_ids: (windows, L) int, nothing padded.
        device: where it is run, in fp32.
    """
    running = running_copy(model, device, torch.float32)
    was_training = running.training
    running.eval()
    sums: dict[tuple[str, int], torch.Tensor] = {}

    # Of the input as a pre-hook, of the output as a hook.
    def add(
        name: str, layer: int, module: nn.Module, inputs: Any, output: torch.Tensor | None = None
    ) -> None:
        vectors = inputs[0] if output is None else output
        total = vectors.flatten(0, -2).square().sum(0, dtype=torch.float64)
        sums[name, layer] = sums.get((name, layer), 0) + total

    hooks = []
    layers = family.layer_list(running)
    outputs = {"values": family.attention_output, "units": family.feed_forward[1]}
    for index, layer in enumerate(layers):
        for name, path in outputs.items():
            hooks.append(attrgetter(path)(layer).register_forward_pre_hook(partial(add, name, index)))
        for path in family.projections:
            hooks.append(attrgetter(path)(layer).register_forward_hook(partial(add, path, index)))
    hidden: Any = 0
    for batch in input_ids.split(BATCH):
        encoded = family.encode(running, batch.to(device).long(), output_hidden_states=True)
        for states in encoded.hidden_states:
            hidden = hidden + states.flatten(0, -2).abs().sum(0, dtype=torch.float64)
    for hook in hooks:
        hook.remove()
    running.train(was_training)

    def per_layer(name: str) -> np.ndarray:
        return torch.stack([sums[name, index] for index in range(len(layers))]).cpu().numpy()

    def added(name: str) -> np.ndarray:
        weights = [attrgetter(outputs[name])(layer).weight for layer in layers]
        lengths = torch.stack([weight.square().sum(0, dtype=torch.float64) for weight in weights])
        return per_layer(name) * lengths.cpu().numpy()

    values = added("values")
    # One map to queries, keys and values keeps its heads whole, which the values choose.
    fused = len(family.projections) == 1
    queries = values if fused else per_layer(family.projections[0]) * per_layer(family.projections[1])
    return Importance(hidden.cpu().numpy(), queries, values, added("units"))
