"""What the plan says of parameters, FLOPs and activations, against models that are really built and run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from launch.common.cli import parse_config
from launch.planner.memory import (
    Step,
    activation_bytes,
    gradient_bytes,
    head_bytes,
    logits_chunk_bytes,
    loss_gradient_bytes,
    model_state_bytes,
    teacher_bytes,
)
from launch.planner.models import PUBLISHED, describe, models_of, named_model
from train.config_sections.objective import ObjectiveConfig
from train.data.masking import MaskedBatch
from train.engine_config import EngineSettings
from train.errors import UserError
from train.models.families import family_of
from train.models.flops import training_flops_per_token
from train.models.loading import load_masked_lm
from train.models.students import make_student
from train.models.teacher import Teacher
from train.objective.distillation import DistillationLoss

KINDS = ("bert", "roberta", "camembert", "electra")


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
    if kind == "electra":
        settings["embedding_size"] = width
    torch.manual_seed(0)
    teacher = AutoModelForMaskedLM.from_config(
        AutoConfig.for_model(kind, **settings), attn_implementation="sdpa"
    )
    return teacher, make_student(teacher)


def step_of(student: Any, teachers: Any, micro: int, length: int, masked: int, **objective: Any) -> Step:
    """A step in fp32 on one CPU, where dropout masks have the activations' format."""
    return Step(
        student=describe(student),
        teachers=tuple(map(describe, teachers)),
        objective=ObjectiveConfig(**objective),
        num_masked=masked,
        engine=EngineSettings(
            2, 4, 4, reduce_bucket_size=100, reduces_copies=True, overlap=False, precision="fp32"
        ),
        world_size=1,
        micro_batch_size=micro,
        sequence_length=length,
        accumulation=1,
        teacher_bytes_per_element=4,
        on_gpu=False,
        dropout_mask_bytes=4,
    )


def make_batch(micro: int, length: int, masked: int) -> MaskedBatch:
    ids = torch.randint(5, 97, (micro, length))
    positions = torch.rand(micro, length).argsort(-1)[:, :masked].sort(-1).values
    return MaskedBatch(ids, positions, ids.gather(1, positions), torch.ones(micro, masked, dtype=torch.bool))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer_map", ["every_other", [0, 1, 3], "random"])
@pytest.mark.parametrize("sizes", [{}, {"width": 24, "heads": 4, "feed_forward": 20}])
def test_planned_models_are_the_built_ones(
    kind: str, layer_map: Any, sizes: dict[str, int], tmp_path: Path
) -> None:
    teacher, _ = make_models(kind)
    teacher.save_pretrained(tmp_path)
    words = [f"--model.student_{name}={size}" for name, size in sizes.items()]
    student, teachers = models_of(
        parse_config([f"--model.teacher={tmp_path}", f"--model.layer_map={layer_map}", *words], "")
    )
    assert {parameter.device.type for parameter in student.parameters()} == {"meta"}
    assert describe(student) == describe(make_student(teacher, layer_map=layer_map, **sizes))
    assert [describe(each) for each in teachers] == [describe(teacher)]


def test_without_head_and_trained_on(teacher_folder: str, tmp_path: Path) -> None:
    """A folder's class says whether it has a head; where a term predicts tokens it will have one."""
    teacher = load_masked_lm(teacher_folder)
    bare = teacher.base_model
    bare.save_pretrained(tmp_path)
    relations = [f"--objective.{term}_weight=0" for term in ("kd", "mlm", "cosine")]
    relations += ["--objective.relation_weight=1", "--model.layer_map=every_other"]
    for folder, expected in ((teacher_folder, teacher), (tmp_path, bare)):
        student, teachers = models_of(parse_config([f"--model.teacher={folder}", *relations], ""))
        assert describe(student) == describe(make_student(expected, layer_map="every_other"))
        assert [describe(each) for each in teachers] == [describe(expected)]
    words = ["--model.teacher=null", f"--model.start_from={tmp_path}", "--model.new_head=true"]
    words += ["--objective.kd_weight=0", "--objective.cosine_weight=0"]
    student, teachers = models_of(parse_config(words, ""))
    assert (describe(student), teachers) == (describe(teacher), ())
    with pytest.raises(
        UserError, match=r"model.start_from='x/y': no folder with a config.json, and not in plan.py's"
    ):
        models_of(parse_config([*words, "--model.start_from=x/y"], ""))


def test_published_sizes() -> None:
    """What transformers counts in the hub's checkpoints with their MLM heads."""
    assert describe(named_model("google-bert/bert-base-uncased")).parameters == 109_514_298
    assert describe(named_model("FacebookAI/roberta-base")).parameters == 124_697_433
    student, _ = models_of(parse_config([], ""))
    assert describe(student) == describe(named_model("distilbert/distilbert-base-uncased"))
    assert describe(student).parameters == 66_985_530


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
        )["loss"]
        loss.backward()
    shapes = [describe(model).shape for model in (student, teacher_model)]
    ours = training_flops_per_token(shapes[0], shapes[1:], length, masked, kd_positions)
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
    predicted = activation_bytes(step_of(student, [], micro, length, 2))
    assert predicted == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("kd_positions", ["all", "masked"])
