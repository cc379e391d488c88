"""The configuration tree: every number of a run, with its default, its unit and where it comes from.

Filled in this order: the defaults below (the published DistilBERT-base recipe, Sanh et al. 2019,
arXiv:1910.01108, with LAMB at 4,096 sequences) < `--config recipe.yaml` < `--section.key=value`. Values that
cannot work are refused here, before any model is loaded. What DeepSpeed's own JSON owns (ZeRO stage,
precision, buckets) is not repeated here: see train/engine_config.py.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from data_prep.shard_format.manifest import is_remote
from train.errors import UserError

MAX_LANES = 65_536
MAX_GLOBAL_BATCH_SIZE = 2**24
MAX_STEPS = 99_999_999
"""What step-NNNNNNNN can name."""
MAX_TIMEOUT_S = 10_000_000


def _require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise UserError(f"{name}={value!r}: {remedy}")


def _require_at_most(section: object, prefix: str, largest: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        numeric = isinstance(value, int | float)
        _require(not numeric or value <= largest, f"{prefix}.{name}", value, f"give at most {largest:,}")


def _require_positive(section: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _require(value is None or value > 0, f"{prefix}.{name}", value, "give a number above 0")


def _require_sane_number(number: object, name: str, value: object) -> None:
    """Beyond these, arithmetic overflows far from where it could be said why."""
    if isinstance(number, float):
        _require(math.isfinite(number), name, value, "give a finite number")
    elif isinstance(number, int):
        _require(abs(number) < 2**31, name, value, f"give at most {2**31 - 1:,}")


@dataclass(frozen=True)
class ModelConfig:
    """Who teaches and who learns."""

    teacher: str | list[str] | None = "google-bert/bert-base-uncased"
    """Hugging Face folder or hub name of the frozen teacher; a list makes an ensemble, whose tempered
    probabilities are averaged; null trains `scratch`, or `start_from` on, by masked-language modelling alone. A folder
    without an MLM head does where no term predicts tokens (kd_weight, mlm_weight and mse_weight 0)."""

    teacher_weights: list[float] | None = None
    """Weight of each teacher of an ensemble (they are normalised to sum to 1); null: equal weights."""

    teacher_dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """Number format of the teacher's weights and activations; auto: fp16 on a GPU, fp32 on a CPU."""

    teacher_compile: bool = False
    """Pass the teacher's encoder through torch.compile."""

    student_layers: int | None = None
    """Layers of the student; null: half the teacher's."""

    layer_map: Literal["every_other", "distilbert", "random"] | list[int] = "distilbert"
    """Which teacher layers the student starts from: every other one, the original code's 0,2,4,7,9,11, an
    explicit list of teacher layers, or random weights in the teacher's shapes."""

    student_width: int | None = None
    """Hidden width of the student; null: the teacher's. A student narrower than its teacher inherits the hidden
    dimensions, heads and feed-forward units that carry most on 256 training windows (Minitron, Muralidharan et al.
    2024, arXiv:2407.14679), unless layer_map is random."""

    student_heads: int | None = None
    """Attention heads of the student, which its width is divided into; null: as many as keep the teacher's head
    width. Smaller heads inherit the dimensions that carry most; rotated ones (ModernBERT) stay whole."""

    student_feed_forward: int | None = None
    """Feed-forward units of each of the student's layers; null: the teacher's, in proportion to the width."""

    start_from: str | None = None
    """Hugging Face folder or hub name of a model that is trained on, whole, by masked-language modelling
    (model.teacher=null): a teacher for a corpus of its own."""

    new_head: bool = False
    """Put a new MLM head on a `start_from` that has none: random from data.seed, its decoder tied to the embeddings."""

    scratch: dict[str, Any] | None = None
    """Configuration of a model trained without a teacher: {model_type: bert, hidden_size: 256, ...}, keys as
    in that model's Hugging Face config; vocabulary and special ids come from the shards."""

    def __post_init__(self) -> None:
        sizes = ("student_layers", "student_width", "student_heads", "student_feed_forward")
        _require_positive(self, "model", *sizes)
        _require(self.teacher != [], "model.teacher", self.teacher, "name at least one teacher, or null")
        if self.teacher is None:
            _require(
                self.start_from is not None or (self.scratch is not None and "model_type" in self.scratch),
                "model.scratch",
                self.scratch,
                "with model.teacher=null say what to train, for example {model_type: bert, hidden_size: 256}, or give "
                "model.start_from",
            )
            _require(
                self.start_from is None or self.scratch is None,
                "model.scratch",
                self.scratch,
                "has no effect beside model.start_from; remove one",
            )
            unset = ModelConfig.__dataclass_fields__
            for name in (*sizes, "teacher_weights", "teacher_dtype", "teacher_compile", "layer_map"):
                value = getattr(self, name)
                _require(
                    value == unset[name].default,
                    f"model.{name}",
                    value,
                    "has no effect without model.teacher",
                )
        else:
            for name in ("scratch", "start_from"):
                value = getattr(self, name)
                _require(
                    value is None, f"model.{name}", value, "has no effect beside model.teacher; remove one"
                )
        _require(
            not self.new_head or self.start_from is not None,
            "model.new_head",
            self.new_head,
            "goes on a model.start_from without an MLM head; give that too",
        )
        if self.teacher_weights is not None:
            count = len(self.teacher) if isinstance(self.teacher, list) else 1
            _require(
                len(self.teacher_weights) == count and all(0 < w < math.inf for w in self.teacher_weights),
                "model.teacher_weights",
                self.teacher_weights,
                f"give {count} weights above 0, one for each teacher",
            )


