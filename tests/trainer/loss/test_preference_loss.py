"""The loss of a batch against the models' own logits: every sum of a sequence, with heads of all kinds."""

import warnings

import pytest
import torch
from tdpo.loss import preference_loss as loss
from tdpo.loss.preference_loss import FusedLoss, LogitsLoss

from helpers.model_families import FAMILIES, make_model
from helpers.trainer_cases import losses, make_trainer
from tdpo_ext import eager, linear_preference_loss


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
    assert not any(values.requires_grad for side in (output.chosen, output.rejected) for values in side)
    found = [torch.cat(sides) for sides in zip(output.chosen, output.rejected)]
    for name, ours, truth in zip(tokens._fields, found, expected):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-5, msg=name)
    (chosen_kl, rejected_kl), ratios = expected[tokens._fields.index("kl")].chunk(2), expected[0] - expected[1]
    margins = (ratios[:4] - ratios[4:]) - 0.7 * (rejected_kl - chosen_kl)
    torch.testing.assert_close(output.loss.double(), torch.log1p(torch.exp(-0.3 * margins)).mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_loss_equals_the_logits_path(family, tmp_path):
    trainer = make_trainer(tmp_path, model=make_model(family, 0), ref_model=make_model(family, 1))
    assert isinstance(trainer.loss, FusedLoss)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    fused = trainer.model(preference=batch)
    fused.loss.backward()
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    plain = LogitsLoss(trainer.loss.policy, trainer.reference, trainer.loss.objective)(batch)
    plain.loss.backward()
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused.chosen.kl, plain.chosen.kl, rtol=1e-4, atol=1e-5)
    for ours, theirs in ((fused.chosen, plain.chosen), (fused.rejected, plain.rejected)):
        assert torch.equal(ours.correct, theirs.correct)
        assert torch.equal(ours.tokens, theirs.tokens)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_logits_path_equals_the_oracle(tmp_path):
    models = {"model": make_model("gpt2", 0), "ref_model": make_model("gpt2", 1)}
    trainer = make_trainer(tmp_path, **models, shared_prompts="never")
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.model(preference=batch).loss
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = torch.full_like(batch["input_ids"], -100)
    labels.view(-1)[batch["rows"]] = batch["targets"]
    divergence = eager.token_divergence(
        trainer.model(**inputs).logits.double(), trainer.ref_model(**inputs).logits.double(), labels
    )
    expected = trainer.loss.objective(*divergence.per_sequence().chunk(2)).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_unknown_heads_fall_back_with_one_warning(tmp_path):
    model = with_odd_head(make_model("llama"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(tmp_path, model=model)
    ours = [str(warning.message) for warning in caught if "fused" in str(warning.message)]
    assert len(ours) == 1
    assert "OddHead" in ours[0]
    trainer.train()
    assert len(losses(trainer)) == 6


@pytest.mark.parametrize("ref_softcap", [None, 9.0])
def test_other_softcaps_need_the_logits(ref_softcap, tmp_path):
    policy, frozen = make_model("gemma2", 0), make_model("gemma2", 1)
    frozen.config.final_logit_softcapping = ref_softcap
    with pytest.warns(UserWarning, match="cap their logits differently"):
        trainer = make_trainer(tmp_path, model=policy, ref_model=frozen, shared_prompts="never")
    batch = next(iter(trainer.get_train_dataloader()))
    output = trainer.model(preference=batch)
    logits = frozen(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    expected = logits.flatten(0, 1)[batch["rows"]].gather(-1, batch["targets"][:, None]).sum()
    torch.testing.assert_close(output.chosen.ref_logps.sum() + output.rejected.ref_logps.sum(), expected)


def test_the_budget_reaches_the_fused_loss(tmp_path, monkeypatch):
    budgets = []

    def record(*arguments, **options):
        budgets.append(options["logits_budget"])
        return linear_preference_loss(*arguments, **options)

    monkeypatch.setattr(loss, "linear_preference_loss", record)
    for budget in (None, 123_456):
        trainer = make_trainer(tmp_path, logits_budget=budget)
        trainer.model(preference=next(iter(trainer.get_train_dataloader())))
    assert budgets == [None, 123_456]
