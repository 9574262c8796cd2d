"""The trainer on tiny models: the fused path against logits, resumption, metrics, and bad input."""

import copy
import warnings

import pytest
import torch
from datasets import Dataset
from tdpo import CausalLM
from tdpo.loss.preference_loss import FusedLoss, LogitsLoss

from helpers.model_families import FAMILIES, make_model
from helpers.trainer_cases import losses, make_trainer
from tdpo_ext import eager


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


def test_a_copy_of_the_policy_stands_alone(tmp_path):
    trainer = make_trainer(tmp_path, model=make_model("llama", 0), ref_model=make_model("llama", 1))
    batch = next(iter(trainer.get_train_dataloader()))
    other = copy.deepcopy(trainer.model)
    before = trainer.model(preference=batch).loss
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    assert torch.equal(trainer.model(preference=batch).loss, before)
    with pytest.raises(RuntimeError, match="no preference loss"):
        other(preference=batch)
    tokens = torch.tensor([[1, 2, 3]])
    assert not torch.equal(other(input_ids=tokens).logits, trainer.model(input_ids=tokens).logits)


class ScaledHead(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden):
        return 2 * self.head(hidden)


def test_unknown_heads_fall_back_with_one_warning(tmp_path):
    model = make_model("llama")
    model.lm_head = ScaledHead(model.lm_head)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(tmp_path, model=model)
    ours = [str(warning.message) for warning in caught if "fused" in str(warning.message)]
    assert len(ours) == 1
    assert "ScaledHead" in ours[0]
    trainer.train()
    assert len(losses(trainer)) == 6


def test_scaled_logits_are_noticed():
    model = make_model("llama")
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 1.5 * output.logits
        return output

    model.forward = scaled
    assert "not a linear" in CausalLM.of(model).fallback_reason


def test_why_a_model_cannot_be_tried_is_said():
    model = make_model("llama")

    def broken(*args, **kwargs):
        raise RuntimeError("shape '[32, 0]' is invalid")

    model.forward = broken
    reason = CausalLM.of(model).fallback_reason
    assert reason == "its backbone or its logits can't be tried on two tokens: shape '[32, 0]' is invalid"


@pytest.mark.parametrize("variant", ["tdpo2", "tdpo1", "dpo"])
def test_training_raises_margins(variant, tmp_path):
    trainer = make_trainer(tmp_path, variant=variant, max_steps=12)
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[11]
    assert last["rewards/margins"] > first["rewards/margins"] + 0.05
    assert last["loss"] < first["loss"]


@pytest.mark.parametrize(("variant", "alpha", "weight"), [("tdpo2", 0.7, 0.7), ("tdpo1", 0.5, 1.0), ("dpo", 0.5, 0.0)])
def test_a_step_follows_the_formulas_gradient(variant, alpha, weight, tmp_path):
    """One step of SGD on a whole epoch, by autograd of the paper's formulas on the models' own logits."""
    policy, frozen = make_model("llama", 0), make_model("llama", 1)
    copied = copy.deepcopy(policy)
    options = {"variant": variant, "alpha": alpha, "beta": 0.3, "optim": "sgd", "max_grad_norm": 0.0}
    options |= {"learning_rate": 0.05, "per_device_train_batch_size": 24, "max_steps": 1}
    trainer = make_trainer(tmp_path, model=policy, ref_model=frozen, **options)
    trainer.train()

    def sums(row, side):
        ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
        first = len(row["prompt_ids"])
        logits, ref_logits = (model(input_ids=ids).logits[0, first - 1 : -1] for model in (copied, frozen))
        values = eager.token_divergence(logits, ref_logits, ids[0, first:])
        return values.logratio.sum(), values.kl.sum()

    losses_by_hand = []
    for row in trainer.train_dataset:
        (chosen, chosen_kl), (rejected, rejected_kl) = (sums(row, side) for side in ("chosen", "rejected"))
        if variant == "tdpo2":  # whose reference of the margin gets no gradient
            chosen_kl = chosen_kl.detach()
        margin = chosen - rejected - weight * (rejected_kl - chosen_kl)
        losses_by_hand.append(-torch.nn.functional.logsigmoid(0.3 * margin))
    expected = torch.stack(losses_by_hand).mean()
    expected.backward()
    assert losses(trainer) == [pytest.approx(expected.item(), rel=1e-4)]
    for name, parameter in copied.named_parameters():
        step = policy.get_parameter(name).detach() - parameter.detach()
        torch.testing.assert_close(step, -0.05 * parameter.grad, rtol=2e-3, atol=2e-6, msg=name)


def test_processes_that_tokenize_are_as_many_as_asked_for(tmp_path, monkeypatch):
    processes, map_rows = [], Dataset.map

    def recorded(dataset, *arguments, num_proc=None, **options):
        processes.append(num_proc)
        return map_rows(dataset, *arguments, **options)

    monkeypatch.setattr(Dataset, "map", recorded)
    make_trainer(tmp_path, dataset_num_proc=2)
    assert processes == [2, 2]  # of the training and of the evaluation data


def test_metrics_have_their_names(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    wanted = {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
    wanted |= {"kl/chosen", "kl/rejected", "kl/margin", "logps/chosen", "logps/rejected"}
    wanted |= {"entropy", "mean_token_accuracy"}
    assert wanted <= set(trainer.state.log_history[0])
    evaluated = trainer.evaluate()
    assert {f"eval_{name}" for name in wanted} <= set(evaluated)
    log = trainer.state.log_history[0]
    assert log["kl/margin"] == pytest.approx(log["kl/rejected"] - log["kl/chosen"], abs=1e-6)
    assert log["rewards/chosen"] == pytest.approx(0, abs=1e-4)  # the first step starts at the reference


def test_the_reference_is_frozen(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    before = {name: value.clone() for name, value in trainer.ref_model.state_dict().items()}
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.ref_model.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_resume_is_exact(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1}
    unbroken = make_trainer(tmp_path / "a", **options)
    unbroken.train()
    resumed = make_trainer(tmp_path / "b", ref_model=make_model("gpt2"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(resumed) == losses(unbroken)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, unbroken.model.state_dict()[name]), name


def test_gradient_accumulation(tmp_path):
    whole = make_trainer(tmp_path, max_steps=2, optim="sgd")
    whole.train()
    parts = make_trainer(
        tmp_path, max_steps=2, optim="sgd", per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    for name, value in parts.model.state_dict().items():
        torch.testing.assert_close(value, whole.model.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_reference_with_another_vocabulary(tmp_path):
    other = make_model("gpt2")
    other.resize_token_embeddings(310)
    with pytest.raises(ValueError, match="ref_model"):
        make_trainer(tmp_path, ref_model=other)
