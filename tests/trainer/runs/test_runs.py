"""Runs that are called again: finished ones, other ones, and ones that a signal ended."""

import functools
import json
import os
import signal
import threading

import pytest
import torch
from peft import LoraConfig
from tdpo.runs.checkpoints import checkpoints_of
from tdpo.runs.stopping import Terminated

from helpers.model_families import make_model
from helpers.trainer_cases import losses, make_preferences, make_trainer
from tdpo_ext import MarginLoss

SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    trainer = make_trainer(folder, **SAVES)
    trainer.train()
    return folder


def test_a_finished_run_is_loaded_and_left_as_it_is(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    trainer = make_trainer(finished, **SAVES)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.was_finished
    assert trainer.state.global_step == 4
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    other = make_trainer(finished, **SAVES)
    other.train(resume_from_checkpoint=str(finished / "checkpoint-2"))
    assert not other.was_finished
    assert f"Resuming from {finished / 'checkpoint-2'}, at step 2 of 4." in capsys.readouterr().err
    for name, value in other.model.state_dict().items():  # what was loaded is what was trained
        assert value.equal(trainer.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"beta": 0.3}, "beta was 0.1 and is 0.3"),
        ({"learning_rate": 1e-4}, "learning_rate was 0.001 and is 0.0001"),
        (
            {"per_device_train_batch_size": 2, "seed": 3},
            "per_device_train_batch_size was 4 and is 2; seed was 42 and is 3",
        ),
        ({"optim": "sgd"}, "optim was 'adamw_torch_fused' and is 'sgd'"),
        (
            {"peft_config": LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["c_attn"])},
            "adapters' r was None and is 2",
        ),
    ],
)
def test_another_run_is_refused_by_name(changes, said, finished):
    trainer = make_trainer(finished, **{**SAVES, **changes})
    with pytest.raises(ValueError, match=r"checkpoint-4 is of another run: .*--resume_anyway") as refused:
        trainer.train(resume_from_checkpoint=True)
    assert said in str(refused.value)


# Another value of every option that shapes what is trained, and how the message begins that names it.
OTHER_OPTIONS = {
    "variant": ({"variant": "tdpo1"}, "variant was 'tdpo2' and is 'tdpo1'"),
    "alpha": ({"alpha": 0.7}, "alpha was 0.5 and is 0.7"),
    "label_smoothing": ({"variant": "dpo", "label_smoothing": 0.1}, "label_smoothing was 0.0 and is 0.1"),
    "simpo_gamma": ({"variant": "simpo", "simpo_gamma": 0.7}, "simpo_gamma was 0.5 and is 0.7"),
    "kl_direction": ({"kl_direction": "reverse"}, "kl_direction was None and is 'reverse'"),
    "disable_dropout": ({"disable_dropout": False}, "disable_dropout was True and is False"),
    "max_length": ({"max_length": 39}, "max_length was 40 and is 39"),
    "max_prompt_length": ({"max_prompt_length": 15}, "max_prompt_length was 16 and is 15"),
    "overlong": ({"overlong": "drop"}, "overlong was 'truncate' and is 'drop'"),
    "precompute_reference": ({"precompute_reference": True}, "precompute_reference was False and is True"),
    "reference_dtype": ({"reference_dtype": "float32"}, "reference_dtype was 'bfloat16' and is 'float32'"),
    "optim_args": ({"optim_args": "foreach=True"}, "optim_args was None and is 'foreach=True'"),
    "optim_target_modules": ({"optim_target_modules": ["x"]}, "optim_target_modules was None and is ['x']"),
    "lr_scheduler_type": ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type was 'linear' and is 'cosine'"),
    "lr_scheduler_kwargs": ({"lr_scheduler_kwargs": {"a": 1}}, "lr_scheduler_kwargs was None and is {'a': 1}"),
    "warmup_steps": ({"warmup_steps": 1}, "warmup_steps was 0 and is 1"),
    "weight_decay": ({"weight_decay": 0.1}, "weight_decay was 0.0 and is 0.1"),
    "max_grad_norm": ({"max_grad_norm": 2.0}, "max_grad_norm was 1.0 and is 2.0"),
    "adam_beta1": ({"adam_beta1": 0.8}, "adam_beta1 was 0.9 and is 0.8"),
    "adam_beta2": ({"adam_beta2": 0.9}, "adam_beta2 was 0.999 and is 0.9"),
    "adam_epsilon": ({"adam_epsilon": 1e-6}, "adam_epsilon was 1e-08 and is 1e-06"),
    "neftune_noise_alpha": ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha was None and is 5.0"),
    "gradient_accumulation_steps": (
        {"gradient_accumulation_steps": 2},
        "gradient_accumulation_steps was 1 and is 2",
    ),
    "train_sampling_strategy": (
        {"train_sampling_strategy": "sequential"},
        "train_sampling_strategy was 'random' and is 'sequential'",
    ),
    "data_seed": ({"data_seed": 3}, "data_seed was None and is 3"),
    "bf16": ({"bf16": True}, "bf16 was False and is True"),
}


