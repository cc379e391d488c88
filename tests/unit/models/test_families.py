"""The family table: what each adapter finds must be what the model itself computes."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    CamembertConfig,
    CamembertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    MPNetConfig,
    MPNetForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from train.models.families import FAMILIES, POSITIONS_AFTER_PADDING, family_of, has_head, max_positions

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
MODELS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(
            vocab_size=64, dim=32, n_layers=4, n_heads=4, hidden_dim=48, max_position_embeddings=40
        )
    ),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES, pad_token_id=1)),
    "xlm-roberta": lambda: XLMRobertaForMaskedLM(XLMRobertaConfig(**SIZES, pad_token_id=1)),
    "camembert": lambda: CamembertForMaskedLM(CamembertConfig(**SIZES, pad_token_id=1)),
    "mpnet": lambda: MPNetForMaskedLM(MPNetConfig(**SIZES, pad_token_id=1)),
    "electra": lambda: ElectraForMaskedLM(ElectraConfig(**SIZES, embedding_size=24)),
    "deberta-v2": lambda: DebertaV2ForMaskedLM(
        DebertaV2Config(**SIZES, relative_attention=True, pos_att_type="p2c|c2p", conv_kernel_size=3)
    ),
    # As version 3: positions only relative, mapped by the content's own projections, and no token types.
    "deberta-v2, shared": lambda: DebertaV2ForMaskedLM(
        DebertaV2Config(
            **SIZES,
            legacy=False,
            relative_attention=True,
            pos_att_type="p2c|c2p",
            share_att_key=True,
            position_biased_input=False,
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            type_vocab_size=0,
        )
    ),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(
            **SIZES,
            pad_token_id=0,
            bos_token_id=2,
            cls_token_id=2,
            eos_token_id=3,
            sep_token_id=3,
            local_attention=8,
        )
    ),
}
if Version(transformers.__version__) < Version("5.20"):  # cannot load DeBERTa-v3's head
    del MODELS["deberta-v2, shared"]


def rough(model):
    """Random biases and norms too, so that nothing is at a value that hides a mistake."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=sorted(MODELS))
def model(request):
    torch.manual_seed(0)
    return rough(MODELS[request.param]())


def test_every_family_has_a_model_here():
    assert {kind.split(",")[0] for kind in MODELS} == set(FAMILIES)


@torch.no_grad()
def test_encoder_transform_and_decoder_make_the_models_own_logits(model):
    family = family_of(model)
    input_ids = torch.randint(4, 64, (2, 20))
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, 15:] = 0
    expected = model(input_ids, attention_mask=mask, output_hidden_states=True)
    encoded = family.encode(model, input_ids, mask, output_hidden_states=True)
    weight, bias = family.decoder(model)
    logits = family.transform(model, encoded.last_hidden) @ weight.T + bias
    assert torch.allclose(logits[mask > 0], expected.logits[mask > 0], atol=1e-5)
    assert len(encoded.hidden_states) == 5
    assert torch.equal(encoded.hidden_states[-1], encoded.last_hidden)
    assert torch.equal(family.encode(model.base_model, input_ids, mask).last_hidden, encoded.last_hidden)
    assert family.encode(model, input_ids).hidden_states == ()
    assert weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_sizes(model):
    family = family_of(model)
    for each in (model, model.base_model):
        assert family.num_layers(each) == len(family.layer_list(each)) == 4
        assert family.width(each) == 32
    assert (has_head(model), has_head(model.base_model)) == (True, False)
    longest = max_positions(model.config)
    assert longest == (38 if model.config.model_type in POSITIONS_AFTER_PADDING else 40)
    model(torch.randint(4, 64, (1, longest)))


def test_mpnet_counts_positions_from_2_whatever_its_padding():
    model = MPNetForMaskedLM(MPNetConfig(**SIZES, pad_token_id=0))
    assert max_positions(model.config) == 38
    model(torch.randint(4, 64, (1, 38)))


def test_head_prefixes_cover_the_head_and_nothing_of_the_encoder(model):
    family = family_of(model)
    inside = {f"{family.encoder}.{name}" for name, _ in getattr(model, family.encoder).named_parameters()}
    for name, _ in model.named_parameters():
        assert name.startswith(family.head) == (name not in inside)


def test_an_unknown_architecture_is_refused():
    model = AlbertForMaskedLM(AlbertConfig(**SIZES, embedding_size=32))
    with pytest.raises(ValueError, match=r"'albert' is not supported; known are bert, distilbert, roberta"):
        family_of(model)


@torch.no_grad()
def test_word_embeddings_looked_up_before_change_nothing(model):
    """Padding included: RoBERTa counts positions by token id."""
    family = family_of(model)
    input_ids = torch.randint(4, 64, (2, 20))
    input_ids[1, 12:] = model.config.pad_token_id
    mask = (input_ids != model.config.pad_token_id).long()
    expected = family.encode(model, input_ids, mask).last_hidden
    embedded = model.get_input_embeddings()(input_ids)
    assert torch.equal(family.encode(model, input_ids, mask, inputs_embeds=embedded).last_hidden, expected)
