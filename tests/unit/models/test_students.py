"""Students: which layers they get, and that nothing is lost where nothing is left out."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from tests.unit.models.test_families import MODELS, SIZES, rough
from train.errors import UserError
from train.models.families import family_of, has_head
from train.models.flops import shape_of
from train.models.students import make_student, resolve_layer_map


@pytest.fixture(params=sorted(MODELS))
def teacher(request):
    torch.manual_seed(0)
    return rough(MODELS[request.param]())


@torch.no_grad()
def test_a_student_with_all_the_layers_is_its_teacher(teacher, tmp_path):
    student = make_student(teacher, 4)
    assert student.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())
    kind = "distilbert" if teacher.config.model_type == "bert" else teacher.config.model_type
    assert student.config.model_type == kind
    input_ids = torch.randint(4, 64, (3, 30))
    expected = teacher(input_ids).logits
    difference = (student.eval()(input_ids).logits - expected).abs().max()
    assert difference <= 2e-6 * expected.abs().max()
    # As an ordinary Hugging Face folder, too.
    student.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(again(input_ids).logits, student(input_ids).logits)


@torch.no_grad()
def test_a_teacher_without_head_has_students_without_head(teacher, tmp_path):
    """Of the same weights as those of the teacher with its head, and of the same hidden states."""
    bare, input_ids = teacher.base_model, torch.randint(4, 64, (3, 30))
    heads = 4 if teacher.config.model_type == "mpnet" else None  # cannot have fewer
    for layers, width in (([0, 1, 2, 3], None), ([0, 2], None), ([0, 2], 16)):
        student, headed = (
            make_student(each, layer_map=layers, width=width, heads=heads) for each in (bare, teacher)
        )
        assert student.training
        assert not has_head(student)
        assert all(torch.equal(v, headed.base_model.state_dict()[k]) for k, v in student.state_dict().items())
    student = make_student(bare, 4).eval()
    expected = bare(input_ids)[0]
    assert (student(input_ids)[0] - expected).abs().max() <= 2e-6 * expected.abs().max()
    student.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(input_ids)[0], student(input_ids)[0])
    assert not has_head(make_student(bare, 2, "random", width=16))


def test_layers_are_copied_in_the_maps_order_and_not_shared(teacher):
    student = make_student(teacher, layer_map=[0, 3])
    family, own = family_of(teacher), family_of(student)
    assert own.num_layers(student) == len(own.layer_list(student)) == 2
    flat = [
        [
            torch.cat([p.detach().flatten() for _, p in sorted(each.named_parameters())]).sort().values
            for each in list_
        ]
        for list_ in (own.layer_list(student), family.layer_list(teacher))
    ]
    assert torch.equal(flat[0][0], flat[1][0])
    assert torch.equal(flat[0][1], flat[1][3])
    pointers = {p.data_ptr() for p in teacher.parameters()}
    assert not pointers & {p.data_ptr() for p in student.parameters()}
    assert teacher.config.num_hidden_layers == 4
    assert family.num_layers(teacher) == 4


@pytest.mark.parametrize("layer_map", [[0, 3], "random"])
def test_students_attend_with_sdpa(teacher, layer_map):
    """Where their class has it. It is set on the config by a private name, whatever the teacher was loaded with."""
    teacher.config._attn_implementation = "eager"
    expected = "sdpa" if teacher._supports_sdpa else "eager"
    student = make_student(teacher, 2, layer_map)
    assert {m.config._attn_implementation for m in student.modules() if hasattr(m, "config")} == {expected}


def test_a_half_precision_teacher_gives_an_fp32_student(teacher):
    student = make_student(teacher.half(), 2)
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_random_students(teacher):
    first, again, other = (make_student(teacher, 3, "random", seed=seed) for seed in (1, 1, 2))
    family = family_of(first)
    assert family.num_layers(first) == 3
    weights = [family.decoder(model)[0] for model in (first, again, other, teacher)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])
    assert family.num_layers(make_student(teacher, layer_map="random")) == 2
    deeper = make_student(teacher, 6, "random")
    assert len(family.layer_list(deeper)) == 6
    deeper(torch.randint(4, 64, (1, 9)))


def test_random_students_leave_the_global_generator_alone(teacher):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    make_student(teacher, 2, "random")
    assert torch.equal(torch.rand(1), expected)


def test_distilbert_has_the_published_number_of_parameters():
    with torch.device("meta"):
        student = make_student(BertForMaskedLM(BertConfig()), layer_map="distilbert")
    assert sum(p.numel() for p in student.parameters()) == 66_985_530
    assert sum(p.numel() for p in student.distilbert.parameters()) == 66_362_880


def test_token_type_row_0_goes_into_the_positions():
    teacher = rough(BertForMaskedLM(BertConfig(**SIZES)))
    student = make_student(teacher, 1)
    embeddings = teacher.bert.embeddings
    expected = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
    assert torch.equal(student.distilbert.embeddings.position_embeddings.weight, expected)


def test_an_untied_head_is_copied():
    teacher = rough(BertForMaskedLM(BertConfig(**SIZES, tie_word_embeddings=False)))
    assert not torch.equal(teacher.get_output_embeddings().weight, teacher.get_input_embeddings().weight)
    student = make_student(teacher, 4).eval()
    input_ids = torch.randint(4, 64, (2, 10))
    assert torch.allclose(student(input_ids).logits, teacher(input_ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        (("every_other", 12), (0, 2, 4, 6, 8, 10)),
        (("every_other", 12, 4), (0, 3, 6, 9)),
        (("every_other", 12, 12), tuple(range(12))),
        (("every_other", 7), (0, 2, 4)),
        (("every_other", 1), (0,)),
        (("last_of_each", 12), (1, 3, 5, 7, 9, 11)),
        (("last_of_each", 6, 4), (0, 2, 3, 5)),
        (("last_of_each", 7), (1, 3, 6)),
        (("last_of_each", 1), (0,)),
        (("distilbert", 12), (0, 2, 4, 7, 9, 11)),
        (("distilbert", 12, 6), (0, 2, 4, 7, 9, 11)),
        (([3, 3, 0], 4), (3, 3, 0)),
    ],
)
def test_layer_maps(arguments, layers):
    assert resolve_layer_map(*arguments) == layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("every_other", 4, 5),
            r"model.student_layers is 5 but the teacher has only 4 layers.*layer_map=random",
        ),
        (("every_other", 4, 0), "model.student_layers is 0; give at least 1"),
        (
            ("distilbert", 4),
            r"copies layers \[0, 2, 4, 7, 9, 11\] of a 12-layer teacher into 6; this is 6 layers from 4",
        ),
        (("distilbert", 12, 4), "this is 4 layers from 12; use every_other or a list"),
        (([0, 4], 4), r"names layers \[4\] that the teacher does not have; its layers are 0 to 3"),
        (([0, -1], 4), r"names layers \[-1\]"),
        (([], 4), r"model.layer_map \[\]"),
        (([0, 1, 1, 2], 3), "model.layer_map lists 4 layers but the teacher has only 3; .*layer_map=random"),
        (([0.9, 1.7], 4), r"model.layer_map \[0.9, 1.7\]: give whole numbers"),
        (([0, 2], 4, 3), "model.student_layers is 3 but model.layer_map lists 2 layers"),
        (("evry_other", 4), r"model.layer_map is 'evry_other'; choose every_other, last_of_each, distilbert"),
    ],
)
def test_layer_maps_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        resolve_layer_map(*arguments)


def test_other_students_that_do_not_fit_are_refused():
    bert, modern = MODELS["bert"](), MODELS["modernbert"]()
    with pytest.raises(ValueError, match=r"model.student_layers is 0"):
        make_student(bert, 0, "random")
    with pytest.raises(ValueError, match=r"puts layer 2 of this modernbert in place 0.*keep layer 0 first"):
        make_student(modern, layer_map=[2, 3])


@pytest.mark.parametrize(
    ("kind", "layer_map", "sizes", "message"),
    [
        ("bert", "random", {"width": 20}, r"multiple of its heads' width 8; it is 20: .*model.student_heads"),
        ("bert", "random", {"width": 30, "heads": 4}, "student_heads=4 does not divide .* width 30"),
        ("bert", "every_other", {"width": 40}, r"student_width=40 is more than the teacher's 32.*at most 32"),
        ("bert", "every_other", {"heads": 8}, r"student_heads=8 is more than the teacher's 4"),
        (
            "bert",
            "every_other",
            {"feed_forward": 49},
            r"student_feed_forward=49 is more than the teacher's 48",
        ),
        ("bert", "every_other", {"heads": 2}, r"student_heads=2 makes heads of 16 .* have 8; give 4 or more"),
        ("modernbert", "every_other", {"width": 24, "heads": 4}, r"heads of 6 .*stay whole: leave it out"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kind, layer_map, sizes, message):
    with pytest.raises(UserError, match=message):
        make_student(MODELS[kind](), 2, layer_map, **sizes)


def test_random_students_of_other_sizes(teacher):
    """Larger than the teacher in part, and with another width of the heads."""
    student = make_student(teacher, 2, "random", width=24, heads=2, feed_forward=96)
    sizes = student.config.hidden_size, student.config.num_attention_heads, shape_of(student).feed_forward
    assert sizes == (24, 2, 96)
    student(torch.randint(4, 64, (1, 9)))


def test_a_layer_norm_epsilon_that_distilbert_cannot_have_is_said(caplog):
    make_student(BertForMaskedLM(BertConfig(**SIZES, layer_norm_eps=1e-5)), 2)
    assert "epsilon 1e-12, the teacher's 1e-05" in caplog.text
