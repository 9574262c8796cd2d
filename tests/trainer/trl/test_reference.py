"""In TRL's trainer too, the reference is the policy as it starts, and an audit says so before the first step."""

import copy
import math

import pytest
from peft import LoraConfig
from tdpo.audit import AuditError
from tdpo.reference import choose

from helpers.model_families import make_model
from helpers.trainer_cases import losses, with_trained_adapters
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