@dataclass(frozen=True)
class DataConfig:
    """Where the shards are and in which order they are read."""

    shards: str = "shards"
    """Folder or URL of the shards that data_prep/write_shards.py made: a path, http(s), s3, gs, az, abfs or hf
    (s3, gs, az and abfs need requirements-remote.txt)."""

    sequence_length: int = 512
    """Tokens in a sequence, [CLS] and [SEP] included."""

    seed: int = 0
    """Seed of the data order, of the masks and of dropout."""

    lanes: int = 64
    """Parallel readers that an epoch is divided among: part of the data order's definition. The largest
    number of ranks is the largest divisor of the global batch size up to this."""

    verify: Literal["size", "full"] = "size"
    """What is checked before training: the size of every shard, or its sha256 as well, which each reading checks."""

    cache_dir: str | None = None
    """Folder in which shards from URLs are kept; null: they are read anew in every epoch."""

    def __post_init__(self) -> None:
        _require_positive(self, "data", "lanes")
        _require_at_most(self, "data", MAX_LANES, "lanes")
        _require(self.sequence_length >= 8, "data.sequence_length", self.sequence_length, "give at least 8")
        _require(isinstance(self.shards, str), "data.shards", self.shards, "give the folder or URL of shards")
        remote = is_remote(self.shards)  # refuses what is not read
        _require(
            self.cache_dir is None or remote,
            "data.cache_dir",
            self.cache_dir,
            f"has no effect with the local data.shards={self.shards!r}; remove it",
        )
        _require(0 <= self.seed < 2**31, "data.seed", self.seed, "give a number from 0 to 2147483647")


@dataclass(frozen=True)
class MaskingConfig:
    """Which tokens the model must guess (drawn anew in every epoch)."""

    probability: float = 0.15
    """Share of a sequence's positions that are chosen; of these 80 % become [MASK], 10 % a random token."""

    smoothing: float = 0.7
    """A token is chosen with probability proportional to count**-smoothing (the original code's 0.7);
    0 chooses every token alike."""

    whole_word: bool = False
    """Choose whole words rather than pieces of words."""

    def __post_init__(self) -> None:
        _require(
            0 < self.probability < 1, "masking.probability", self.probability, "give a share between 0 and 1"
        )
        _require(0 <= self.smoothing <= 2, "masking.smoothing", self.smoothing, "give a number from 0 to 2")


OBJECTIVE_WEIGHTS = (
    "kd_weight",
    "mlm_weight",
    "cosine_weight",
    "mse_weight",
    "layer_cosine_weight",
    "relation_weight",
)


