"""The loss of a batch against the models' own logits: every sum of a sequence, with heads of all kinds."""

import pytest
import torch

from helpers.model_families import make_model
from helpers.trainer_cases import make_trainer
from tdpo_ext import eager


class OddHead(torch.nn.Module):
    """A head that is no linear layer, so that its logits must be materialised."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden):
        return 2 * self.head(hidden).sin()


def with_odd_head(model):
    model.lm_head = OddHead(model.lm_head)
    return model


def with_logit_scale(seed, scale):
    model = make_model("cohere", seed)
    model.logit_scale = model.config.logit_scale = scale
    return model


PAIRS = {
    "policy and reference scale their logits": lambda: (with_logit_scale(0, 0.25), with_logit_scale(1, 0.5)),
    "one of them scales its logits": lambda: (make_model("granite", 0), make_model("llama", 1)),
    "one of them has a bias": lambda: (make_model("llama", 0), make_model("phi", 1)),
    "the reference is wider": lambda: (make_model("llama", 0), make_model("qwen2", 1, hidden_size=48)),
    "from the policy's logits": lambda: (with_odd_head(make_model("llama", 0)), make_model("llama", 1)),
    "from the reference's logits": lambda: (make_model("llama", 0), with_odd_head(make_model("llama", 1))),
}


@pytest.mark.filterwarnings("ignore:the fused loss can't be used")
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("pair", PAIRS)
def test_every_sum_is_that_of_the_models_own_logits(pair, direction, tmp_path):
    policy, frozen = PAIRS[pair]()
    options = {"kl_direction": direction, "alpha": 0.7, "beta": 0.3, "shared_prompts": "never"}
    trainer = make_trainer(tmp_path, model=policy, ref_model=frozen, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    output = trainer.model(preference=batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits, ref_logits = (
            model(**inputs).logits.flatten(0, 1)[batch["rows"]].double() for model in (policy, frozen)
        )
    tokens = eager.token_divergence(logits, ref_logits, batch["targets"], kl_direction=direction)
    expected = [torch.stack([part.sum() for part in values.split(batch["row_lengths"])]) for values in tokens]
    found = [torch.cat(sides) for sides in zip(output.chosen, output.rejected)]
    for name, ours, truth in zip(tokens._fields, found, expected):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-5, msg=name)
    (chosen_kl, rejected_kl), ratios = expected[tokens._fields.index("kl")].chunk(2), expected[0] - expected[1]
    margins = (ratios[:4] - ratios[4:]) - 0.7 * (rejected_kl - chosen_kl)
    torch.testing.assert_close(output.loss.double(), torch.log1p(torch.exp(-0.3 * margins)).mean(), rtol=1e-4, atol=0)
