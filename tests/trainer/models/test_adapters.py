"""Adapters that the loss can train, and what of a policy trains."""

import copy

import peft
import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tdpo.models.checks import check_policy

from helpers.model_families import make_model, make_tokenizer
from helpers.refused_models import LORA, OUTSIDE, adapted, checked, loaded
from helpers.trainer_cases import make_trainer


def test_a_policy_of_which_nothing_trains_is_refused(tmp_path):
    frozen = make_model("gpt2").requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter that trains: call model.requires_grad_\(True\)"):
        make_trainer(tmp_path, model=frozen)
    with pytest.raises(ValueError, match="no parameter that trains: load its adapters with is_trainable=True"):
        make_trainer(tmp_path, model=loaded(tmp_path))
    make_trainer(tmp_path, model=loaded(tmp_path, is_trainable=True))
    inside = make_model("llama")
    inside.load_adapter(str(tmp_path / "adapters"))
    inside.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that trains: load its adapters with is_trainable=True"):
        make_trainer(tmp_path, model=inside)


def test_a_frozen_policy_may_be_evaluated():
    check_policy(make_model("gpt2").requires_grad_(False), make_model("gpt2"), make_tokenizer(), trains=False)


def test_parameters_that_take_no_part_are_noticed(tmp_path):
    model = adapted()
    model.add_adapter("other", LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".other." in name)
    with pytest.raises(ValueError, match=r"none of them takes part in its logits: make the adapters .*set_adapter"):
        make_trainer(tmp_path, model=model)
    model.set_adapter("other")
    make_trainer(tmp_path, model=model)


def test_merged_and_disabled_adapters_are_refused(tmp_path):
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into its weights: unmerge them \(unmerge_adapter\)"):
        make_trainer(tmp_path, model=model)
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"disabled: enable them \(enable_adapter_layers\)"):
        make_trainer(tmp_path, model=model)
    model.base_model.enable_adapter_layers()
    make_trainer(tmp_path, model=model)


def test_adapters_upon_adapters_are_refused(tmp_path):
    config, wrapped = LoraConfig(**LORA), adapted()
    inside = make_model("llama")
    peft.inject_adapter_in_model(LoraConfig(**LORA), inside)
    for model in (wrapped, wrapped.get_base_model(), inside):
        with pytest.raises(ValueError, match="peft_config is given, but model has adapters already"):
            make_trainer(tmp_path, model=model, peft_config=config)
    make_trainer(tmp_path, model=wrapped.merge_and_unload(), peft_config=config)


def test_data_that_are_refused_leave_a_model_without_adapters(tmp_path):
    model, config = make_model("llama"), LoraConfig(**LORA)
    with pytest.raises(ValueError, match="the dataset lacks rejected"):
        make_trainer(tmp_path, model=model, peft_config=config, train_dataset=Dataset.from_list([{"chosen": "a"}]))
    make_trainer(tmp_path, model=model, peft_config=config)


def test_a_peft_config_must_be_one(tmp_path):
    with pytest.raises(TypeError, match=r"^peft_config is {'r': 4}; a configuration of peft"):
        make_trainer(tmp_path, peft_config={"r": 4})


@pytest.mark.parametrize("kind", OUTSIDE)
def test_adapters_that_work_outside_the_model_are_refused(kind):
    config, message = OUTSIDE[kind]
    with pytest.raises(ValueError, match=f"^peft_config has adapters of the kind {message}"):
        checked(make_model("llama"), peft_config=config)
    for argument, models in {"model": [], "ref_model": [make_model("llama")]}.items():
        with pytest.raises(ValueError, match=f"^{argument} has adapters of the kind {message}"):
            checked(*models, get_peft_model(make_model("llama"), config))


INSIDE = {
    "LoRA": LoraConfig(**LORA),
    "DoRA": LoraConfig(**LORA, use_dora=True),
    "IA3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    "LoHa": peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2),
    "OFT": peft.OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=4, r=0),
    "VeRA": peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2),
    "norms": peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
    "tokens": peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[1, 2]),
}


@pytest.mark.parametrize("kind", INSIDE)
def test_adapters_in_layers_are_not(kind):
    config = copy.deepcopy(INSIDE[kind])
    checked(make_model("llama"), peft_config=config)
    policy = get_peft_model(make_model("llama"), config)
    checked(policy)
    check_policy(policy, None, make_tokenizer(), trains=True)


def test_what_a_peft_model_adds_to_its_model_is_noticed():
    policy = adapted()
    forward = policy.forward

    def scaled(*args, **inputs):
        output = forward(*args, **inputs)
        return type(output)(logits=1.01 * output.logits)

    policy.forward = scaled
    with pytest.raises(ValueError, match="model is PeftModelForCausalLM, whose logits are not those of the model"):
        check_policy(policy, None, make_tokenizer(), trains=True)