@dataclass(frozen=True)
class ObjectiveConfig:
    """L = kd_weight T^2 KL(teacher || student at T) + mlm_weight CE + cosine_weight (1 - cos) + relations."""

    temperature: float = 2.0
    """T of the soft targets."""

    kd_weight: float = 5.0
    """Weight of the soft targets."""

    mlm_weight: float = 2.0
    """Weight of masked-language modelling."""

    cosine_weight: float = 1.0
    """Weight of the cosine distance between the last hidden states."""

    kd_positions: Literal["all", "masked"] = "all"
    """Where the soft targets count: at every position (the original), or at masked ones (cheaper)."""

    mse_weight: float = 0.0
    """Weight of the squared difference of the logits, at the positions of the soft targets."""

    layer_cosine_weight: float = 0.0
    """Weight of the cosine distance between the hidden states of `layer_pairs`."""

    layer_pairs: list[tuple[int, int]] = field(default_factory=list)
    """(student layer, teacher layer) pairs for that; 0 is the embeddings' output, layers count from 1."""

    projection: bool = False
    """Pass the student's hidden states through a learned linear map before each cosine: needed where student
    and teacher have different widths."""

    relation_weight: float = 0.0
    """Weight of the relations between the queries, keys and values of one layer of each model (MiniLMv2, Wang et
    al. 2021, arXiv:2012.15828). With it alone (the other weights 0) the student may have any width, and the
    vocabulary is not touched."""

    relation_heads: int | None = None
    """Heads that the relations are cut into; both widths must divide by it. null: as many as divide them, up to
    48 (the paper's for widths of 768)."""

    relation_layers: list[tuple[int, int]] | None = None
    """(student layer, teacher layer) for that, one pair for each teacher; layers count from 1. null: the last
    ones. For teachers of 24 layers the paper takes the 21st (BERT-large) and the 19th (RoBERTa-large)."""

    @property
    def needs_teacher_logits(self) -> bool:
        """Whether a term that is on compares logits."""
        return self.kd_weight + self.mse_weight > 0

    @property
    def needs_layers(self) -> bool:
        """Whether a term that is on compares hidden states of other layers than the last."""
        return self.layer_cosine_weight > 0

    @property
    def needs_hidden(self) -> bool:
        """Whether a term that is on compares hidden states."""
        return self.cosine_weight > 0 or self.needs_layers

    @property
    def needs_teacher(self) -> bool:
        """Whether a term that is on reads any output of a teacher."""
        return self.needs_teacher_logits or self.needs_hidden or self.relation_weight > 0

    @property
    def needs_masks(self) -> bool:
        """Whether a term that is on predicts tokens: without one the models read the text as it is."""
        return self.needs_teacher_logits or self.mlm_weight > 0

    @property
    def soft_targets(self) -> Literal["all", "masked", "none"]:
        """Positions whose teacher's logits are learnt from."""
        return self.kd_positions if self.needs_teacher_logits else "none"

    def term_weights(self) -> dict[str, float]:
        """Weights by the terms' names in metrics.jsonl."""
        return {
            "loss_kd": self.kd_weight,
            "loss_mlm": self.mlm_weight,
            "loss_cos": self.cosine_weight,
            "loss_mse": self.mse_weight,
            "loss_layer_cos": self.layer_cosine_weight,
            "loss_relation": self.relation_weight,
        }

    def __post_init__(self) -> None:
        _require(
            0 < self.temperature < math.inf,
            "objective.temperature",
            self.temperature,
            "give a number above 0",
        )
        weights = {name: getattr(self, name) for name in OBJECTIVE_WEIGHTS}
        for name, weight in weights.items():
            _require(0 <= weight < math.inf, f"objective.{name}", weight, "give 0 or more")
        _require(
            any(weights.values()),
            "objective.kd_weight",
            self.kd_weight,
            "all weights are 0, so that there is nothing to learn; raise one",
        )
        _require(
            self.needs_teacher_logits or self.kd_positions == "all",
            "objective.kd_positions",
            self.kd_positions,
            "has no effect with objective.kd_weight=0; remove it",
        )
        _require(
            self.kd_weight > 0 or self.temperature == ObjectiveConfig.temperature,
            "objective.temperature",
            self.temperature,
            "has no effect with objective.kd_weight=0; remove it",
        )
        _require(
            bool(self.layer_pairs) == (self.layer_cosine_weight > 0),
            "objective.layer_pairs",
            self.layer_pairs,
            f"goes with objective.layer_cosine_weight={self.layer_cosine_weight}: give both or neither",
        )
        _require(
            not self.projection or self.needs_hidden,
            "objective.projection",
            self.projection,
            "has no effect without a cosine term; remove it",
        )
        for name in ("relation_heads", "relation_layers"):
            value = getattr(self, name)
            _require(
                value is None or self.relation_weight > 0,
                f"objective.{name}",
                value,
                "has no effect with objective.relation_weight=0; remove it",
            )
        _require_positive(self, "objective", "relation_heads")
        _require(
            all(own >= 1 and theirs >= 1 for own, theirs in self.relation_layers or []),
            "objective.relation_layers",
            self.relation_layers,
            "layers count from 1",
        )