def test_activations_of_head_and_objective(kd_positions: str) -> None:
    teacher_model, student = make_models("bert", 64, 256)
    micro, length, masked = 4, 64, 10
    batch, teacher = make_batch(micro, length, masked), Teacher([teacher_model])
    loss = DistillationLoss(ObjectiveConfig(kd_positions=kd_positions))
    measured = saved_bytes(student, batch, teacher(batch.input_ids), loss) + micro * length * 64 * 4
    step = step_of(student, [teacher_model], micro, length, masked, kd_positions=kd_positions)
    predicted = activation_bytes(step) + head_bytes(step)
    assert predicted == pytest.approx(measured, rel=0.003)


@pytest.mark.parametrize(
    ("objective", "rows"), [({}, 4 * 64), ({"kd_positions": "masked"}, 4 * 10), ({"kd_weight": 0.0}, 0)]
)
def test_what_teachers_hold(objective: dict[str, Any], rows: int) -> None:
    """Weights; last hidden states of all tokens, decoder inputs of those whose logits are compared."""
    models = [make_models("bert", 64, 256)[0], make_models("bert", 32)[0]]
    output = Teacher(models)(make_batch(4, 64, 10).input_ids)
    outputs = [member.last_hidden for member in output.members]
    outputs += [decoder.features for decoder in output.decoder_inputs(torch.arange(rows))]
    parameters = [parameter for model in models for parameter in model.parameters()]
    assert teacher_bytes(step_of(models[0], models, 4, 64, 10, **objective)) == {
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
    step = step_of(student, [teacher_model], 4, 64, 40, kd_weight=kd_weight)
    assert logits_chunk_bytes(step) == sum(buffer.numel() * buffer.element_size() for buffer in buffers)


def test_gradients_have_the_shape_of_narrow_embeddings() -> None:
    """ELECTRA's decoder is as wide as its embeddings, not as its encoder."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 1}
    student = AutoModelForMaskedLM.from_config(
        AutoConfig.for_model("electra", vocab_size=97, embedding_size=16, **sizes)
    )
    step = step_of(student, [student], 1, 64, 2, kd_positions="masked")
    weight, bias = family_of(student).decoder(student)
    assert weight.shape == (97, 16)
    assert loss_gradient_bytes(step) == weight.nbytes + bias.nbytes + 2 * 16 * 4
    assert gradient_bytes(step)["gradient buckets"] == 100 * 4 + weight.nbytes
    half = replace(step.engine, bytes_per_element=2, precision="bf16")
    logits = 2 * 97 * 4
    assert (
        logits_chunk_bytes(replace(step, engine=half, on_gpu=True))
        == 3 * logits + logits // 2 + weight.nbytes
    )


def test_state_by_hand() -> None:
    """BERT-base on 4 ranks: padded to a multiple of 8."""
    engine = EngineSettings(
        2, 2, 4, reduce_bucket_size=100, reduces_copies=True, overlap=True, precision="fp16"
    )
    fp32 = step_of(named_model("google-bert/bert-base-uncased"), [], 1, 512, 77)
    step = replace(fp32, engine=engine, world_size=4, accumulation=4)
    shard = -(-109_514_298 // 8) * 2
    assert model_state_bytes(step) == {
        "student weights": 4 * shard * 2,
        "fp32 master (shard)": shard * 4,
        "moments (shard)": shard * 8,
    }
    assert gradient_bytes(step) == {
        "gradients, fp32 accumulation": shard * 4,
        "gradient buckets": 2 * 100 * 2 + 100 * 2 + 30_522 * 768 * 2,
    }
    as_shipped = replace(step, engine=replace(engine, reduces_copies=False))
    assert gradient_bytes(as_shipped)["gradient buckets"] == 2 * 100 * 2 + 30_522 * 768 * 2

    # Of one format, the new gradients lie beside the accumulated ones; whole tensors at both borders are kept.
    kept = 4 * (shard + 2 * 768 * 3072)
    steps = [replace(fp32, world_size=4, accumulation=count) for count in (1, 8)]
    assert [gradient_bytes(each)["gradients, fp32 accumulation"] for each in steps] == [kept, 2 * kept]


def main() -> None:
    """Print measured beside predicted memory at BERT-base's size: python -m tests.unit.launch.planner.test_memory"""
    for name in ("google-bert/bert-base-uncased", "FacebookAI/roberta-base"):
        config = AutoConfig.for_model(**PUBLISHED[name], attention_probs_dropout_prob=0.0)
        model = AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa")
        student, teacher, batch = make_student(model), Teacher([model]), make_batch(1, 128, 19)
        planned_student, _ = models_of(parse_config([f"--model.teacher={name}"], ""))
        for built, plan in ((model, named_model(name)), (student, planned_student)):
            print(name, "parameters:", describe(built).parameters, describe(plan).parameters)
        math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with math, FlopCounterMode(display=False) as counter:
            DistillationLoss(ObjectiveConfig())(student, batch, teacher(batch.input_ids))["loss"].backward()
        shapes = [describe(student).shape, describe(model).shape]
        flops = training_flops_per_token(shapes[0], shapes[1:], 128, 19, "all").total
        print("  MFLOPs per token:", counter.get_total_flops() / 128e6, flops / 1e6)
        kept = (
            saved_bytes(student, batch, teacher(batch.input_ids), DistillationLoss(ObjectiveConfig()))
            + 128 * 768 * 4
        )
        step = step_of(student, [model], 1, 128, 19)
        ours = activation_bytes(step) + head_bytes(step)
        print("  MB saved for the backward pass:", kept / 1e6, ours / 1e6)


if __name__ == "__main__":
    main()
