"""A model outlives its trainers: the next one finds it as it was, and nothing of the last one stays."""

import copy
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.model_families import make_model
from helpers.trainer_cases import losses, make_trainer

TOKENS = torch.tensor([[1, 2, 3]])
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


def forwards(model, batch):
    return model(preference=batch).loss


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_a_second_trainer_of_a_model(trained, bf16, tmp_path):
    """With bf16, accelerate wraps the forward of a model that trains once more."""
    model = make_model("llama")
    options = {"max_steps": 1, "bf16": bf16, "learning_rate": 0.0}
    alone = make_trainer(tmp_path, model=copy.deepcopy(model), **options)
    alone.train()
    plain = model(input_ids=TOKENS).logits
    for _ in range(3):
        trainer = make_trainer(tmp_path, model=model, **options)
        if trained:
            trainer.train()
            assert losses(trainer) == losses(alone)
    generated = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 7)
    model.eval()
    torch.testing.assert_close(model(input_ids=TOKENS).logits.float(), plain, rtol=0.02, atol=0.02 if bf16 else 1e-6)


def test_a_second_trainer_of_adapters(tmp_path):
    first = make_trainer(tmp_path, model=make_model("llama"), peft_config=LORA, max_steps=1)
    policy = first.model
    hooks = sum(len(module._forward_hooks) for module in policy.modules())
    second = make_trainer(tmp_path, model=policy, max_steps=1)
    assert second.model is policy
    assert sum(len(module._forward_hooks) for module in policy.modules()) == hooks
    batch = next(iter(second.get_train_dataloader()))
    assert forwards(policy, batch).item() == pytest.approx(0.693147, abs=1e-5)
    assert policy.generate(input_ids=TOKENS, max_new_tokens=2, do_sample=False).shape == (1, 5)


def test_the_second_trainers_loss_is_computed(tmp_path):
    model, reference = make_model("llama"), make_model("llama", 1)
    first = make_trainer(tmp_path, model, reference, beta=0.1)
    second = make_trainer(tmp_path, model, reference, beta=0.5)
    batch = next(iter(second.get_train_dataloader()))
    model.eval()
    assert torch.equal(forwards(model, batch), second.loss(batch).loss)
    assert not torch.equal(forwards(model, batch), first.loss(batch).loss)


def alive(reference):
    gc.collect()
    return reference() is not None


def test_the_first_trainer_keeps_its_loss(tmp_path):
    """And with it the reference that it compares with."""
    model = get_peft_model(make_model("llama"), LoraConfig(task_type="CAUSAL_LM", r=4))
    first = make_trainer(tmp_path, model, max_steps=2, learning_rate=1e-2)
    first.train()
    before = first.evaluate()["eval_kl/chosen"]
    second = make_trainer(tmp_path, model)
    assert second.evaluate()["eval_kl/chosen"] == pytest.approx(0, abs=1e-6)
    assert first.evaluate()["eval_kl/chosen"] == before > 1e-3


@pytest.mark.parametrize("again", [False, True])
def test_trainers_that_are_gone_leave_nothing_with_the_model(again, tmp_path):
    model = make_model("llama")
    trainer = make_trainer(tmp_path, model=model, max_steps=1)
    trainer.train()
    left = [weakref.ref(trainer.loss), weakref.ref(trainer.ref_model)]
    if again:
        second = make_trainer(tmp_path, model=model)
        assert all(map(alive, left))
    del trainer
    assert not any(map(alive, left))
    if again:
        assert alive(weakref.ref(second.loss))
    else:
        batch = {"input_ids": TOKENS}
        with pytest.raises(RuntimeError, match="no preference loss: its trainer is gone"):
            model(preference=batch)
        assert model(**batch).logits.shape == (1, 3, 300)


def test_references_that_are_copies_carry_no_loss(tmp_path):
    model = make_model("llama")
    first = make_trainer(tmp_path, model=model)
    second = make_trainer(tmp_path, model=model)
    assert second.ref_model is not model
    assert second.loss is not first.loss
    with pytest.raises(RuntimeError, match="no preference loss"):
        second.ref_model(preference={})


def test_copies_forward_through_themselves(tmp_path):
    model = make_model("llama")
    trainer = make_trainer(tmp_path, model=model)
    other = copy.deepcopy(trainer.model)
    before = other(input_ids=TOKENS).logits
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert torch.equal(other(input_ids=TOKENS).logits, before)
    assert torch.equal(model(input_ids=TOKENS).logits, 2 * before)
    trainer_of_the_copy = make_trainer(tmp_path, model=other, max_steps=1)
    trainer_of_the_copy.train()


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
    assert not torch.equal(other(input_ids=TOKENS).logits, trainer.model(input_ids=TOKENS).logits)
