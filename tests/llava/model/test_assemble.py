"""Assembling: against LLaVA's forward pass written out by hand, and the rows that are added."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionModel, LlamaForCausalLM

from llava.errors import UsageError
from llava.model.assemble import EMBEDDING, OUTPUT, assemble, with_rows
from llava.model.projector import fresh_projector


def forward_by_hand(parts: Path, projector: dict[str, torch.Tensor], ids, pixels, layer: int):
    """LLaVA: features of one hidden state without the class token, projected, put in the text."""
    lm = LlamaForCausalLM.from_pretrained(parts / "lm").eval()
    tower = CLIPVisionModel.from_pretrained(parts / "clip").eval()
    with torch.no_grad():
        x = tower(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]
        for number, name in enumerate(("linear_1", "linear_2")):
            weight = projector[f"model.multi_modal_projector.{name}.weight"]
            bias = projector[f"model.multi_modal_projector.{name}.bias"]
            x = F.linear(F.gelu(x) if number else x, weight, bias)
        image = ids[0] == 340
        embeds = lm.model.embed_tokens(ids.masked_fill(ids == 340, 0))
        embeds[0, image] = x[0]
        return lm(inputs_embeds=embeds).logits


@pytest.mark.parametrize("layer", [-2, -1])
def test_computes_what_llava_computes(parts, logits_of, layer):
    model = assemble(parts / "lm", parts / "clip", feature_layer=layer)
    projector = fresh_projector(24, 32, torch.Generator().manual_seed(0))
    expected = forward_by_hand(parts, projector, logits_of.ids, logits_of.pixels, layer)
    # Two float32 paths through 5 layers; logits are of order 1 to 10.
    assert torch.allclose(logits_of(model), expected, atol=1e-4)
    assert expected.std() > 0.5


def test_configuration_is_llava_hf(parts):
    config = assemble(parts / "lm", parts / "clip").config
    assert (config.image_token_id, config.pad_token_id) == (340, 341)
    assert config.text_config.vocab_size == 384  # a multiple of 64
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert config.image_seq_length == 16


def test_class_token_makes_one_more_position(parts):
    config = assemble(parts / "lm", parts / "clip", feature_strategy="full").config
    assert config.image_seq_length == 17


def test_fresh_projector_follows_its_generator(parts):
    def weight(seed):
        generator = torch.Generator().manual_seed(seed)
        model = assemble(parts / "lm", parts / "clip", generator=generator)
        return model.model.multi_modal_projector.linear_1.weight

    assert torch.equal(weight(3), weight(3))
    assert not torch.equal(weight(3), weight(4))
    assert weight(3).abs().max() <= 24**-0.5


def test_new_rows_are_the_mean_and_old_rows_stay():
    old = torch.randn(10, 4)
    state = {EMBEDDING: old, OUTPUT: 2 * old}
    grown = with_rows(state, n_tokens=8, needed=12)
    assert grown[EMBEDDING].shape == (64, 4)
    assert torch.equal(grown[EMBEDDING][:10], old)
    mean = torch.stack([old[:8, i].sum() / 8 for i in range(4)])
    assert torch.allclose(grown[EMBEDDING][10:], mean.expand(54, 4), atol=1e-6)
    assert torch.allclose(grown[OUTPUT][10:], 2 * mean.expand(54, 4), atol=1e-6)


def test_a_model_with_room_keeps_its_rows():
    state = {EMBEDDING: torch.randn(12, 4)}
    assert with_rows(state, n_tokens=10, needed=12) is state


def test_tied_embeddings_stay_tied(parts, tmp_path, logits_of):
    lm = LlamaForCausalLM.from_pretrained(parts / "lm", tie_word_embeddings=True)
    lm.tie_weights()
    lm.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((parts / "lm/tokenizer.model").read_bytes())
    model = assemble(tmp_path, parts / "clip")
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert model.lm_head.weight.shape[0] == 384
    assert torch.isfinite(logits_of(model)).all()


def test_parts_in_the_wrong_place(parts):
    with pytest.raises(UsageError, match="no causal language model"):
        assemble(parts / "clip", parts / "lm")
    with pytest.raises(UsageError, match="no CLIP vision tower"):
        assemble(parts / "lm", parts / "lm")
    with pytest.raises(UsageError, match="no such model directory"):
        assemble(parts / "lm", parts / "nothing")
