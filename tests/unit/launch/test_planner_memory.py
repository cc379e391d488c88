"""What the plan says of parameters, FLOPs and activations, against models that are really built and run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from launch.planner.memory import (
    EngineSettings,
    Objective,
    activation_bytes,
    engine_settings,
    gradient_bytes,
    head_bytes,
    largest_fitting_micro_batch,
    logits_chunk_bytes,
    model_state_bytes,
    teacher_bytes,
)
from launch.planner.shapes import PUBLISHED, model_from_config, named_model, num_parameters, student_of
from train.config import ObjectiveConfig
from train.data.masking import MaskedBatch
from train.models.families import family_of
from train.models.flops import shape_of, training_flops_per_token
from train.models.students import make_student
from train.models.teacher import Teacher
from train.objective.distillation import DistillationLoss

KINDS = ("bert", "roberta")


def make_models(kind: str, width: int = 32, inner: int = 128, layers: int = 4) -> tuple[Any, Any]:
    """A teacher and its student; no dropout in attention, so that its fused kernel runs as it does on a GPU."""
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": inner,
        "max_position_embeddings": 80,
        "attention_probs_dropout_prob": 0.0,
    }
    if kind == "roberta":
        settings["type_vocab_size"] = 1
    torch.manual_seed(0)
    teacher = AutoModelForMaskedLM.from_config(
        AutoConfig.for_model(kind, **settings), attn_implementation="sdpa"
    )
    return teacher, make_student(teacher)


def planned(model: PreTrainedModel) -> Any:
    return model_from_config("model", model.config.to_dict())


def make_batch(micro: int, length: int, masked: int) -> MaskedBatch:
    ids = torch.randint(5, 97, (micro, length))
    positions = torch.rand(micro, length).argsort(-1)[:, :masked].sort(-1).values
    return MaskedBatch(ids, positions, ids.gather(1, positions), torch.ones(micro, masked, dtype=torch.bool))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_built_models(kind: str) -> None:
    teacher, student = make_models(kind)
    for model, shape in ((teacher, planned(teacher)), (student, student_of(planned(teacher)))):
        assert num_parameters(shape) == sum(parameter.numel() for parameter in model.parameters())
    assert student_of(planned(teacher)) == planned(student)


@pytest.mark.parametrize("name", ["google-bert/bert-base-uncased", "FacebookAI/roberta-large"])
def test_published_shapes_are_what_transformers_builds(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(**PUBLISHED[name]))
    assert num_parameters(named_model(name)) == sum(parameter.numel() for parameter in model.parameters())


def test_published_sizes() -> None:
    # What transformers counts in the hub's checkpoints with their MLM heads.
    assert num_parameters(named_model("google-bert/bert-base-uncased")) == 109_514_298
    assert num_parameters(named_model("FacebookAI/roberta-base")) == 124_697_433
    # 66,985,530 parameters with the MLM head, from BERT-base and from its own config.
    student = student_of(named_model("google-bert/bert-base-uncased"))
    assert num_parameters(student) == 66_985_530
    assert student == named_model("distilbert/distilbert-base-uncased")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kd_positions", ["all", "masked"])
def test_flops_of_a_real_step(kind: str, kd_positions: str) -> None:
    """Teacher, student forward and backward, objective: torch's own count of every matrix product."""
    teacher_model, student = make_models(kind)
    teacher = Teacher([teacher_model])
    micro, length, masked = 3, 40, 6
    batch = make_batch(micro, length, masked)
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        loss = DistillationLoss(ObjectiveConfig(kd_positions=kd_positions))(
            student, batch, teacher(batch.input_ids)
        ).loss
        loss.backward()
    ours = training_flops_per_token(
        shape_of(student), [shape_of(teacher_model)], length, masked, kd_positions
    )
    assert ours.total * micro * length == pytest.approx(counter.get_total_flops(), rel=1e-9)


def saved_bytes(
    model: PreTrainedModel, batch: MaskedBatch, taught: Any, objective: DistillationLoss | None
) -> int:
    """Bytes of the distinct storages that autograd keeps, parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if objective is None:
            output: Any = family_of(model).encode(model, batch.input_ids)
        else:
            output = objective(model, batch, taught)
    assert output is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


SHAPES = [(2, 16, 32, 128, 2), (4, 64, 64, 128, 4), (3, 40, 128, 512, 8)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("micro", "length", "width", "inner", "layers"), SHAPES)
def test_activations_of_the_encoder(
    kind: str, micro: int, length: int, width: int, inner: int, layers: int
) -> None:
    """Within 1 % of what autograd saves, the last layer's output (which the formula counts too) added."""
    _, student = make_models(kind, width, inner, layers)
    measured = saved_bytes(student, make_batch(micro, length, 2), None, None) + micro * length * width * 4
    predicted = activation_bytes(planned(student), micro, length, bytes_per_element=4, dropout_mask_bytes=4)
    assert predicted == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("kd_positions", ["all", "masked"])
def test_activations_of_head_and_objective(kd_positions: str) -> None:
    teacher_model, student = make_models("bert", 64, 256)
    micro, length, masked = 4, 64, 10
    batch, teacher = make_batch(micro, length, masked), Teacher([teacher_model])
    loss = DistillationLoss(ObjectiveConfig(kd_positions=kd_positions))
    measured = saved_bytes(student, batch, teacher(batch.input_ids), loss) + micro * length * 64 * 4
    shape, objective = planned(student), Objective(kd_positions, masked, mlm=True, cosine=True)
    predicted = activation_bytes(shape, micro, length, 4, 4) + head_bytes(shape, objective, micro, length, 4)
    assert predicted == pytest.approx(measured, rel=0.003)


