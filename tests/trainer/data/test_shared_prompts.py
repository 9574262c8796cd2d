"""A pair's prompt in the input once: the same states, losses and gradients as of two sequences, and where it is off."""

import pytest
import torch
import transformers
from peft import LoraConfig
from tdpo.models.attention_masks import branch_mask

from helpers.model_families import SMALL, make_model
from helpers.trainer_cases import change_what_trains, make_trainer

ROWS = [
    {"prompt_ids": [1, 2], "chosen_ids": [3, 9], "rejected_ids": [4, 5, 9]},
    {"prompt_ids": [], "chosen_ids": [7, 9], "rejected_ids": [8, 9]},
]


def test_the_mask_of_branches():
    mask = branch_mask(torch.tensor([[0, 1, 2, 3, 5, -1, -1]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


def windowed(family, seed):
    """A model whose sliding window is shorter than the sequences."""
    torch.manual_seed(seed)
    if family == "gemma3":  # layers with the window and layers without
        types = ["sliding_attention", "full_attention"]
        config = transformers.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=5, layer_types=types)
    else:
        config = transformers.MistralConfig(**SMALL, sliding_window=5)
    return transformers.AutoModelForCausalLM.from_config(config)


MODELS = {
    **{family: lambda seed, family=family: make_model(family, seed) for family in ("gpt2", "llama", "phi", "qwen3")},
    **{
        f"{family} with a window": lambda seed, family=family: windowed(family, seed)
        for family in ("mistral", "gemma3")
    },
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_equals_separate_sequences(name, packed, attention, tmp_path):
    results = []
    for shared in ("never", "always"):
        models = {"model": MODELS[name](0), "ref_model": MODELS[name](1)}
        with torch.no_grad():  # attention that tells tokens apart
            for model in models.values():
                model.set_attn_implementation(attention)
                for parameter_name, parameter in model.named_parameters():
                    if "attn" in parameter_name and parameter.dim() == 2:
                        parameter.mul_(15)
        trainer = make_trainer(tmp_path, **models, padding_free=packed and shared == "always", shared_prompts=shared)
        batch = next(iter(trainer.get_train_dataloader()))
        output = trainer.model(preference=batch)
        output.loss.backward()
        results.append((output, {name: p.grad for name, p in trainer.model.named_parameters()}, batch))
    (apart, grads, batch), (together, shared_grads, shared_batch) = results
    assert shared_batch["input_ids"].numel() < batch["input_ids"].numel()
    torch.testing.assert_close(together.loss, apart.loss, rtol=1e-5, atol=1e-6)
    for mine, other in zip((*together.chosen, *together.rejected), (*apart.chosen, *apart.rejected)):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(shared_grads[name], grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("options", [{"precompute_reference": True, "reference_dtype": "float32"}, {"peft": True}])
def test_with_a_cache_and_with_adapters(options, tmp_path):
    results = []
    for shared in ("never", "auto"):
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        arguments = {"model": make_model("llama", 0), "shared_prompts": shared, "padding_free": shared == "auto"}
        if "peft" in options:
            arguments["peft_config"] = config
        else:
            arguments |= {"ref_model": make_model("llama", 1), **options}
        trainer = make_trainer(tmp_path, **arguments)
        assert trainer.data_collator.shared_prompts == (shared == "auto")
        if "peft" in options:
            change_what_trains(trainer.model)
        batch = next(iter(trainer.get_train_dataloader()))
        results.append(trainer.model(preference=batch))
    assert results[0].chosen.kl.min() > 1e-4
    for mine, other in zip((*results[0].chosen, *results[0].rejected), (*results[1].chosen, *results[1].rejected)):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