LAMB_OPTIONS = ("adapt_all", "clamp", "prenormalize")
"""Of OptimizerConfig: without effect for other optimizers."""


@dataclass(frozen=True)
class OptimizerConfig:
    """LAMB (You et al. 2020, arXiv:1904.00962), exact under ZeRO-2; or AdamW, to measure what LAMB is worth."""

    name: Literal["lamb", "adamw"] = "lamb"
    """lamb, or torch's fused AdamW under the same engine, schedule, clipping and exclusions from decay."""

    lr: float = 1.77e-3
    """Peak learning rate (You et al. 2020, table 4: 1.77e-3 at a batch of 4K). AdamW wants one of its own: 1e-3 at
    that batch in Izsak et al. 2021 (arXiv:2104.07705)."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moments (You et al. 2020)."""

    eps: float = 1e-6
    """Added to the root of the second moment (You et al. 2020)."""

    weight_decay: float = 0.01
    """Decoupled weight decay, not applied to biases and LayerNorms (You et al. 2020)."""

    adapt_all: bool = False
    """LAMB: scale biases and LayerNorms by a trust ratio as well."""

    clamp: tuple[float, float] | None = None
    """LAMB: smallest and largest trust ratio; null: not clamped."""

    prenormalize: bool = False
    """LAMB: divide the gradient by its global norm first (NVIDIA's); training.gradient_clipping must then be 0."""

    def __post_init__(self) -> None:
        _require_positive(self, "optimizer", "lr", "eps")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "give 0 or more")
        _require(
            all(0 <= b < 1 for b in self.betas), "optimizer.betas", self.betas, "give two numbers in [0, 1)"
        )
        if self.name == "adamw":
            for key in LAMB_OPTIONS:
                value = getattr(self, key)
                default = getattr(OptimizerConfig, key)
                _require(
                    value == default,
                    f"optimizer.{key}",
                    value,
                    f"is LAMB's and has no effect with optimizer.name=adamw; give {default}",
                )
            _require(
                self.lr != OptimizerConfig.lr,
                "optimizer.lr",
                self.lr,
                "is LAMB's default; give a rate for optimizer.name=adamw, for example 1e-3 at a batch of 4,096",
            )


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate and sequence length over the steps.

    The rate warms up linearly, then decays as a polynomial that would reach 0 one step after the last."""

    warmup_steps: int | None = None
    """Steps of linear warm-up; null: 1/40 of all steps (You et al. 2020, table 4, at a batch of 4K)."""

    decay_power: float = 1.0
    """Exponent of the decay: 1 is linear (You et al. 2020), 0.5 is NVIDIA's, 0 keeps the peak."""

    short_sequence_length: int | None = None
    """Tokens in a sequence in the first part of the run, for example 128; null: data.sequence_length all along."""

    short_share: float = 0.9
    """Share of the steps that have the short length (Devlin et al. 2019, appendix A.2)."""

    def __post_init__(self) -> None:
        warmup = self.warmup_steps
        _require(warmup is None or warmup >= 0, "schedule.warmup_steps", warmup, "give 0 or more, or null")
        _require(self.decay_power >= 0, "schedule.decay_power", self.decay_power, "give 0 or more")
        short = self.short_sequence_length
        _require(
            short is None or short >= 8, "schedule.short_sequence_length", short, "give at least 8, or null"
        )
        _require(
            0 < self.short_share < 1, "schedule.short_share", self.short_share, "give a share between 0 and 1"
        )
        _require(
            short is not None or self.short_share == ScheduleConfig.short_share,
            "schedule.short_share",
            self.short_share,
            "has no effect without schedule.short_sequence_length; remove it",
        )


DEFAULT_MICRO_BATCH_SIZE = 32


