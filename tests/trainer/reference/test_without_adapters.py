"""The policy without its adapters as the reference."""

import pytest
import torch
from peft import LoraConfig
from tdpo.loss.preference_loss import FusedLoss

from helpers.model_families import make_model
from helpers.trainer_cases import change_what_trains, make_trainer


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_adapters_off_are_the_reference(family, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    trainer = make_trainer(tmp_path, model=make_model(family), peft_config=config, shared_prompts="never")
    assert isinstance(trainer.loss, FusedLoss)
    assert trainer.ref_model is None
    change_what_trains(trainer.model)
    batch = next(iter(trainer.get_train_dataloader()))
    output = trainer.model(preference=batch)
    assert output.chosen.kl.min() > 1e-4  # the adapters are not at zero
    with trainer.model.disable_adapter():
        assert trainer.model(preference=batch).chosen.kl.abs().max() < 1e-6
    plain = make_trainer(tmp_path, model=make_model(family))
    expected = plain.ref_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = expected.log_softmax(-1).flatten(0, 1)[batch["rows"]].gather(-1, batch["targets"][:, None])[:, 0]
    torch.testing.assert_close(output.chosen.ref_logps.sum() + output.rejected.ref_logps.sum(), expected.sum())


def test_adapters_are_off_while_the_reference_is_cached(tmp_path):
    divergences = []
    for cached in (False, True):
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        options = {"precompute_reference": True, "reference_dtype": "float32"} if cached else {}
        trainer = make_trainer(tmp_path / str(cached), model=make_model("llama"), peft_config=config, **options)
        change_what_trains(trainer.model)
        batch = next(iter(trainer.get_train_dataloader()))
        divergences.append(trainer.model(preference=batch).chosen)
    assert divergences[0].kl.min() > 1e-3
    for cached, live in zip(divergences[1], divergences[0]):
        torch.testing.assert_close(cached, live, rtol=1e-4, atol=1e-5)
