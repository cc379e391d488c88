"""Time and money of a run: FLOPs over a matrix rate, bytes over links. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from launch.planner.models import PlannedModel, published_model
from train.engine_config import EngineSettings
from train.models.flops import FlopsPerToken, shape_of, training_flops_per_token

DEFAULT_MFU = 0.30
"""Model FLOPs over the datasheet's dense rate. An assumption: models of BERT-base's width with PyTorch's own
kernels reach a quarter to two fifths on V100 and A100; faster GPUs reach less with so narrow matrices. Measure
100 steps of your own and give their `mfu` (metrics.jsonl counts it against the rate that the GPU really reached
in a square product, which is below the datasheet's)."""
DEFAULT_INTER_NODE_GB_PER_S = 25.0
"""One port of 200 Gb/s InfiniBand per node (HDR), nominal."""
COLLECTIVE_LATENCY_S = 20e-6
"""Of one collective, times log2 of the ranks: an assumption of the order that nccl-tests show for small sizes."""
BACKWARD_SHARE = 2 / 3
"""Of the student's time: two of its three forward passes' worth."""


@dataclass(frozen=True)
class Traffic:
    """What one GPU sends (and receives) in one optimizer step, bytes; ring algorithms."""

    gradients_per_reduction: float
    reductions: int
    """ZeRO-2 reduces in every micro step, ZeRO-1 once."""
    weights: float

    @property
    def per_step(self) -> float:
        return self.gradients_per_reduction * self.reductions + self.weights

    @property
    def reduced_once(self) -> float:
        """What a step sends where gradients are reduced once, as at stage 1."""
        return self.gradients_per_reduction + self.weights


def traffic(student: PlannedModel, engine: EngineSettings, world_size: int, accumulation: int) -> Traffic:
    """DeepSpeed all-reduces whole buckets also at stage 2 (use_multi_rank_bucket_allreduce), then keeps a slice."""
    size = student.parameters * engine.bytes_per_element
    ring = (world_size - 1) / world_size
    return Traffic(2 * ring * size, accumulation if engine.stage == 2 else 1, ring * size)


@dataclass(frozen=True)
class Machines:
    """What the run is planned for."""

    nodes: int
    gpus_per_node: int
    tflops: float
    """Dense matrix rate of one GPU, 1e12 FLOP/s."""
    intra_gb_per_s: float
    """Rate of all-reduces inside a node, one direction, per GPU."""
    inter_gb_per_s: float
    """Rate at which one node sends to others, all its ports together."""
    mfu: float

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def slowest_link(self) -> float:
        """Bytes/s that bound a ring over all GPUs; infinite for one GPU."""
        if self.world_size == 1:
            return math.inf
        inside = self.intra_gb_per_s if self.gpus_per_node > 1 else math.inf
        between = self.inter_gb_per_s if self.nodes > 1 else math.inf
        return min(inside, between) * 1e9


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
    communication: float
    """All of it, hidden or not."""
    exposed: float
    """What is not hidden behind the student's backward passes."""

    @property
    def total(self) -> float:
        return self.compute + self.exposed


def step_time(
    flops: FlopsPerToken,
    sent: Traffic,
    machines: Machines,
    engine: EngineSettings,
    *,
    tokens_per_gpu: float,
    num_buckets: int,
) -> StepTime:
    """Time of a step in which every GPU passes `tokens_per_gpu` tokens through the models.

    Args:
        num_buckets: collectives of one reduction.
    """
    rate = machines.mfu * machines.tflops * 1e12
    compute = tokens_per_gpu * flops.total / rate
    if machines.world_size == 1:
        return StepTime(compute, 0.0, 0.0)
    latency = COLLECTIVE_LATENCY_S * math.log2(machines.world_size)
    reduction = sent.gradients_per_reduction / machines.slowest_link + num_buckets * latency
    gather = sent.weights / machines.slowest_link + latency
    hideable = 0.0
    if engine.overlap:
        hideable = BACKWARD_SHARE * tokens_per_gpu * flops.student / rate / sent.reductions
    exposed = sent.reductions * max(0.0, reduction - hideable) + gather
    return StepTime(compute, sent.reductions * reduction + gather, exposed)


@dataclass(frozen=True)
class PublishedRun:
    """A training run that others published."""

    name: str
    shape: str
    """Name in the table of published shapes; of the student where there is a teacher."""
    teacher: str | None
    phases: tuple[tuple[float, int], ...]
    """(tokens, sequence length) of each phase."""
    gpu_hours: float | None
    """On V100, as published; None where none were."""
    gpu_gib: int
    """Nominal memory of these V100."""
    source: str
    hours_of_phases: bool = True
    """Whether the hours are those of these phases; where others' hours stand beside them, no MFU follows."""

    @property
    def tokens(self) -> float:
        return sum(tokens for tokens, _ in self.phases)

    @property
    def flops(self) -> float:
        """Matrix products of the whole run, counted as for our own: masked positions are decoded, and all of them
        where a teacher's soft targets are compared."""
        model = shape_of(published_model(self.shape))
        teachers = [shape_of(published_model(self.teacher))] if self.teacher else []
        soft: Literal["all", "none"] = "all" if teachers else "none"
        total = 0.0
        for tokens, length in self.phases:
            per_token = training_flops_per_token(model, teachers, length, round(0.15 * length), soft)
            total += tokens * per_token.total
        return total


PUBLISHED_CORPUS_TOKENS = 4.3e9
"""English Wikipedia and the Toronto Book Corpus: 3,300M words (Devlin et al. 2019, section 3.1) at 1.3 pieces of a
word, our estimate; the corpus of the original DistilBERT too."""
_ROBERTA_LARGE = "RoBERTa-large, 100K steps"
PUBLISHED_RUNS = (
    PublishedRun(
        "BERT-base",
        "google-bert/bert-base-uncased",
        None,
        ((900_000 * 256 * 128, 128), (100_000 * 256 * 512, 512)),
        64 * 79.2,
        32,
        # A DGX-2H has V100 of 32 GB.
        "steps: Devlin et al. 2019, A.2; hours: NVIDIA's own run, 4 DGX-2H, Strubell et al. 2019, 2.1 and table 3; "
        "no MFU, two runs",
        hours_of_phases=False,
    ),
    PublishedRun(
        _ROBERTA_LARGE,
        "FacebookAI/roberta-large",
        None,
        ((100_000 * 8192 * 512, 512),),
        1024 * 24.0,
        32,
        "1,024 V100 for about a day: Liu et al. 2019, section 5; what Sanh et al. 2019 compare with",
    ),
    PublishedRun(
        "RoBERTa-base, 500K steps",
        "FacebookAI/roberta-base",
        None,
        ((500_000 * 8192 * 512, 512),),
        None,
        32,
        "steps: Liu et al. 2019, table 9; no time published",
    ),
    PublishedRun(
        "DistilBERT, original",
        "distilbert/distilbert-base-uncased",
        "google-bert/bert-base-uncased",
        ((3 * PUBLISHED_CORPUS_TOKENS, 512),),
        8 * 90.0,
        16,
        "8 V100 for about 90 h: Sanh et al. 2019, section 3; 3 epochs: default of the original code",
    ),
)
REFERENCE_RUN = next(run for run in PUBLISHED_RUNS if run.name == _ROBERTA_LARGE)
