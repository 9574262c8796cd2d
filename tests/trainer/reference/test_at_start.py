"""The reference is the policy as it starts, whatever trains: training equals training against a copy made before."""

import copy
import math

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tdpo.reference.at_start import AtStart
from tdpo.reference.cached_states import CachedStates
from tdpo.reference.second_model import SecondModel
from tdpo.reference.without_adapters import WithoutAdapters

from helpers.model_families import make_model
from helpers.trainer_cases import losses, make_trainer


def lora(**options):
    return LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": "all-linear", **options})


def with_lora(**options):
    torch.manual_seed(1)
    return get_peft_model(make_model("llama"), lora(**options))


def randomised(model, seed=2):
    """Adapters as if they had been trained before."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def with_unfrozen_norms():
    model = with_lora()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad = True
    return model


def with_two_adapters(trained):
    model = randomised(with_lora())
    model.add_adapter("second", lora(r=2))
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad = f".{trained}." in name
    return model


def with_injected_adapters():
    """As transformers adds adapters to its models, without a peft model around them."""
    torch.manual_seed(1)
    return peft.inject_adapter_in_model(lora(init_lora_weights=False), make_model("llama"))


def partly_frozen():
    model = make_model("llama")
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    model.model.layers[1].mlp.requires_grad_(True)
    return model


def tied_and_partly_frozen():
    model = make_model("qwen2")
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)  # and so the embeddings
    return model


def with_tuner(kind, **options):
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **options)
    torch.manual_seed(1)
    return randomised(get_peft_model(make_model("llama"), config))


POLICIES = {
    "continued from SFT": lambda: randomised(with_lora()),
    "continued DoRA": lambda: randomised(with_lora(use_dora=True)),
    "PiSSA": lambda: with_lora(init_lora_weights="pissa"),
    "OLoRA": lambda: with_lora(init_lora_weights="olora"),
    "orthogonal": lambda: with_lora(init_lora_weights="orthogonal"),
    "random matrices": lambda: with_lora(init_lora_weights=False),
    "all biases": lambda: get_peft_model(make_model("gpt2"), lora(bias="all", fan_in_fan_out=True)),
    "biases of adapted layers": lambda: get_peft_model(make_model("gpt2"), lora(bias="lora_only", fan_in_fan_out=True)),
    "lora_bias": lambda: randomised(with_lora(lora_bias=True)),
    "unfrozen norms": with_unfrozen_norms,
    "norms to save": lambda: with_lora(modules_to_save=["input_layernorm"]),
    "embeddings to save": lambda: randomised(with_lora(modules_to_save=["embed_tokens"])),
    "head to save": lambda: with_lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "adapted head": lambda: randomised(with_lora(target_modules=["q_proj", "lm_head"])),
    "adapted embeddings": lambda: randomised(with_lora(target_modules=["q_proj", "embed_tokens"])),
    "trained tokens": lambda: with_lora(trainable_token_indices=[5, 6, 7, 280]),
    "trained tokens of a tied head": lambda: get_peft_model(make_model("qwen2"), lora(trainable_token_indices=[5, 7])),
    "two adapters, the first trains": lambda: with_two_adapters("default"),
    "two adapters, the second trains": lambda: with_two_adapters("second"),
    "injected adapters": with_injected_adapters,
    "partly frozen": partly_frozen,
    "tied and partly frozen": tied_and_partly_frozen,
    "IA3": lambda: with_tuner("IA3", feedforward_modules=[]),
    "VeRA": lambda: with_tuner("Vera", r=4),
    "LoHa": lambda: with_tuner("LoHa", r=4),
    "OFT": lambda: with_tuner("OFT", r=0, oft_block_size=4),
}


def train(path, policy, reference=None, **options):
    trainer = make_trainer(path, policy, reference, max_steps=4, learning_rate=1e-2, **options)
    trainer.train()
    return trainer


def kl(trainer):
    return [entry["kl/rejected"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:the fused loss can't be used")
@pytest.mark.parametrize("name", POLICIES)
def test_equal_to_a_copy_in_every_bit(name, tmp_path):
    policy = POLICIES[name]()
    reference = copy.deepcopy(policy)
    against_copy = train(tmp_path / "copy", copy.deepcopy(policy), reference)
    ours = train(tmp_path / "ours", policy)
    assert isinstance(ours.reference, AtStart)
    assert losses(ours) == losses(against_copy)
    assert losses(ours)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert kl(ours) == kl(against_copy)
    assert kl(ours)[0] == pytest.approx(0, abs=1e-6)
    assert kl(ours)[-1] > 1e-4
    before, after = (dict(model.named_parameters()) for model in (reference, ours.model))
    assert any(not torch.equal(before[name], after[name]) for name in before if after[name].requires_grad)
    for name, parameter in after.items():
        assert parameter.requires_grad or torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("options", [{}, {"init_lora_weights": "gaussian"}, {"target_modules": ["q_proj"]}])
def test_new_adapters_are_taken_out(options, tmp_path):
    policy = with_lora(**options)
    against_copy = train(tmp_path / "copy", copy.deepcopy(policy), copy.deepcopy(policy))
    ours = train(tmp_path / "ours", policy)
    assert isinstance(ours.reference, WithoutAdapters)
    assert losses(ours) == losses(against_copy)
    assert kl(ours) == kl(against_copy)


def test_parts_of_new_adapters_that_are_frozen_stay_so(tmp_path):
    """Their gradients would count in the norm that is clipped."""
    policy = with_lora()
    for name, parameter in policy.named_parameters():
        parameter.requires_grad &= "lora_B" in name
    against_copy = train(tmp_path / "copy", copy.deepcopy(policy), copy.deepcopy(policy), max_grad_norm=0.5)
    ours = train(tmp_path / "ours", policy, max_grad_norm=0.5)
    assert isinstance(ours.reference, WithoutAdapters)
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == {
        name for name, parameter in against_copy.model.named_parameters() if parameter.requires_grad
    }
    assert losses(ours) == losses(against_copy)


def test_two_adapters_of_different_layers_are_taken_out(tmp_path):
    policy = with_lora(target_modules=["q_proj"])
    policy.add_adapter("second", lora(target_modules=["v_proj"]))
    policy.base_model.set_adapter(["default", "second"])
    assert isinstance(make_trainer(tmp_path, policy).reference, WithoutAdapters)


def test_a_copy_where_everything_trains(tmp_path):
    assert type(make_trainer(tmp_path, make_model("llama")).reference) is SecondModel


@pytest.mark.parametrize("name", ["continued from SFT", "PiSSA", "embeddings to save", "partly frozen", "new"])
def test_the_cache_is_of_the_same_reference(name, tmp_path):
    policy = with_lora() if name == "new" else POLICIES[name]()
    live = train(tmp_path / "live", copy.deepcopy(policy))
    cached = train(tmp_path / "cached", policy, precompute_reference=True, reference_dtype="float32")
    assert isinstance(cached.reference, CachedStates)
    assert losses(cached) == pytest.approx(losses(live), abs=1e-6)
    assert kl(cached) == pytest.approx(kl(live), rel=1e-4, abs=1e-6)


def test_a_reference_with_adapters_keeps_them(tmp_path):
    """Live and cached: a model that is given is taken as it is."""
    reference = randomised(with_lora())
    live = make_trainer(tmp_path, make_model("llama"), copy.deepcopy(reference)).evaluate()
    options = {"precompute_reference": True, "reference_dtype": "float32"}
    cached = make_trainer(tmp_path, make_model("llama"), reference, **options).evaluate()
    assert live["eval_kl/chosen"] > 1e-3
    assert cached["eval_kl/chosen"] == pytest.approx(live["eval_kl/chosen"], rel=1e-4)


def test_evaluation_between_steps_and_accumulated_gradients(tmp_path):
    options = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    policy = POLICIES["PiSSA"]()
    against_copy = train(tmp_path / "copy", copy.deepcopy(policy), copy.deepcopy(policy), **options)
    ours = train(tmp_path / "ours", policy, **options, gradient_checkpointing=True)
    assert losses(ours) == losses(against_copy)
    evaluated = [
        [entry["eval_kl/chosen"] for entry in t.state.log_history if "eval_loss" in entry] for t in (ours, against_copy)
    ]
    assert len(evaluated[0]) == 4
    assert evaluated[0] == evaluated[1]


def noisy(model):
    """A model that draws random numbers in evaluation mode too."""
    model.get_input_embeddings().register_forward_hook(
        lambda module, _, output: output + 0.1 * torch.randn_like(output)
    )
    return model


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("options", [{}, {"precompute_reference": True}])
def test_a_reference_that_draws_random_numbers_is_refused(given, options, tmp_path):
    models = [make_model("llama"), noisy(make_model("llama", 1))] if given else [noisy(make_model("llama"))]
    with pytest.raises(
        ValueError, match=f"two passes of {'ref_model' if given else 'model'}, LlamaForCausalLM, differ by"
    ):
        make_trainer(tmp_path, *models, **options)
