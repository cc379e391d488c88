"""Loading with refusals, freezing, ensembles, precision."""

from __future__ import annotations

import copy
from functools import partialmethod

import pytest
import torch
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from tests.unit.models.test_families import MODELS, SIZES
from train.config_sections.objective import ObjectiveConfig
from train.models.compilation import compile_layers
from train.models.families import family_of
from train.models.loading import load_masked_lm
from train.models.students import make_student
from train.models.teacher import Teacher, normalised_shares, running_copy
from train.models.tokenizer_checks import folder_fingerprint
from train.objective.build import build_objective
from train.objective.distillation import DistillationLoss


def load_teacher(*names, weights=None):
    models = [load_masked_lm(name) for name in names]
    return Teacher(models, weights, names=names, fingerprints=[folder_fingerprint(name) for name in names])


@pytest.fixture(scope="module")
def batch():
    return torch.randint(5, 60, (2, 16), generator=torch.Generator().manual_seed(0))


def test_the_teacher_is_frozen_and_in_no_one_elses_hands(teacher_folder, batch):
    teacher = load_teacher(teacher_folder)
    model = teacher.models[0]
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "sdpa"
    assert not isinstance(teacher, torch.nn.Module)
    whole = teacher(batch)
    output = whole.members[0]
    assert output.last_hidden.is_inference()
    assert output.hidden_states == ()
    with torch.inference_mode():
        (inputs,) = whole.decoder_inputs(torch.tensor([3, 17]))
        logits = inputs.features @ inputs.weight.T + inputs.bias
        assert torch.allclose(logits, model(batch).logits.flatten(0, 1)[[3, 17]], atol=1e-6)
    holder = torch.nn.Module()
    holder.student, holder.teacher = make_student(model), teacher
    holder.objective = DistillationLoss(ObjectiveConfig())
    assert not any("teacher" in name for name in holder.state_dict())


def test_a_compiled_teacher_gives_the_same(teacher_folder, batch, monkeypatch):
    """Hidden states, of its layers too, and a layer's queries, keys and values; at the second call too."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    plain, compiled = (
        Teacher([load_masked_lm(teacher_folder)], relation_layers=[4], output_hidden_states=True)
        for _ in range(2)
    )
    compile_layers(compiled.models[0])
    assert not graphs
    (expected,) = plain(batch).members
    for _ in range(2):
        (found,) = compiled(batch).members
        assert torch.allclose(found.last_hidden, expected.last_hidden, atol=1e-5)
        for own, other in zip(found.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
        for own, other in zip(found.vectors, expected.vectors, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    assert graphs


def test_an_ensemble_of_two_teachers_trains_a_student(teacher_folder, batch, tmp_path):
    """The averaged targets get nearer, and both teachers stay as they were."""
    torch.manual_seed(4)
    second = load_masked_lm(teacher_folder)
    for parameter in second.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    second.save_pretrained(tmp_path)
    teacher = load_teacher(teacher_folder, str(tmp_path), weights=[1, 3])
    assert teacher.shares == (0.25, 0.75)
    assert teacher.tokenizer_fingerprint is not None
    before = [copy.deepcopy(model.state_dict()) for model in teacher.models]
    student = make_student(load_masked_lm(teacher_folder)).eval()
    objective = build_objective(ObjectiveConfig(mlm_weight=0), student, teacher)
    optimizer = torch.optim.AdamW(student.parameters(), 2e-3)
    from train.data.masking import MaskedBatch

    masked = MaskedBatch(batch, torch.zeros(2, 1).long(), batch[:, :1], torch.ones(2, 1, dtype=torch.bool))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        terms = objective(student, masked, teacher(batch))
        terms["loss"].backward()
        optimizer.step()
        losses.append((terms["loss_kd"].item(), terms["loss_cos"].item()))
    assert losses[-1][0] < 0.5 * losses[0][0]
    assert losses[-1][1] < 0.5 * losses[0][1]
    for model, state in zip(teacher.models, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_ensembles_that_cannot_be_are_refused(teacher_folder, tmp_path):
    other = BertForMaskedLM(BertConfig(**SIZES | {"vocab_size": 70}))
    other.save_pretrained(tmp_path)
    vocabulary = load_masked_lm(teacher_folder).config.vocab_size
    with pytest.raises(ValueError, match=f"has {vocabulary} tokens, {tmp_path} has 70"):
        load_teacher(teacher_folder, str(tmp_path))
    models = [MODELS["bert"](), MODELS["bert"]()]
    with pytest.raises(ValueError, match="tokenizers of a and b differ, though both have 64 tokens"):
        Teacher(models, names=["a", "b"], fingerprints=["1" * 64, "2" * 64])
    with pytest.raises(ValueError, match="tokenizers of b and c differ"):
        Teacher([*models, MODELS["bert"]()], names=["a", "b", "c"], fingerprints=[None, "1" * 64, "2" * 64])
    with pytest.raises(ValueError, match=r"the smallest counts for nothing beside the largest"):
        normalised_shares(2, [1e-300, 1e300])
    assert normalised_shares(2, [1e308, 1e308]) == (0.5, 0.5)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_running_copy_is_what_transformers_would_load(name, dtype, tmp_path):
    """Weights rounded once; buffers, such as ModernBERT's rotary frequencies, in the format they are loaded in."""
    MODELS[name]().save_pretrained(tmp_path)
    original = load_masked_lm(str(tmp_path))
    own = running_copy(original, "cpu", dtype)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=dtype)
    for parts in ("named_parameters", "named_buffers"):
        found, expected = dict(getattr(own, parts)()), dict(getattr(loaded, parts)())
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype == value.dtype, key
            assert torch.equal(found[key], value), key
    assert original.dtype == torch.float32
    assert family_of(own).decoder(own)[0] is own.get_input_embeddings().weight