@pytest.mark.parametrize("name", OTHER_OPTIONS)
def test_every_option_that_shapes_the_training_is_compared(name, finished, tmp_path):
    changes, said = OTHER_OPTIONS[name]
    trainer = make_trainer(tmp_path, **{**SAVES, **changes})
    with pytest.raises(ValueError, match=r"checkpoint-4 is of another run") as refused:
        trainer.train(resume_from_checkpoint=str(finished / "checkpoint-4"))
    assert said in str(refused.value)


def named(model, name):
    model.config._name_or_path = name
    return model


@pytest.mark.parametrize(
    ("model", "ref_model", "said"),
    [
        ("", "other/reference", ["ref_model was '' and is 'other/reference'"]),
        ("other/policy", "", ["; model was '' and is 'other/policy'"]),
        ("other/policy", None, ["; model was '' and is 'other/policy'", "ref_model was '' and is 'other/policy'"]),
    ],
)
def test_models_are_compared_by_name(model, ref_model, said, finished):
    frozen = None if ref_model is None else named(make_model("gpt2"), ref_model)
    trainer = make_trainer(finished, model=named(make_model("gpt2"), model), ref_model=frozen, beta=0.2, **SAVES)
    with pytest.raises(ValueError, match="beta was") as refused:
        trainer.train(resume_from_checkpoint=True)
    for part in said:
        assert part in str(refused.value)
    assert str(refused.value).count(" was ") == 1 + len(said)


def test_a_record_does_not_depend_on_the_order_of_a_set(tmp_path):
    names = [f"{name}_proj" for name in ("v", "q", "up", "o", "k", "gate", "down")]
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=names)
    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(tmp_path, model=make_model("llama"), peft_config=config, **saves).train()
    record = json.loads((tmp_path / "checkpoint-1" / "run.json").read_text())
    assert record["options"]["adapters' target_modules"] == sorted(names)


def adapters(**changes):
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, **changes}
    return LoraConfig(task_type="CAUSAL_LM", **options)


@pytest.fixture(scope="module")
def finished_adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished-adapters")
    make_trainer(folder, peft_config=adapters(), **{**SAVES, "max_steps": 2}).train()
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 3}, "adapters' r was 2 and is 3"),
        ({"lora_alpha": 5}, "adapters' lora_alpha was 4 and is 5"),
        ({"lora_dropout": 0.5}, "adapters' lora_dropout was 0.0 and is 0.5"),
        ({"target_modules": ["c_proj"]}, "adapters' target_modules was ['c_attn'] and is ['c_proj']"),
        ({"use_rslora": True}, "adapters' use_rslora was False and is True"),
        ({"use_dora": True}, "adapters' use_dora was False and is True"),
        ({"init_lora_weights": "gaussian"}, "adapters' init_lora_weights was True and is 'gaussian'"),
        ({"rank_pattern": {"h.0": 3}}, "adapters' rank_pattern was {} and is {'h.0': 3}"),
    ],
)
def test_adapters_are_compared(changes, said, finished_adapters):
    trainer = make_trainer(finished_adapters, peft_config=adapters(**changes), **{**SAVES, "max_steps": 2})
    with pytest.raises(ValueError, match=r"checkpoint-2 is of another run") as refused:
        trainer.train(resume_from_checkpoint=True)
    assert f"is of another run: {said}. Restore" in str(refused.value)


def test_other_data_are_refused_unless_it_is_wanted(finished, caplog):
    other = make_preferences().select(range(20))
    with pytest.raises(ValueError, match="the training data, as tokens, are others"):
        make_trainer(finished, train_dataset=other, **SAVES).train(resume_from_checkpoint=True)
    trainer = make_trainer(finished, train_dataset=other, resume_anyway=True, **SAVES)
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.was_finished
    assert "the training data, as tokens, are others; resuming all the same" in caplog.text


def of_sums(chosen, rejected):
    return (chosen.logps - rejected.logps) ** 2


def of_kls(chosen, rejected, scale=1.0):
    return scale * (chosen.kl - rejected.kl) ** 2


