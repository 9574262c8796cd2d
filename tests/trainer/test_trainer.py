"""The trainer on tiny models: its steps, metrics, resumption and counts of tokens, and options of transformers."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from tdpo import TDPOConfig, TDPOTrainer
from transformers import TrainerCallback

from helpers.device import DEVICE
from helpers.model_families import make_model, make_tokenizer
from helpers.trainer_cases import FOUR_STEPS, SETTINGS, losses, make_preferences, make_trainer
from tdpo_ext import eager


@pytest.mark.parametrize("variant", ["tdpo2", "tdpo1", "dpo"])
def test_training_raises_margins(variant, tmp_path):
    trainer = make_trainer(tmp_path, variant=variant, max_steps=12)
    row = trainer.train_dataset[0]

    def preference():
        """The logit of the chosen response's first token over that of the rejected one's."""
        logits = trainer.model(input_ids=torch.tensor([row["prompt_ids"]], device=DEVICE)).logits[0, -1]
        return (logits[row["chosen_ids"][0]] - logits[row["rejected_ids"][0]]).item()

    before = preference()
    trainer.train()
    assert preference() > before + 0.5
    first, last = trainer.state.log_history[0], trainer.state.log_history[11]
    assert last["rewards/margins"] > first["rewards/margins"] + 0.05
    assert last["loss"] < first["loss"]


@pytest.mark.parametrize(("variant", "alpha", "weight"), [("tdpo2", 0.7, 0.7), ("tdpo1", 0.5, 1.0), ("dpo", 0.5, 0.0)])
def test_a_step_follows_the_formulas_gradient(variant, alpha, weight, tmp_path):
    """One step of SGD on a whole epoch, by autograd of the paper's formulas on the models' own logits."""
    policy, frozen = make_model("llama", 0), make_model("llama", 1)
    copied = copy.deepcopy(policy).to(DEVICE)
    options = {"variant": variant, "alpha": alpha, "beta": 0.3, "optim": "sgd", "max_grad_norm": 0.0}
    options |= {"learning_rate": 0.05, "per_device_train_batch_size": 24, "max_steps": 1}
    trainer = make_trainer(tmp_path, model=policy, ref_model=frozen, **options)
    trainer.train()

    def sums(row, side):
        ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]], device=DEVICE)
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


def test_tokens_are_counted_through_resumption(tmp_path):
    make_trainer(tmp_path / "first", **FOUR_STEPS).train()
    unbroken = make_trainer(tmp_path, **{**FOUR_STEPS, "logging_steps": 4})
    unbroken.train()
    counted = [entry["num_tokens"] for entry in unbroken.state.log_history if "loss" in entry]
    trainer = make_trainer(tmp_path, **FOUR_STEPS)
    trainer.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    entries = [entry["num_tokens"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 4
    assert sorted(set(entries)) == entries
    assert entries[-1] == counted[-1]
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["num_input_tokens_seen"] == entries[-1]


@pytest.mark.parametrize("logging_steps", [1, 5])
def test_every_token_of_an_epoch_is_counted_once(logging_steps, tmp_path):
    """Prompts with each of their responses, whether a log or a checkpoint comes first, and after a resumption too.

    Those of evaluations don't count.
    """
    epoch = {**FOUR_STEPS, "max_steps": 6, "logging_steps": logging_steps, "logging_strategy": "steps"}
    epoch |= {"eval_strategy": "steps", "eval_steps": 2}
    unbroken, resumed = (make_trainer(tmp_path, **epoch) for _ in range(2))
    assert len(unbroken.get_train_dataloader()) == 6
    tokens = sum(
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in unbroken.train_dataset
    )
    unbroken.train()
    assert unbroken.state.num_input_tokens_seen == tokens
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.num_input_tokens_seen == tokens


def test_tokens_that_transformers_counts_are_not_counted_twice(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, include_num_input_tokens_seen="all")
    trainer.train()
    padded = [batch["input_ids"].numel() for batch in trainer.get_train_dataloader()][:2]
    counted = [entry["num_input_tokens_seen"] for entry in trainer.state.log_history if "loss" in entry]
    assert not any("num_tokens" in entry for entry in trainer.state.log_history)  # which counts something else
    assert 0 < counted[0] < counted[1] == trainer.state.num_input_tokens_seen <= 2 * max(padded)


def test_what_is_logged_by_hand_stays_as_it_is(tmp_path):
    """And what training logs is as if nothing had been logged between."""

    class LogsByHand(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            if state.global_step < 4:
                trainer.log({"loss": 1.0, "mine": 2.0})

    options = {"max_steps": 4, "logging_steps": 4}
    plain, trainer = make_trainer(tmp_path, **options), make_trainer(tmp_path, **options)
    trainer.log({"loss": 3.0})
    assert trainer.state.log_history == [{"loss": 3.0, "epoch": 0, "step": 0}]
    trainer.add_callback(LogsByHand())
    plain.train()
    trainer.train()
    by_hand = [entry for entry in trainer.state.log_history if "mine" in entry]
    assert [(entry["loss"], entry["step"], "kl/chosen" in entry) for entry in by_hand] == [
        (1.0, step, False) for step in (1, 2, 3)
    ]
    logged = [entry for entry in trainer.state.log_history if "kl/chosen" in entry]
    assert logged == [entry for entry in plain.state.log_history if "kl/chosen" in entry]


def test_a_collator_of_none_is_the_default_one(tmp_path):
    rows = make_preferences()
    data = {"train_dataset": rows, "processing_class": make_tokenizer()}
    args = TDPOConfig(output_dir=str(tmp_path), **{**SETTINGS, "max_steps": 2})
    trainer = TDPOTrainer(make_model("gpt2"), args=args, data_collator=None, **data)
    trainer.train()
    plain = TDPOTrainer(make_model("gpt2"), args=args, **data)
    plain.train()
    assert losses(trainer) == losses(plain)


def test_options_serve_several_trainers(tmp_path):
    shares = {"logging_steps": 0.25, "save_strategy": "steps", "save_steps": 0.5}
    shares |= {"eval_strategy": "steps", "eval_steps": 0.5, "learning_rate": None, "max_steps": 4}
    accelerator = {"gradient_accumulation_kwargs": {"num_steps": 1}}
    args = TDPOConfig(output_dir=str(tmp_path), accelerator_config=accelerator, **{**SETTINGS, **shares})
    before = copy.deepcopy(vars(args))
    curves = []
    for _ in range(2):
        rows = make_preferences()
        data = {"train_dataset": rows, "eval_dataset": rows.select(range(4)), "processing_class": make_tokenizer()}
        trainer = TDPOTrainer(make_model("gpt2"), args=args, **data)
        trainer.train()
        curves.append([(name, entry[name]) for entry in trainer.state.log_history for name in entry if "loss" in name])
        assert {name: str(value) for name, value in vars(args).items()} == {n: str(v) for n, v in before.items()}
    assert curves[0] == curves[1]


def test_callbacks_of_the_user(tmp_path):
    class Stops(TrainerCallback):
        def __init__(self):
            self.called = []

        def on_train_begin(self, args, state, control, **others):
            self.called.append("begin")

        def on_step_end(self, args, state, control, **others):
            control.should_training_stop = state.global_step == 2

        def on_evaluate(self, args, state, control, metrics, **others):
            self.called.append(metrics["eval_loss"])

        def on_log(self, args, state, control, logs, **others):
            self.called.append(logs.get("kl/chosen"))

    callback = Stops()
    data = {"train_dataset": make_preferences(), "eval_dataset": make_preferences(4)}
    args = TDPOConfig(output_dir=str(tmp_path), **{**SETTINGS, "eval_strategy": "steps", "eval_steps": 2})
    trainer = TDPOTrainer(
        make_model("gpt2"), args=args, processing_class=make_tokenizer(), callbacks=[callback], **data
    )
    trainer.train()
    assert trainer.state.global_step == 2
    begun, first, second, of_evaluation, loss, of_training = callback.called
    assert (begun, of_evaluation, of_training) == ("begin", None, None)
    assert [first, second] == [entry["kl/chosen"] for entry in trainer.state.log_history if "kl/chosen" in entry]
    assert loss == trainer.state.log_history[2]["eval_loss"]


def test_rows_are_grouped_by_length(tmp_path):
    spreads = []
    for strategy in ("random", "group_by_length"):
        options = {"train_sampling_strategy": strategy, "per_device_train_batch_size": 6}
        trainer = make_trainer(tmp_path, train_dataset=make_preferences(144), **options)
        order = list(trainer._get_train_sampler())
        batches = [trainer.train_dataset[order[first : first + 6]]["length"] for first in range(0, len(order), 6)]
        spreads.append(sum(max(lengths) - min(lengths) for lengths in batches))
    assert 2 * spreads[1] < spreads[0]


SCHEDULE = {"lr_scheduler_type": "linear", "warmup_steps": 3, "learning_rate": 3e-4, "max_steps": 12}


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("plain"), model=make_model("llama"), **SCHEDULE)
    trainer.train()
    return trainer.state.log_history


@pytest.mark.parametrize("options", [{"bf16": True}, {"optim": "rmsprop"}, {"gradient_checkpointing": True}])
def test_training_options(options, tmp_path, plain_run):
    trainer = make_trainer(tmp_path, model=make_model("llama"), audit="never", **SCHEDULE, **options)
    seen = []

    def record(module, arguments, output):
        seen.append(output.dtype)

    trainer.model.model.layers[0].mlp.up_proj.register_forward_hook(record)
    trainer.train()
    log = trainer.state.log_history
    assert log[11]["rewards/margins"] > log[0]["rewards/margins"] + 0.02
    assert [entry["learning_rate"] for entry in log[:4]] == pytest.approx([0, 1e-4, 2e-4, 3e-4])
    losses, plain = ([entry["loss"] for entry in entries[:12]] for entries in (log, plain_run))
    if "bf16" in options:
        assert seen == 12 * [torch.bfloat16]
        assert losses == pytest.approx(plain, rel=0.05)
        assert losses != plain
    elif "optim" in options:
        assert type(trainer.optimizer.optimizer).__name__ == "RMSprop"
        assert losses[:2] == plain[:2]  # the first update has a learning rate of zero
        assert losses[2:] != plain[2:]
    else:
        assert seen == 24 * [torch.float32]  # once more for the backward of every step
        assert losses == pytest.approx(plain, rel=1e-5)
