"""In TRL's trainer too, the reference is the policy as it starts, and an audit says so before the first step."""

import copy
import math
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tdpo.audit import AuditError
from tdpo.reference import choose

from helpers.model_families import make_model
from helpers.trainer_cases import FOUR_STEPS, losses, with_trained_adapters
from trainer.trl.test_trainer import make

pytest.importorskip("trl", reason="TRL is not installed")
from tdpo.reference.at_start import AtStart
from tdpo.reference.without_adapters import WithoutAdapters
from tdpo.trl.trainer import RefAdapter

POLICIES = {
    "adapters from SFT": (lambda: with_trained_adapters(make_model("llama")), RefAdapter),
    "PiSSA": (lambda: with_trained_adapters(make_model("llama"), init_lora_weights="pissa"), RefAdapter),
}


@pytest.mark.parametrize("name", POLICIES)
def test_equal_to_a_copy(name, tmp_path, capsys):
    make_policy, form = POLICIES[name]
    against_copy = make(tmp_path, model=make_policy(), ref_model=copy.deepcopy(make_policy()), learning_rate=1e-2)
    against_copy.train()
    assert "audit: 2 pairs against plain arithmetic" in capsys.readouterr().err
    ours = make(tmp_path, model=make_policy(), learning_rate=1e-2)
    ours.train()
    assert isinstance(ours._tdpo.reference, form)
    assert losses(ours) == pytest.approx(losses(against_copy), abs=1e-6)
    assert losses(ours)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(ours)[-1] < math.log(2) - 1e-3
    assert "; the reference is the policy; " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({}, WithoutAdapters),
        ({"init_lora_weights": "pissa"}, AtStart),
        ({"init_lora_weights": "olora"}, AtStart),
        ({"bias": "all"}, AtStart),
    ],
)
def test_new_adapters(options, form, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **options)
    trainer = make(tmp_path, model=make_model("phi"), peft_config=config)
    trainer.train()
    assert isinstance(trainer._tdpo.reference, form)
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("audit", ["first", "never"])
def test_the_audit_finds_a_reference_without_its_adapters(audit, tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "starts_without_adapters", lambda model: True)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights="pissa")
    trainer = make(tmp_path, peft_config=config, options={"audit": audit})
    if audit == "never":
        trainer.train()
        return
    with pytest.raises(AuditError, match="which should be the policy as it starts"):
        trainer.train()


def with_a_scale():
    policy = with_trained_adapters(make_model("llama"))
    for module in policy.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)
    return policy


def test_a_scale_that_trl_does_not_copy(tmp_path):
    trainer = make(tmp_path, model=with_a_scale())
    trainer.train()
    assert isinstance(trainer._tdpo.reference, AtStart)
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_adapters_that_trl_does_not_copy_are_refused(tmp_path):
    policy = get_peft_model(make_model("llama"), LoraConfig(task_type="CAUSAL_LM", r=4), adapter_name="sft")
    with pytest.raises(ValueError, match="model has adapters called sft, but TRL copies those called 'default'"):
        make(tmp_path, model=policy)


def test_norms_beside_adapters_resume_in_every_bit(tmp_path):
    def policy():
        model = with_trained_adapters(make_model("llama"))
        for name, parameter in model.named_parameters():
            parameter.requires_grad |= "norm" in name
        return model

    options = {**FOUR_STEPS, "learning_rate": 1e-2}
    whole = make(tmp_path, model=policy(), **options)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = make(tmp_path, model=policy(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)


def test_parts_of_adapters_that_are_frozen_stay_so(tmp_path):
    policy = with_trained_adapters(make_model("llama"))
    for name, parameter in policy.named_parameters():
        parameter.requires_grad &= "lora_B" in name
    before = {name: parameter.clone() for name, parameter in policy.named_parameters() if not parameter.requires_grad}
    trainer = make(tmp_path, model=policy, learning_rate=1e-2)
    trainer.train()
    assert isinstance(trainer._tdpo.reference, RefAdapter)
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad == ("lora_B.default" in name), name
        assert name not in before or torch.equal(parameter, before[name]), name
