"""Models that sample with equal random numbers: coupled with each other, and each with its own distribution."""

import copy

import pytest
import torch
from tdpo.demo.sampling import sample
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, TOKENS = 7, 12
CHI_SQUARE = 22.46  # with 6 degrees of freedom, exceeded once in a thousand


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def prompts(count):
    return torch.randint(VOCABULARY, (count, 3), generator=torch.Generator().manual_seed(1))


def shared_share(one, other):
    """The share of response tokens before the first that differs."""
    return (one == other).long().cumprod(1).float().mean()


def test_equal_models_and_seeds_write_equal_texts(model):
    first = sample(model, prompts(200), TOKENS, seed=0)
    assert first.shape == (200, TOKENS)
    assert first.equal(sample(copy.deepcopy(model), prompts(200), TOKENS, seed=0))
    assert not first.equal(sample(model, prompts(200), TOKENS, seed=1))


def test_a_model_that_hardly_changed_writes_long_equal_beginnings(model):
    changed = copy.deepcopy(model)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in changed.parameters():
            weight.add_(0.003 * torch.randn_like(weight))
    first = sample(model, prompts(200), TOKENS, seed=0)
    coupled = sample(changed, prompts(200), TOKENS, seed=0)
    assert not first.equal(coupled)
    assert shared_share(first, coupled) > 0.8
    assert shared_share(first, sample(changed, prompts(200), TOKENS, seed=1)) < 0.4


def test_tokens_have_the_distribution_of_the_model(model):
    count, prompt = 4000, prompts(1)
    with torch.no_grad():
        logits = model(prompt).logits[0, -1]
    drawn = sample(model, prompt.expand(count, -1), 1, seed=3)[:, 0]
    expected = count * logits.softmax(0)
    found = torch.bincount(drawn, minlength=VOCABULARY)
    assert ((found - expected) ** 2 / expected).sum() < CHI_SQUARE
    assert expected.max() > 2 * expected.min() > 10  # a uniform distribution would not pass


def test_every_response_has_noise_of_its_own(model):
    responses = sample(model, prompts(1).expand(256, -1), TOKENS, seed=0)
    assert len(responses.unique(dim=0)) > 200  # 128, if every batch began the noise anew


def test_the_state_of_others_is_left_alone(model):
    state, training = torch.random.get_rng_state(), copy.deepcopy(model).train()
    sample(training, prompts(4), 2, seed=0)
    assert torch.random.get_rng_state().equal(state)
    assert training.training
