"""What a trainer refuses before it tokenizes data, in one sentence each, and what it must not refuse."""

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from tdpo.models.checks import check_policy

from helpers.model_families import SMALL, make_model, make_tokenizer
from helpers.refused_models import BART, BERT, LORA, WRONG, adapted, checked, tokenizer_with, vision_model
from helpers.trainer_cases import make_trainer


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("argument", ["model", "ref_model"])
@pytest.mark.parametrize("kind", WRONG)
def test_models_of_a_wrong_kind_are_refused(kind, argument):
    make, message = WRONG[kind]
    models = {"model": make_model("llama"), argument: make()}
    with pytest.raises(ValueError, match=f"^{argument} is .*{message}") as error:
        checked(**models)
    one_sentence(error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["masked BERT", "XLNet", "Gemma for embeddings"])
def test_precision_hides_no_look_ahead(kind, dtype):
    with pytest.raises(ValueError, match="earlier tokens see later ones"):
        checked(WRONG[kind][0]().to(dtype))


def test_what_is_no_model_of_transformers_is_refused():
    for given in (torch.nn.Linear(2, 2), torch.nn.DataParallel(make_model("llama"))):
        with pytest.raises(TypeError, match="no model of transformers"):
            checked(given)


class RoundingLayer(torch.nn.Module):
    """Rounds otherwise by what is beside a token, as experts do that get other tokens with it."""

    def forward(self, hidden):
        jitter = 1 + 3e-3 * torch.sin(hidden.detach().sum((1, 2), keepdim=True) * 1e3)
        return hidden * jitter


def rounding_model():
    model = make_model("llama")
    model.model.norm = torch.nn.Sequential(model.model.norm, RoundingLayer())
    return model


RIGHT = {
    "BERT as a decoder": lambda: t.BertLMHeadModel(t.BertConfig(**BERT, is_decoder=True)),
    "BART as a decoder": lambda: t.BartForCausalLM(t.BartConfig(**BART)),
    "experts in bfloat16": lambda: t.MixtralForCausalLM(t.MixtralConfig(**SMALL, num_local_experts=4)).bfloat16(),
    "experts that round": rounding_model,
    "no positions": lambda: t.MambaForCausalLM(t.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2)),
    "a head of zeros": lambda: zero_head(make_model("llama")),
    "an adapted head": lambda: get_peft_model(make_model("llama"), LoraConfig(**{**LORA, "target_modules": "lm_head"})),
    "a trained copy of the embedding": lambda: get_peft_model(
        make_model("llama"), LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"])
    ),
    "trained tokens": lambda: get_peft_model(make_model("llama"), LoraConfig(**LORA, trainable_token_indices=[1, 2])),
}


def zero_head(model):
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


@pytest.mark.parametrize("kind", RIGHT)
def test_models_of_a_right_kind_are_not(kind):
    model = RIGHT[kind]()
    checked(model, RIGHT[kind]())
    check_policy(model, None, make_tokenizer(), trains=True)
    assert model.training == RIGHT[kind]().training


def test_a_model_of_images_trains_on_text_where_it_can(tmp_path):
    trainer = make_trainer(tmp_path, model=vision_model(), max_steps=1)
    trainer.train()


def test_the_policy_is_no_reference_of_itself(tmp_path):
    model, wrapped = make_model("llama"), adapted()
    for models in ((model, model), (wrapped, wrapped), (wrapped, wrapped.get_base_model())):
        with pytest.raises(ValueError, match=r"^ref_model is model itself, which trains: leave ref_model out"):
            make_trainer(tmp_path, *models)


@pytest.mark.parametrize("memory", ["one parameter", "one storage"])
def test_a_reference_shares_nothing_that_trains(memory, tmp_path):
    model, reference = make_model("llama"), make_model("llama", 1)
    shared = model.model.layers[1].mlp.up_proj.weight
    if memory == "one storage":
        shared = torch.nn.Parameter(shared.detach(), requires_grad=False)
    reference.model.layers[1].mlp.up_proj.weight = shared
    message = "^ref_model shares model.layers.1.mlp.up_proj.weight with model, which trains it"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model, reference)
    trainer = make_trainer(tmp_path, model, reference, peft_config=LoraConfig(**LORA), max_steps=1)
    trainer.train()  # what is shared is frozen


def test_adapters_may_train_what_a_reference_shares(tmp_path):
    model, reference = make_model("qwen2"), make_model("qwen2", 1)
    reference.model.layers[0].self_attn.q_proj.bias = model.model.layers[0].self_attn.q_proj.bias
    with pytest.raises(ValueError, match=r"^ref_model shares model.layers.0.self_attn.q_proj.bias with model"):
        make_trainer(tmp_path, model, reference, peft_config=LoraConfig(**LORA, bias="all"))


def test_a_generation_config_that_cannot_be_saved_is_refused(tmp_path):
    for name, value in {"temperature": 0.5, "top_p": 0.7}.items():
        model = make_model("llama")
        setattr(model.generation_config, name, value)  # without do_sample
        with pytest.raises(ValueError, match=f"^model.generation_config can't be saved, .*{name}") as error:
            make_trainer(tmp_path, model=model)
        one_sentence(error)
        make_trainer(tmp_path, model=model, peft_config=LoraConfig(**LORA))  # of which the adapters alone are saved
        fine = make_model("llama")
        setattr(fine.generation_config, name, value)
        fine.generation_config.do_sample = True
        make_trainer(tmp_path, model=fine)


def test_what_training_changes_in_a_generation_config_counts(tmp_path):
    """One that was loaded is saved as it was, with a warning, but not once its special tokens are the tokenizer's."""
    model = make_model("llama")
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.5
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(path.read_text().replace('"do_sample": true', '"do_sample": false'))
    unchanged = t.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    unchanged.save_pretrained(tmp_path / "again")
    make_trainer(tmp_path, model=unchanged, max_steps=1).train()
    unchanged.save_pretrained(tmp_path / "again")
    changed = t.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = tokenizer_with(pad_token="<|end|>", eos_token="!")
    with pytest.raises(ValueError, match=r"^model.generation_config can't be saved"):
        check_policy(changed, None, tokenizer, trains=True)