@pytest.mark.parametrize(("soft_targets", "rows"), [("all", 4 * 64), ("masked", 4 * 10), ("none", 0)])
def test_what_teachers_hold(soft_targets: str, rows: int) -> None:
    """Weights; last hidden states of all tokens, decoder inputs of those whose logits are compared."""
    models = [make_models("bert", 64, 256)[0], make_models("bert", 32)[0]]
    output = Teacher(models)(make_batch(4, 64, 10).input_ids)
    outputs = [member.last_hidden for member in output.members]
    outputs += [decoder.features for decoder in output.decoder_inputs(torch.arange(rows))]
    parameters = [parameter for model in models for parameter in model.parameters()]
    objective = Objective(soft_targets, 10, mlm=True, cosine=True)
    assert teacher_bytes(tuple(map(planned, models)), objective, 4, 64, 4) == {
        "teacher weights": sum(parameter.nbytes for parameter in parameters),
        "teacher outputs": sum(tensor.nbytes for tensor in outputs),
    }


@pytest.mark.parametrize("kd_weight", [5.0, 0.0])
def test_logits_chunk(kd_weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused loss's buffers, several chunks long."""
    monkeypatch.setattr("train.objective.fused_loss.CPU_BUFFER_BYTES", 97 * 4 * 50)
    monkeypatch.setattr("launch.planner.memory.CPU_BUFFER_BYTES", 97 * 4 * 50)
    teacher_model, student = make_models("bert")
    batch, teacher = make_batch(4, 64, 40), Teacher([teacher_model])
    loss = DistillationLoss(ObjectiveConfig(kd_weight=kd_weight))
    loss(student, batch, teacher(batch.input_ids))
    buffers = loss._workspace.tensors.values()
    objective = Objective("all" if kd_weight else "none", 40, mlm=True, cosine=True)
    assert logits_chunk_bytes(planned(student), objective, 4, 64, 4, on_gpu=False) == sum(
        buffer.numel() * buffer.element_size() for buffer in buffers
    )


def test_state_by_hand() -> None:
    """BERT-base on 4 ranks: padded to a multiple of 8."""
    shape = model_from_config("x", {**PUBLISHED["google-bert/bert-base-uncased"]})
    engine = EngineSettings(
        stage=2,
        bytes_per_element=2,
        accumulation_bytes=4,
        reduce_bucket_size=100,
        overlap=True,
        precision="fp16",
    )
    state = model_state_bytes(shape, 4, engine)
    shard = -(-109_514_298 // 8) * 2
    assert state == {
        "student weights": 4 * shard * 2,
        "fp32 master (shard)": shard * 4,
        "LAMB moments (shard)": shard * 8,
    }
    assert gradient_bytes(shape, 4, engine, 4) == {
        "gradients, fp32 accumulation": shard * 4,
        "gradient buckets": 2 * 100 * 2 + 100 * 2 + 30_522 * 768 * 2,
    }

    # Of one format, the new gradients lie beside the accumulated ones; whole tensors at both borders are kept.
    fp32 = EngineSettings(2, 4, 4, reduce_bucket_size=100, overlap=False, precision="fp32")
    kept = 4 * (shard + 2 * 768 * 3072)
    once, twice = (gradient_bytes(shape, 4, fp32, n)["gradients, fp32 accumulation"] for n in (1, 8))
    assert (once, twice) == (kept, 2 * kept)


def test_settings_of_the_shipped_json() -> None:
    from train.engine_config import ROOT, read_engine_config

    settings = [
        engine_settings(read_engine_config(ROOT / "ds_configs" / f"{n}.json"))
        for n in ("fp16", "bf16", "cpu")
    ]
    assert [s.precision for s in settings] == ["fp16", "bf16", "fp32"]
    assert [(s.bytes_per_element, s.accumulation_bytes) for s in settings] == [(2, 4), (2, 4), (4, 4)]
    assert all(s.stage == 2 and s.reduce_bucket_size == 50_000_000 for s in settings)


def test_largest_fitting_micro_batch() -> None:
    assert largest_fitting_micro_batch({1: 10, 2: 20, 4: 40}, 25) == 2
    assert largest_fitting_micro_batch({1: 10}, 5) is None


def main() -> None:
    """Print measured beside predicted memory at BERT-base's size: python -m tests.unit.launch.test_planner_memory"""
    for name in ("google-bert/bert-base-uncased", "FacebookAI/roberta-base"):
        config = AutoConfig.for_model(**PUBLISHED[name], attention_probs_dropout_prob=0.0)
        model = AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa")
        student, teacher, batch = make_student(model), Teacher([model]), make_batch(1, 128, 19)
        sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, student)]
        shapes = [named_model(name), student_of(named_model(name))]
        print(name, "parameters of teacher and student:", sizes, [num_parameters(shape) for shape in shapes])
        math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with math, FlopCounterMode(display=False) as counter:
            DistillationLoss(ObjectiveConfig())(student, batch, teacher(batch.input_ids)).loss.backward()
        objective = Objective("all", 19, mlm=True, cosine=True)
        flops = training_flops_per_token(shapes[1].shape, [shapes[0].shape], 128, 19, "all").total
        print("  MFLOPs per token:", counter.get_total_flops() / 128e6, flops / 1e6)
        kept = (
            saved_bytes(student, batch, teacher(batch.input_ids), DistillationLoss(ObjectiveConfig()))
            + 128 * 768 * 4
        )
        ours = activation_bytes(shapes[1], 1, 128, 4, 4) + head_bytes(shapes[1], objective, 1, 128, 4)
        print("  MB saved for the backward pass:", kept / 1e6, ours / 1e6)


if __name__ == "__main__":
    main()