@dataclass(frozen=True)
class TrainingConfig:
    """How much, how long."""

    global_batch_size: int = 4096
    """Sequences in an optimizer step, over all ranks and accumulation steps (Sanh et al. 2019: up to 4K)."""

    micro_batch_size: int | Literal["auto"] | None = None
    """Sequences that one rank passes through the models at a time; the accumulation is derived. null: 32, or the
    largest below with which the ranks share the global batch. auto: the largest that fits into the GPU's memory,
    found at the first start. A run that goes on keeps what it had, as far as the ranks share the batch with it."""

    epochs: float | None = None
    """Passes over the corpus; null: 3, as in the original code, unless max_steps is given."""

    max_steps: int | None = None
    """Optimizer steps of the run, in place of `epochs`; 0 leaves the student as it was made, scored and exported."""

    gradient_clipping: float = 1.0
    """Largest global gradient norm (NVIDIA's LAMB recipe); 0: not clipped."""

    def __post_init__(self) -> None:
        _require_positive(self, "training", "global_batch_size", "epochs")
        _require(
            self.max_steps is None or self.max_steps >= 0,
            "training.max_steps",
            self.max_steps,
            "give 0 or more",
        )
        _require_at_most(self, "training", MAX_GLOBAL_BATCH_SIZE, "global_batch_size")
        _require_at_most(self, "training", MAX_STEPS, "max_steps", "epochs")
        if self.micro_batch_size != "auto":
            _require_positive(self, "training", "micro_batch_size")
        _require(
            self.epochs is None or self.max_steps is None,
            "training.epochs",
            self.epochs,
            f"has no effect beside training.max_steps={self.max_steps}; remove one",
        )
        _require(
            self.gradient_clipping >= 0,
            "training.gradient_clipping",
            self.gradient_clipping,
            "give 0 or more",
        )
        _require(
            not isinstance(self.micro_batch_size, int) or self.global_batch_size % self.micro_batch_size == 0,
            "training.micro_batch_size",
            self.micro_batch_size,
            f"must divide training.global_batch_size={self.global_batch_size}",
        )

    @property
    def settled_micro_batch_size(self) -> int:
        """The micro batch as a number; UserError while it is still "auto". null is settled by fit_micro_batch
        (train/data/pipeline.py)."""
        if self.micro_batch_size == "auto":
            raise UserError(
                "training.micro_batch_size='auto' is found when training starts; give a number here"
            )
        assert self.micro_batch_size is not None, "the number of ranks has not been asked for it"
        return self.micro_batch_size


@dataclass(frozen=True)
class CheckpointConfig:
    """What a killed run can go on from."""

    every_steps: int = 500
    """Steps between checkpoints; the last step is always saved."""

    keep_last: int = 2
    """Newest checkpoints that are kept; of the older ones only milestones and the best by held-out loss stay."""

    milestone_every_steps: int | None = None
    """Checkpoints at multiples of this step are kept for good; null: none."""

    stop_after_failures: int = 3
    """Checkpoints in a row that could not be written (full disk), after which the run stops."""

    allow_changed_config: bool = False
    """Go on from a checkpoint although the configuration has changed since, but for optimizer.name."""

    def __post_init__(self) -> None:
        _require_positive(
            self, "checkpoint", "every_steps", "keep_last", "milestone_every_steps", "stop_after_failures"
        )
        milestone = self.milestone_every_steps
        _require(
            milestone is None or milestone % self.every_steps == 0,
            "checkpoint.milestone_every_steps",
            milestone,
            f"give a multiple of checkpoint.every_steps={self.every_steps}",
        )


@dataclass(frozen=True)
class EvaluationConfig:
    """Scores on the held-out split while training.

    Always under the same masks, whatever `masking` trains with: 15 % of the positions, each token alike, 80/10/10.
    """

    every_steps: int = 500
    """Steps between evaluations; the first and the last step are always evaluated."""

    max_windows: int = 2048
    """Held-out sequences that are scored, always the same ones."""

    def __post_init__(self) -> None:
        _require_positive(self, "evaluation", "every_steps", "max_windows")


