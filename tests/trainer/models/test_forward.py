"""The forward pass that a model is given."""

import copy

import torch

from helpers.model_families import make_model
from helpers.trainer_cases import make_trainer


def test_a_copy_of_the_policy_stands_alone(tmp_path):
    trainer = make_trainer(tmp_path, model=make_model("llama", 0), ref_model=make_model("llama", 1))
    batch = next(iter(trainer.get_train_dataloader()))
    other = copy.deepcopy(trainer.model)
    before = trainer.model(preference=batch).loss
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    assert torch.equal(trainer.model(preference=batch).loss, before)
    assert not torch.equal(other(preference=batch).loss, before)
    tokens = torch.tensor([[1, 2, 3]])
    assert not torch.equal(other(input_ids=tokens).logits, trainer.model(input_ids=tokens).logits)
