"""What the trainer's loss adds to the library's: the routers' load-balancing loss."""

import pytest
import torch
import transformers
import trl
from tdpo.trl import TDPOTrainer as TRLTrainer

import tdpo_ext
from helpers import families
from helpers.device import USE_CPU
from helpers.families_tried import make_trainer as make_family_trainer
from helpers.model_families import SMALL, make_model, make_tokenizer
from helpers.trainer_cases import make_preferences, make_trainer


def mixtral(seed, coefficient=0.5, **changes):
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(
        **SMALL, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=coefficient, **changes
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def trl_run(trainer_class, path, coefficient, **options):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    config = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "max_steps": 2, "logging_steps": 1, "beta": 0.2}
    config |= {"use_cpu": USE_CPU, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    trainer = trainer_class(
        mixtral(0),
        mixtral(1),
        args=trl.DPOConfig(output_dir=str(path), router_aux_loss_coef=coefficient, **config),
        train_dataset=make_preferences(),
        processing_class=tokenizer,
        **options,
    )
    trainer.train()
    return trainer.state.log_history[:2]


@pytest.mark.parametrize("coefficient", [None, 0.1, 0.0])
def test_the_load_balancing_loss_is_trls(coefficient, tmp_path):
    ours = trl_run(TRLTrainer, tmp_path, coefficient, variant="dpo")
    theirs = trl_run(trl.DPOTrainer, tmp_path, coefficient)
    for mine, other in zip(ours, theirs, strict=True):
        assert ("aux_loss" in mine) == ("aux_loss" in other) == (coefficient != 0)
        for name in {"loss", "aux_loss", "grad_norm"} & set(other):
            assert mine[name] == pytest.approx(other[name], rel=1e-4), name


@pytest.mark.parametrize("packed", [False, True])
def test_our_trainer_adds_the_models_own_load_balancing_loss(packed, tmp_path):
    models = {"model": mixtral(0), "ref_model": mixtral(1)}
    trainer = make_trainer(tmp_path, **models, padding_free=packed)
    assert not trainer.data_collator.shared_prompts  # where prompts would count once
    batch = next(iter(trainer.get_train_dataloader()))
    output = trainer.model(preference=batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    expected = trainer.model(**inputs, output_router_logits=True).aux_loss
    torch.testing.assert_close(output.router_loss, expected)
    assert not output.router_loss.requires_grad
    evaluated = trainer.evaluate()
    without = make_trainer(tmp_path, **models, padding_free=packed, router_aux_loss_coef=0.0)
    plain = without.loss(batch)
    assert plain.router_loss is None
    torch.testing.assert_close(output.loss, plain.loss + 0.5 * expected)
    assert evaluated["eval_aux_loss"] > 1
    assert evaluated["eval_loss"] == pytest.approx(
        without.evaluate()["eval_loss"] + 0.5 * evaluated["eval_aux_loss"], rel=1e-4
    )


@pytest.mark.parametrize("objective", [None, tdpo_ext.per_token(lambda chosen, rejected: -chosen.sum(chosen.logps))])
def test_the_evaluation_loss_holds_the_routers_loss_once(objective, tmp_path):
    models = {"model": mixtral(0), "ref_model": mixtral(1)}
    trainer = make_trainer(tmp_path, **models, objective=objective, per_device_eval_batch_size=1000)
    batch = next(iter(trainer.get_eval_dataloader()))
    with torch.no_grad():
        expected = trainer.model(preference=batch).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_routers_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"router_aux_loss_coef is 0.1, but LlamaForCausalLM is no mixture of experts"):
        make_trainer(tmp_path, model=make_model("llama"), router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef is -1"):
        make_trainer(tmp_path, model=mixtral(0), router_aux_loss_coef=-1)
    monkeypatch.delattr("transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func")
    with pytest.raises(ValueError, match=r"MixtralForCausalLM does not tell how .*; set router_aux_loss_coef to 0"):
        make_trainer(tmp_path, model=mixtral(0))
    make_trainer(tmp_path, model=mixtral(0), router_aux_loss_coef=0.0)


@pytest.mark.parametrize("name", ["granitemoehybrid, dense", "qwen3_moe, dense"])
def test_dense_models_of_classes_with_experts_have_no_routers(name, tmp_path):
    model = families.make_family(name)
    assert model.config.router_aux_loss_coef > 0
    trainer = make_family_trainer(model, families.perturbed(model), str(tmp_path))
    output = trainer.model(preference=next(iter(trainer.get_train_dataloader())))
    assert output.router_loss is None
    assert torch.isfinite(output.loss)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef is 0.1, but .* is no mixture of experts"):
        make_family_trainer(model, families.perturbed(model), str(tmp_path), router_aux_loss_coef=0.1)
