"""The audit passes where the loss is right, and alone catches every fault that is put back, each by its name."""

import contextlib
import math

import pytest
import tdpo.policy
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from tdpo.audit import AuditError
from tdpo.loss.preference_loss import FusedLoss
from tdpo.models import probes
from tdpo.models.causal_lm import CausalLM
from tdpo.reference import choose, reference
from tdpo.reference.cached_states import CachedStates
from transformers import AutoModelForCausalLM, MistralConfig, OPTConfig

from helpers.model_families import SMALL, make_model
from helpers.trainer_cases import losses, make_trainer, with_trained_adapters

PLAIN = {"shared_prompts": "never"}


def opt(**options):
    """A model whose dropout is numbers."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=300, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=0, eos_token_id=0, **options,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def windowed():
    """A Mistral that sees 4 tokens."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=4), attn_implementation="eager")


def without_positions():
    """A Llama that takes a packed row for one sequence."""
    model = make_model("llama")
    backbone = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **kwargs: backbone(*args, **kwargs)
    return model


def sees_everything(config, dtype, *, positions, segments):
    """A mask for shared prompts that lets every token see all that stand before it."""
    return torch.ones(*positions.shape, positions.shape[1], dtype=torch.bool).tril()[:, None]


def probes_that_pass(patch):
    patch.setattr(probes, "probe_model", lambda *models, **options: probes.ProbeResult(frozenset(probes.LAYOUTS), True))
    patch.setattr(probes, "agrees_with_padding", lambda *models, **options: True)


GOOD = {
    "everything trains": lambda: (make_model("llama"), {}),
    "adapters": lambda: (make_model("llama"), {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=4)}),
    "adapters with dropout": lambda: (with_trained_adapters(make_model("llama"), lora_dropout=0.5), {}),
    "PiSSA": lambda: (with_trained_adapters(make_model("llama"), init_lora_weights="pissa"), {}),
    "dropout that was asked for": lambda: (opt(dropout=0.3), {"disable_dropout": False}),
    "a reference that was given": lambda: (make_model("llama"), {"ref_model": make_model("llama", 1)}),
    "another precision of it": lambda: (make_model("llama"), {"ref_model": make_model("llama", 1).bfloat16()}),
    "packed": lambda: (make_model("llama"), {"padding_free": True}),
    "packed, nothing shared": lambda: (make_model("llama"), {"padding_free": True, **PLAIN}),
    "padded": lambda: (make_model("llama"), PLAIN),
    "cached": lambda: (make_model("llama"), {"precompute_reference": True}),
    "cached float8": lambda: (make_model("llama"), {"precompute_reference": True, "reference_dtype": "float8"}),
    "a cache of another": lambda: (
        make_model("llama"),
        {"precompute_reference": True, "ref_model": make_model("llama", 1)},
    ),
    "bfloat16": lambda: (make_model("llama"), {"bf16": True}),
    "bfloat16 weights": lambda: (make_model("llama").bfloat16(), {}),
    "checkpointed": lambda: (make_model("llama"), {"gradient_checkpointing": True}),
    "reverse KL": lambda: (make_model("llama"), {"kl_direction": "reverse", "ref_model": make_model("llama", 1)}),
    "noise on embeddings": lambda: (make_model("llama"), {"neftune_noise_alpha": 5.0}),
    "adapters that drop themselves": lambda: (
        make_model("llama"),
        {"peft_config": LoHaConfig(r=4, module_dropout=0.5, init_weights=False, target_modules=["q_proj", "v_proj"])},
    ),
    "softcap": lambda: (make_model("gemma2"), {}),
    "scaled logits": lambda: (make_model("cohere"), {}),
    "windows": lambda: (windowed(), {}),
}


@pytest.mark.parametrize("name", GOOD)
def test_passes_and_is_told(name, tmp_path, capsys):
    model, options = GOOD[name]()
    trainer = make_trainer(tmp_path, model, max_steps=1, **options)
    trainer.train()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("audit: ")]
    assert len(said) == 1
    of_itself = "ref_model" not in options
    assert said[0].startswith("audit: 2 pairs against plain arithmetic: log-probabilities ")
    assert ("the reference is the policy" in said[0]) == of_itself


def trained_before(**options):
    return with_trained_adapters(make_model("llama"), **options)


def biased():
    return get_peft_model(make_model("gpt2"), LoraConfig(task_type="CAUSAL_LM", r=4, bias="all", fan_in_fan_out=True))


def without_adapters(patch):
    patch.setattr(choose, "starts_without_adapters", lambda model: True)


def training_mode(patch):
    patch.setattr(reference, "evaluation_mode", lambda model: contextlib.nullcontext())


def dropout_stays(patch):
    patch.setattr(tdpo.policy, "disable_dropout", lambda model: None)


def shifted_rows(patch):
    def shifted(model, batch, **options):
        return CausalLM.hidden_rows(model, {**batch, "rows": batch["rows"] - 1}, **options)

    patch.setattr(FusedLoss, "_read", staticmethod(shifted))


def everything_is_seen(patch):
    probes_that_pass(patch)
    patch.setattr("tdpo.models.causal_lm.branch_masks", sees_everything)


