"""Adapters merged into weights give the logits of the adapted model, whatever they adapt and whatever is shared."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tdpo.models.merging import merge_adapters
from transformers import AutoModelForCausalLM

from helpers.model_families import make_model
from helpers.trainer_cases import change_what_trains

TOKENS = torch.tensor([[1, 2, 3, 4, 9]])
EMBEDDING, HEAD = "embed_tokens", "lm_head"
# What is adapted, and whether a head that shares the embedding's weight still does after the merge.
KINDS = {
    "layers": ({"target_modules": "all-linear"}, True),
    "the head": ({"target_modules": ["q_proj", HEAD]}, False),
    "the embedding": ({"target_modules": ["q_proj", EMBEDDING]}, False),
    "both": ({"target_modules": [HEAD, EMBEDDING]}, False),
    "the head by DoRA": ({"target_modules": [HEAD], "use_dora": True, "init_lora_weights": True}, False),
    "both as one": ({"target_modules": ["q_proj", HEAD], "ensure_weight_tying": True}, True),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}, True),
    "a copy of the head": ({"target_modules": ["q_proj"], "modules_to_save": [HEAD]}, False),
    "a copy of the embedding": ({"target_modules": ["q_proj"], "modules_to_save": [EMBEDDING]}, False),
    "a norm": ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, True),
}


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_the_trained_one(kind, shares, tmp_path):
    options, still_shares = KINDS[kind]
    make_model("llama", tie_word_embeddings=shares).save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, **{"init_lora_weights": False, **options})
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    change_what_trains(adapted)
    adapted.save_pretrained(tmp_path / "adapters")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = logits(base)
    merge_adapters(PeftModel.from_pretrained(base, tmp_path / "adapters")).save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not torch.allclose(logits(merged), before, atol=1e-2)
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=2e-4)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapters")
    torch.testing.assert_close(logits(merged), logits(again), rtol=1e-4, atol=2e-4)
    is_one = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert is_one == merged.config.tie_word_embeddings == (shares and still_shares)
