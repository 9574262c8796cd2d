"""TRL's DPOTrainer with the TDPO loss, where the pinned TRL is installed."""

import functools
import itertools

import pytest
import torch
import transformers
from peft import LoraConfig
from tdpo import TDPOConfig
from tdpo.loss.preference_loss import FusedLoss
from transformers import ProcessorMixin

from helpers.device import USE_CPU
from helpers.model_families import make_model, make_tokenizer
from helpers.trainer_cases import make_preferences
from tdpo_ext import eager, tdpo_loss

trl = pytest.importorskip("trl", reason="TRL is not installed")
from tdpo.trl.trainer import TDPOTrainer, _WithResponseRows  # noqa: E402

SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": USE_CPU,
    "disable_tqdm": True,
    "save_strategy": "no",
    "bf16": False,
    "beta": 0.2,
}


def make(
    tmp_path,
    *,
    model=None,
    ref_model=None,
    peft_config=None,
    options=None,
    trainer_class=TDPOTrainer,
    processing_class=None,
    rows=None,
    **config,
):
    """TRL's trainer with `options` of the TDPO loss; `config` is that of DPOConfig."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return trainer_class(
        model or make_model("llama", 0),
        ref_model,
        args=trl.DPOConfig(output_dir=str(tmp_path), **{**SETTINGS, **config}),
        train_dataset=rows or make_preferences(),
        eval_dataset=make_preferences(8),
        processing_class=processing_class or tokenizer,
        peft_config=peft_config,
        **(options or {}),
    )


def test_equals_the_oracle(tmp_path):
    policy, frozen = make_model("llama", 0), make_model("llama", 1)
    trainer = make(tmp_path, model=policy, ref_model=frozen, options={"alpha": 0.3})
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        logits, ref_logits = policy(**inputs).logits[:, :-1].double(), frozen(**inputs).logits[:, :-1].double()
    divergence = eager.token_divergence(logits, ref_logits, labels[:, 1:])
    objective = functools.partial(tdpo_loss, beta=0.2, alpha=0.3)
    expected = objective(*divergence.per_sequence().chunk(2)).mean()
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapters", [False, True])
def test_trains_and_logs(adapters, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear") if adapters else None
    frozen = None if adapters else make_model("llama", 0)
    trainer = make(tmp_path, ref_model=frozen, peft_config=config, max_steps=8)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert log[-1]["rewards/margins"] > log[0]["rewards/margins"]
    assert {"kl/chosen", "kl/rejected", "kl/margin"} <= set(log[0])
    assert trainer.evaluate()["eval_kl/chosen"] > 0


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({"variant": "ipo"}, {}, "variant"),
        ({"alpha": -1.0}, {}, "alpha"),
        ({"variant": "dpo", "alpha": 0.3}, {}, "alpha"),
        ({}, {"loss_type": "aot"}, "'aot' couples pairs"),
        ({}, {"loss_type": ["sigmoid", "sft"]}, "'sft' couples pairs"),
        ({}, {"loss_type": "sigmoid", "loss_weights": [1.0, 2.0]}, "loss_weights"),
        ({}, {"loss_weights": [float("nan")]}, "loss_weights"),
        ({}, {"label_smoothing": 0.1}, "label_smoothing is 0.1, but only robust"),
        ({}, {"label_smoothing": 0.7, "loss_type": "robust"}, "label_smoothing"),
        ({}, {"label_smoothing": 0.0, "loss_type": "exo_pair"}, "label_smoothing"),
        ({}, {"discopop_tau": 0.1}, "discopop_tau"),
    ],
)
def test_bad_options(options, config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, ref_model=make_model("llama", 1), options=options, **config)


def test_a_completion_may_begin_a_sequence():
    """Nothing predicts the first token of a sequence, not the last position of the row before it either."""
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7, 9], [8, 3, 9, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "completion_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]),
    }
    batch = _WithResponseRows(lambda examples: inputs)([])
    assert batch["rows"].tolist() == [1, 2, 4, 5]
    assert batch["targets"].tolist() == [7, 9, 3, 9]
    assert batch["cu_seqlens"].tolist() == [0, 2, 4]
    assert batch["row_lengths"] == [2, 2]
    assert batch["num_tokens"] == 7


@pytest.mark.parametrize(
    ("options", "config", "name"),
    [
        ({"variant": "tdpo1"}, {"loss_type": "ipo"}, "variant"),
        ({"alpha": 0.5}, {"loss_type": ["hinge", "ipo"]}, "alpha"),
        ({"kl_direction": "backward"}, {}, "kl_direction"),
        ({"logits_budget": 0}, {}, "logits_budget"),
        ({}, {"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        ({}, {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}, "train_sampling_strategy"),
    ],
)
def test_what_would_have_no_effect_is_named(options, config, name, tmp_path):
    with pytest.raises(ValueError, match=f"^{name} is "):
        make(tmp_path, ref_model=make_model("llama", 1), options=options, **config)


def test_options_of_the_other_trainer_are_named(tmp_path):
    with pytest.raises(TypeError, match=r"^args is of TDPOConfig; TRL's DPOConfig is needed, or tdpo\.TDPOTrainer$"):
        TDPOTrainer(make_model("llama"), args=TDPOConfig(output_dir=str(tmp_path), use_cpu=USE_CPU))


def test_rows_are_grouped_by_their_lengths(tmp_path):
    rows = make_preferences(144)
    rows = rows.add_column("words", [len(row["chosen"].split()) for row in rows])
    options = {"train_sampling_strategy": "group_by_length", "length_column_name": "words"}
    trainer = make(
        tmp_path, ref_model=make_model("llama", 1), rows=rows, remove_unused_columns=False, max_steps=1, **options
    )
    words = [rows[row]["words"] for row in trainer._get_train_sampler()]
    # Of four lengths, in blocks of 36 rows; about 100 in a random order.
    assert sum(word != after for word, after in itertools.pairwise(words)) < 30
    trainer.train()


def loss_of(tmp_path, **options):
    trainer = make(tmp_path, ref_model=make_model("llama", 1), options=options)
    torch.manual_seed(0)
    trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    return trainer, trainer._means["train"].take()


def test_the_direction_of_the_kl_can_be_given(tmp_path):
    (_, forward), (_, reverse) = loss_of(tmp_path), loss_of(tmp_path, kl_direction="reverse")
    assert reverse["logps/chosen"] == forward["logps/chosen"]
    assert reverse["kl/chosen"] != pytest.approx(forward["kl/chosen"], rel=1e-2)


def test_a_budget_of_the_loss_can_be_given(tmp_path):
    trainer, means = loss_of(tmp_path, logits_budget=4000)
    assert trainer._tdpo.logits_budget == 4000
    assert means == pytest.approx(loss_of(tmp_path)[1], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "config", "name", "paper"),
    [
        ({}, {}, "TDPO2", "2404.11999"),
        ({"variant": "tdpo1"}, {"loss_type": ["sigmoid", "ipo"]}, "TDPO1", "2404.11999"),
        ({"variant": "dpo"}, {}, "DPO", "2305.18290"),
        ({}, {"loss_type": "ipo"}, "DPO", "2305.18290"),
    ],
)
def test_cards_name_what_was_trained(options, config, name, paper, tmp_path):
    trainer = make(tmp_path, ref_model=make_model("llama", 1), options=options, **config)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"This model was trained with {name}, " in card
    assert f"huggingface.co/papers/{paper}" in card
    assert ("@inproceedings{zeng2024tdpo" in card) == (name != "DPO")
    assert name[:4].lower() in trainer.model.model_tags
    assert ("dpo" in trainer.model.model_tags) == (name == "DPO")


def test_unused_values_are_accepted(tmp_path):
    make(tmp_path, ref_model=make_model("llama", 1), loss_weights=[1.0], loss_type="sigmoid")


def test_the_reference_follows_the_policy_where_asked(tmp_path, monkeypatch):
    frozen = make_model("llama", 1)
    sync = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}
    trainer = make(tmp_path, ref_model=frozen, max_steps=3, learning_rate=1e-2, options={"audit": "never"}, **sync)
    policies, of_batch = [], FusedLoss.__call__

    def recorded(self, batch):
        policies.append(self.policy.weight.detach().clone())
        return of_batch(self, batch)

    monkeypatch.setattr(FusedLoss, "__call__", recorded)
    trainer.train()
    assert torch.equal(frozen.lm_head.weight, policies[2])  # of the policy after two steps


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        *((name, {}) for name in ("hinge", "ipo", "sigmoid_norm", "nca_pair", "bco_pair", "sppo_hard")),
        *((name, {}) for name in ("apo_zero", "apo_down", "sigmoid")),
        ("discopop", {"discopop_tau": 0.3}),
        ("robust", {"label_smoothing": 0.1}),
        ("exo_pair", {"label_smoothing": 0.2}),
        (["sigmoid", "bco_pair", "ipo"], {"loss_weights": [0.8, 0.2, -0.01]}),
        (["sigmoid", "hinge"], {}),
    ],
)
def test_losses_equal_trls(loss_type, options, tmp_path):
    results = []
    for trainer_class in (TDPOTrainer, trl.DPOTrainer):
        ours = trainer_class is TDPOTrainer and (loss_type == "sigmoid" or "sigmoid" in [*loss_type])
        variant = {"variant": "dpo"} if ours else {}
        trainer = make(
            tmp_path,
            model=make_model("llama", 0),
            ref_model=make_model("llama", 1),
            options=variant,
            trainer_class=trainer_class,
            loss_type=loss_type,
            **options,
        )
        torch.manual_seed(0)
        loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        loss.backward()
        results.append((loss.item(), trainer.model.lm_head.weight.grad))
    (loss, grad), (true_loss, true_grad) = results
    assert loss == pytest.approx(true_loss, rel=1e-4, abs=1e-6)
    assert (grad - true_grad).norm() < 1e-3 * true_grad.norm()


def test_dpo_equals_trls(tmp_path):
    """Same loss, gradients and logs as the class that this one replaces."""
    results = []
    for trainer_class in (TDPOTrainer, trl.DPOTrainer):
        options = {"variant": "dpo"} if trainer_class is TDPOTrainer else {}
        frozen, policy = make_model("llama", 1), make_model("llama", 0)
        trainer = make(tmp_path, ref_model=frozen, model=policy, options=options, trainer_class=trainer_class)
        trainer.train()
        results.append((trainer.state.log_history, dict(trainer.model.named_parameters())))
    (ours, our_weights), (theirs, weights) = results
    for mine, other in zip(ours[:3], theirs[:3]):
        same = set(other) - {"logits/chosen", "logits/rejected"}
        assert same <= set(mine)
        for name in same:
            assert mine[name] == pytest.approx(other[name], rel=2e-4, abs=1e-5), name
    for name, value in weights.items():
        torch.testing.assert_close(our_weights[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_names_of_references(tmp_path):
    make_model("llama", 3).to(torch.bfloat16).save_pretrained(tmp_path / "frozen")
    trainer = make(tmp_path, ref_model=str(tmp_path / "frozen"))
    stored = make_model("llama", 3).lm_head.weight.to(torch.bfloat16)
    assert torch.equal(trainer._tdpo.reference.weight, stored.float())  # in the precision of the policy


@pytest.mark.parametrize(("attention", "dtype"), [("eager", torch.float32), ("sdpa", torch.bfloat16)])
def test_a_named_reference_computes_as_the_policy_does(attention, dtype, tmp_path):
    make_model("llama", 3).save_pretrained(tmp_path / "frozen")
    policy = make_model("llama", 0).to(dtype)
    policy.set_attn_implementation(attention)
    trainer = make(tmp_path, model=policy, ref_model=str(tmp_path / "frozen"))
    assert trainer.ref_model.config._attn_implementation == attention
    assert trainer.ref_model.dtype == dtype


def test_policy_and_reference_that_are_named_are_loaded_alike(tmp_path):
    for name, seed in {"policy": 0, "frozen": 3}.items():
        make_model("llama", seed).save_pretrained(tmp_path / name)
    loading = {"attn_implementation": "eager", "dtype": "bfloat16"}
    names = {"model": str(tmp_path / "policy"), "ref_model": str(tmp_path / "frozen")}
    trainer = make(tmp_path, **names, model_init_kwargs=loading)
    for model in (trainer.model, trainer.ref_model):
        assert model.config._attn_implementation == "eager"
        assert model.dtype == torch.bfloat16
    assert not torch.equal(trainer.model.lm_head.weight, trainer.ref_model.lm_head.weight)


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_named_reference_is_trusted_where_it_is_said(trusted, tmp_path, monkeypatch):
    make_model("llama", 3).save_pretrained(tmp_path / "frozen")
    seen, load = [], transformers.LlamaForCausalLM.from_pretrained

    def recorded(name, **options):
        seen.append(options.pop("trust_remote_code"))
        return load(name, **options)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", recorded)
    make(tmp_path, ref_model=str(tmp_path / "frozen"), trust_remote_code=trusted)
    assert seen == [trusted]


def test_evaluation_takes_no_gradients(tmp_path):
    trainer, seen = make(tmp_path, ref_model=make_model("llama", 1)), []
    trainer.model.register_forward_hook(lambda *arguments: seen.append(torch.is_grad_enabled()))
    trainer.evaluate()
    assert seen == [False]
    assert "eval_rewards/margins" in trainer.state.log_history[-1]


def test_a_prediction_is_no_part_of_the_next_evaluation(tmp_path):
    trainer = make(tmp_path, ref_model=make_model("llama", 1))
    alone = trainer.evaluate()
    trainer.predict(trainer.train_dataset.select(range(3)))
    trainer.evaluate()
    first, second = (entry for entry in trainer.state.log_history if "eval_kl/chosen" in entry)
    times = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    assert {name for name in first if name not in times and first[name] != second[name]} == set()
    assert alone["eval_loss"] == second["eval_loss"]


class Processor(ProcessorMixin):
    def __init__(self):
        pass


def test_what_needs_images_or_logits_is_refused(tmp_path):
    with pytest.raises(TypeError, match="processing_class is a processor of images; only text"):
        make(tmp_path, processing_class=Processor())
    with pytest.raises(ValueError, match="compute_metrics is given"):
        make(tmp_path, options={"compute_metrics": dict})