POLICY, START, MOVES = (
    "the policy's log-prob",
    "which should be the policy as it starts",
    "after a change of what trains",
)
FAULTS = {  # the model, options, what is put back, what the audit must name
    "adapters from SFT": (trained_before, {}, without_adapters, START),
    "PiSSA": (lambda: trained_before(init_lora_weights="pissa"), {}, without_adapters, START),
    "OLoRA": (lambda: trained_before(init_lora_weights="olora"), {}, without_adapters, START),
    "biases train": (biased, {}, without_adapters, MOVES),
    "dropout as numbers": (lambda: opt(dropout=0.3), {}, dropout_stays, POLICY),
    "attention's dropout": (lambda: opt(dropout=0.0, attention_dropout=0.3), {}, dropout_stays, POLICY),
    "a reference in training mode": (
        lambda: with_trained_adapters(make_model("llama"), lora_dropout=0.5), {}, training_mode, MOVES,
    ),
    "rows": (lambda: make_model("llama"), {}, shifted_rows, POLICY),
    "a mask of shared prompts": (lambda: make_model("llama"), {}, everything_is_seen, POLICY),
    "packed sequences that see each other": (
        without_positions, {"padding_free": True, **PLAIN}, probes_that_pass, POLICY,
    ),
}  # fmt: skip


def other_head(trainer, **changes):
    """Both models' heads are misunderstood."""
    for model in (trainer.loss.policy, trainer.reference):
        vars(model).update(changes)


HEADS = {
    "a cap of logits": ("gemma2", {"softcap": None}),
    "a scale of logits": ("cohere", {"logit_scale": 1.0}),
    "a cap that is none": ("llama", {"softcap": 20.0}),
}


@pytest.mark.parametrize("name", HEADS)
def test_names_a_head_that_is_misunderstood(name, tmp_path):
    family, changes = HEADS[name]
    trainer = make_trainer(tmp_path, make_model(family), make_model(family, 1))
    other_head(trainer, **changes)
    with pytest.raises(AuditError, match=POLICY):
        trainer.train()


@pytest.mark.parametrize("name", FAULTS)
def test_names_what_is_wrong_before_anything_is_trained(name, tmp_path, monkeypatch):
    make, options, put_back, named = FAULTS[name]
    put_back(monkeypatch)
    trainer = make_trainer(tmp_path, make(), **options)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with pytest.raises(AuditError, match=named):
        trainer.train()
    assert all(map(torch.equal, before, trainer.model.parameters()))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_never(tmp_path, monkeypatch):
    without_adapters(monkeypatch)
    trainer = make_trainer(tmp_path, trained_before(), audit="never", max_steps=1)
    trainer.train()
    assert losses(trainer)[0] != pytest.approx(math.log(2), abs=1e-3)


def test_a_training_with_an_audit_is_the_same_training(tmp_path):
    """Dropout draws the same numbers."""
    runs = []
    for audit in ("first", "never"):
        trainer = make_trainer(tmp_path / audit, make_model("gpt2"), disable_dropout=False, audit=audit, max_steps=3)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 3


def test_audit_alone_trains_nothing(tmp_path):
    trainer = make_trainer(tmp_path, trained_before())
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    report = trainer.audit()
    assert report.pairs == 2
    assert 0 <= report.logps < 1e-6
    assert report.reference == "the reference is the policy"
    assert all(map(torch.equal, before, trainer.model.parameters()))
    assert list(tmp_path.iterdir()) == []
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_audit_alone_leaves_nothing_behind(tmp_path):
    """The training after it is what it would have been: dropout and noise draw the same numbers."""
    runs = []
    for audits in (True, False):
        policy = trained_before(lora_dropout=0.5)
        trainer = make_trainer(tmp_path, policy, max_steps=3, audit="never", neftune_noise_alpha=5.0)
        modes = [module.training for module in policy.modules()]
        if audits:
            trainer.audit()
        assert [module.training for module in policy.modules()] == modes
        trainer.train()
        runs.append(losses(trainer))
        assert not policy.get_input_embeddings()._forward_hooks
    assert runs[0] == runs[1]


def test_a_long_pair_is_compared_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("tdpo.audit._PLAIN_BYTES", 2 * 300 * 4)
    report = make_trainer(tmp_path, make_model("llama"), make_model("llama", 1)).audit()
    assert report.logps < 1e-6
    assert report.kl < 1e-6


def test_a_resumed_run_is_audited_too(tmp_path, capsys):
    options = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, trained_before(), max_steps=2, **options).train()
    capsys.readouterr()
    make_trainer(tmp_path, trained_before(), max_steps=4, **options).train(resume_from_checkpoint=True)
    assert "; the reference too; " in capsys.readouterr().err


def test_a_cache_and_a_trained_policy_have_no_reference_to_compare(tmp_path, capsys):
    options = {"save_strategy": "steps", "save_steps": 2, "precompute_reference": True}
    trainer = make_trainer(tmp_path, make_model("llama"), max_steps=2, **options)
    trainer.train()
    assert isinstance(trainer.reference, CachedStates)
    capsys.readouterr()
    make_trainer(tmp_path, make_model("llama"), max_steps=4, **options).train(resume_from_checkpoint=True)
    assert "the cached reference, whose model is not here, was not compared" in capsys.readouterr().err
