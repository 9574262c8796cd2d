"""No dropout where it is disabled, wherever a model holds it, and never in the reference."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.trainer_cases import losses, make_trainer

LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"}
DROPOUT = {
    "opt": {"dropout": 0.3, "attention_dropout": 0.2, "layerdrop": 0.2},
    "xglm": {"dropout": 0.3, "attention_dropout": 0.2, "layerdrop": 0.2},
    "llama": {"attention_dropout": 0.3},
    "falcon": {"attention_dropout": 0.3, "hidden_dropout": 0.2},
    "gpt_neo": {"attention_dropout": 0.3, "resid_dropout": 0.2, "embed_dropout": 0.2},
    "persimmon": {"attention_dropout": 0.3, "hidden_dropout": 0.2},
}
SIZES = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "llama": {},
    "falcon": {},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "persimmon": {},
}


def with_dropout(family):
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 0}
    config = AutoConfig.for_model(family, **{**sizes, "eos_token_id": 0, **SIZES[family], **DROPOUT[family]})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.filterwarnings("ignore:the fused loss can't be used")
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("family", DROPOUT)
def test_dropout_held_as_a_number_is_off_and_saved_as_it_was(family, adapters, tmp_path):
    config = LoraConfig(**LORA) if adapters else None
    trainer = make_trainer(tmp_path, with_dropout(family), peft_config=config, max_steps=1)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.state.log_history[0]["kl/rejected"] == pytest.approx(0, abs=1e-6)
    if not adapters:
        trainer.save_model(tmp_path / "saved")
        saved = AutoConfig.from_pretrained(tmp_path / "saved")
        assert {name: getattr(saved, name) for name in DROPOUT[family]} == DROPOUT[family]


@pytest.mark.parametrize("name", ["new", "continued from SFT", "everything"])
def test_the_reference_drops_nothing_where_the_policy_does(name, tmp_path):
    policy = with_dropout("llama")
    if name != "everything":
        torch.manual_seed(1)
        policy = get_peft_model(policy, LoraConfig(**LORA, lora_dropout=0.5, init_lora_weights=name == "new"))
    trainer = make_trainer(tmp_path, policy, disable_dropout=False)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    modes = [module.training for module in trainer.model.modules()]
    outputs = [trainer.model(preference=batch).chosen for _ in range(2)]
    assert torch.equal(outputs[0].ref_logps, outputs[1].ref_logps)
    assert not torch.equal(outputs[0].logps, outputs[1].logps)
    assert [module.training for module in trainer.model.modules()] == modes