@dataclass(frozen=True)
class RunConfig:
    """Where a run leaves what it makes, and what it says meanwhile."""

    dir: str = "runs/distilbert-base"
    """Run folder: configs, metrics, TensorBoard, checkpoints, the student. A run folder that holds a
    checkpoint is continued."""

    log_every_steps: int = 10
    """Steps between rows of metrics.jsonl, TensorBoard points and updates of the progress bar."""

    stop_after_non_finite: int = 20
    """Steps in a row with a non-finite gradient after which the run stops."""

    rollback_on_divergence: int = 0
    """So many times a run that diverges goes back to its last checkpoint by itself and leaves out the batches of the
    bad steps; every other step keeps its batch, masks and learning rate. 0: it stops."""

    spike_deviations: float = 6.0
    """A step whose loss is so many standard deviations above the median of the 200 before is reported, with its
    sequences in spikes.jsonl; 0: none."""

    profile_steps: int = 0
    """Steps to trace with torch's profiler, after the first three of this start: RUN/profile/; --profile
    is short for 3."""

    lost_rank_timeout_s: float = 60.0
    """A rank that is not heard of for that long (killed, frozen, cut off) ends the job."""

    hang_timeout_s: float = 1800.0
    """Seconds without progress on any rank after which the job ends."""

    def __post_init__(self) -> None:
        names = ("log_every_steps", "stop_after_non_finite", "lost_rank_timeout_s", "hang_timeout_s")
        _require_positive(self, "run", *names)
        _require_at_most(self, "run", MAX_TIMEOUT_S, "lost_rank_timeout_s", "hang_timeout_s")
        for name in ("spike_deviations", "profile_steps", "rollback_on_divergence"):
            _require(getattr(self, name) >= 0, f"run.{name}", getattr(self, name), "give 0 or more")


@dataclass(frozen=True)
class DeepSpeedConfig:
    """The engine."""

    config: str | None = None
    """DeepSpeed JSON; null: ds_configs/fp16.json on GPUs, ds_configs/cpu.json elsewhere."""

    log_level: Literal["debug", "info", "warning", "error"] = "error"
    """What DeepSpeed may say."""


@dataclass(frozen=True)
class Config:
    """The whole tree."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    def __post_init__(self) -> None:
        for section in fields(self):
            for key, value in vars(getattr(self, section.name)).items():
                for each in value if isinstance(value, (list, tuple)) else [value]:
                    # As a path it would mean the current folder.
                    filled = not isinstance(each, str) or bool(each.strip())
                    _require(
                        filled, f"{section.name}.{key}", value, "is empty; give a value, or leave it out"
                    )
                    _require_sane_number(each, f"{section.name}.{key}", value)
        if self.optimizer.prenormalize:
            _require(
                self.training.gradient_clipping == 0,
                "training.gradient_clipping",
                self.training.gradient_clipping,
                "with optimizer.prenormalize=true the gradient is already of norm 1: give 0",
            )
        if self.model.teacher is None:
            for name in OBJECTIVE_WEIGHTS:
                if name == "mlm_weight":
                    continue
                value = getattr(self.objective, name)
                _require(
                    value == 0,
                    f"objective.{name}",
                    value,
                    "needs a model.teacher; give 0 to train without one",
                )
        elif self.objective.relation_layers is not None:
            teachers = len(self.model.teacher) if isinstance(self.model.teacher, list) else 1
            _require(
                len(self.objective.relation_layers) == teachers,
                "objective.relation_layers",
                self.objective.relation_layers,
                f"give {teachers} pairs, one for each teacher",
            )
        _require(
            self.objective.needs_masks or self.masking == MaskingConfig(),
            "masking",
            asdict(self.masking),
            "has no effect where no term predicts tokens (objective.kd_weight, mlm_weight and mse_weight are 0); "
            "remove it",
        )
        _require(
            not (self.model.teacher_compile and self.objective.needs_layers),
            "model.teacher_compile",
            self.model.teacher_compile,
            "a compiled teacher cannot return the hidden states of its layers; turn it off, or the cosine on "
            "mapped layers (objective.layer_cosine_weight)",
        )
        short = self.schedule.short_sequence_length
        _require(
            short is None or short < self.data.sequence_length,
            "schedule.short_sequence_length",
            short,
            f"give less than data.sequence_length={self.data.sequence_length}, or null",
        )
        warmup, last = self.schedule.warmup_steps, self.training.max_steps
        _require(
            warmup is None or last is None or warmup <= last,
            "schedule.warmup_steps",
            warmup,
            f"is more than training.max_steps={last}; give fewer",
        )