def test_another_objective_is_refused_by_name(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    first = functools.partial(of_kls, scale=0.5)
    make_trainer(tmp_path, objective=first, max_steps=1, **options).train()
    again = make_trainer(tmp_path, objective=functools.partial(of_kls, scale=0.5), max_steps=2, **options)
    again.train(resume_from_checkpoint=True)
    for other in (None, of_sums, of_kls, functools.partial(of_kls, scale=2.0), MarginLoss(of_sums, torch.square)):
        with pytest.raises(
            ValueError, match=r"is of another run: objective was '\S*test_runs.of_kls\(scale=0.5\)' and is"
        ):
            make_trainer(tmp_path, objective=other, max_steps=3, **options).train(resume_from_checkpoint=True)


def test_longer_runs_and_other_places_of_logs_are_the_same_run(finished, tmp_path):
    more = {"max_steps": 5, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "output_dir": str(tmp_path)}
    trainer = make_trainer(tmp_path, **{**SAVES, **{name: more[name] for name in more if name != "output_dir"}})
    trainer.train(resume_from_checkpoint=str(finished / "checkpoint-4"))
    assert trainer.state.global_step == 5


def signal_at(trainer, step, kind):
    """Sends this process a signal in the middle of a step."""
    training_step = trainer.training_step

    def interrupted(*arguments):
        loss = training_step(*arguments)
        if trainer.state.global_step == step - 1:
            os.kill(os.getpid(), kind)
        return loss

    trainer.training_step = interrupted


@pytest.fixture
def interruptible():
    """A job in the background starts with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("kind", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_signals_write_a_checkpoint(kind, raised, tmp_path, capsys, interruptible):
    unbroken = make_trainer(tmp_path / "unbroken", max_steps=4)
    unbroken.train()
    options = {"save_strategy": "steps", "save_steps": 500, "max_steps": 4}
    trainer = make_trainer(tmp_path / "out", **options)
    signal_at(trainer, 1, kind)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(raised):
        trainer.train()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [path.name for path in checkpoints_of(tmp_path / "out")] == ["checkpoint-1"]
    assert "Stopping after this step with a checkpoint" in capsys.readouterr().err
    again = make_trainer(tmp_path / "out", **options)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(unbroken)


def test_signals_without_checkpoints(tmp_path, capsys, interruptible):
    trainer = make_trainer(tmp_path, max_steps=4)  # save_strategy "no"
    signal_at(trainer, 2, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 2
    assert checkpoints_of(tmp_path) == []
    assert "Stopping after this step; once more" in capsys.readouterr().err


def test_training_in_a_thread_leaves_signals_alone(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1


def test_tokens_are_counted_through_resumption(finished, tmp_path):
    unbroken = make_trainer(tmp_path, **{**SAVES, "logging_steps": 4})
    unbroken.train()
    counted = [entry["num_tokens"] for entry in unbroken.state.log_history if "loss" in entry]
    trainer = make_trainer(tmp_path, **SAVES)
    trainer.train(resume_from_checkpoint=str(finished / "checkpoint-2"))
    entries = [entry["num_tokens"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 4
    assert sorted(set(entries)) == entries
    assert entries[-1] == counted[-1]
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["num_input_tokens_seen"] == entries[-1]


@pytest.mark.parametrize("logging_steps", [1, 5])
def test_every_token_of_an_epoch_is_counted_once(logging_steps, tmp_path):
    """Prompts with each of their responses, whether a log or a checkpoint comes first, and after a resumption too."""
    epoch = {**SAVES, "max_steps": 6, "logging_steps": logging_steps, "logging_strategy": "steps"}
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
    counted = [entry["num_tokens"] for entry in trainer.state.log_history if "loss" in entry]
    assert 0 < counted[0] < counted[1] == trainer.state.num_input_tokens_seen <= 2 * max(padded)


def test_a_run_that_goes_on_is_no_longer_finished(tmp_path):
    trainer = make_trainer(tmp_path, **{**SAVES, "max_steps": 2})
    trainer.train()
    assert not trainer.was_finished
    trainer.train(resume_from_checkpoint=True)
    assert trainer.was_finished
    trainer.args.max_steps = 4
    trainer.train(resume_from_checkpoint=True)
    assert not trainer.was_finished
    assert trainer.state.global_step == 4


def test_the_seed_covers_new_adapters(tmp_path):
    weights = []
    for seed in (1, 1, 2):
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        trainer = make_trainer(tmp_path, model=make_model("llama", len(weights)), peft_config=config, seed=seed)
        weights.append(next(p for name, p in trainer.model.named_parameters() if "lora_A" in name))
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


@pytest.mark.parametrize("adapters", [False, True])
def test_default_learning_rates(adapters, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear") if adapters else None
    trainer = make_trainer(tmp_path, model=make_model("llama"), peft_config=config, learning_rate=None)
    trainer.create_optimizer()
    assert trainer.args.learning_rate == (1e-5 if adapters else 1e-6)
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.args.learning_rate


@pytest.mark.parametrize(("limit", "warnings"), [(1.0, 1), (0, 0), (1e6, 0)])
def test_a_kl_that_explodes_is_warned_of_once(limit, warnings, tmp_path, caplog):
    trainer = make_trainer(tmp_path, learning_rate=0.3, max_steps=5, kl_warning=limit)
    with caplog.at_level("WARNING"):
        trainer.train()
    kl = [entry["kl/chosen"] for entry in trainer.state.log_history if "kl/chosen" in entry]
    assert sum(value > 1.0 for value in kl) > 1
    assert caplog.text.count("the policy leaves its reference fast; a lower learning_rate (0.3 now)") == warnings


def test_rows_are_grouped_by_length(tmp_path):
    spreads = []
    for strategy in ("random", "group_by_length"):
        options = {"train_sampling_strategy": strategy, "per_device_train_batch_size": 6}
        trainer = make_trainer(tmp_path, train_dataset=make_preferences(144), **options)
        order = list(trainer._get_train_sampler())
        batches = [trainer.train_dataset[order[first : first + 6]]["length"] for first in range(0, len(order), 6)]
        spreads.append(sum(max(lengths) - min(lengths) for lengths in batches))
    assert 2 * spreads[1] < spreads[0]
