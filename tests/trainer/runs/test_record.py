"""What identifies a run: its options, models, adapters, objective and data are compared before it resumes."""

import functools
import json

import pytest
import torch
from peft import LoraConfig

from helpers.model_families import make_model
from helpers.trainer_cases import FOUR_STEPS, make_preferences, make_trainer
from tdpo_ext import MarginLoss


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
    trainer = make_trainer(finished, **{**FOUR_STEPS, **changes})
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
    "reference_dtype": (
        {"precompute_reference": True, "reference_dtype": "float32"},
        "reference_dtype was 'bfloat16' and is 'float32'",
    ),
    "optim_args": ({"optim": "sgd", "optim_args": "momentum=0.5"}, "optim_args was None and is 'momentum=0.5'"),
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
    trainer = make_trainer(tmp_path, **{**FOUR_STEPS, **changes})
    with pytest.raises(ValueError, match=r"checkpoint-4 is of another run") as refused:
        trainer.train(resume_from_checkpoint=str(finished / "checkpoint-4"))
    assert said in str(refused.value)


def test_processes_and_dtypes_are_compared(finished, tmp_path):
    written = json.loads((finished / "checkpoint-4" / "run.json").read_text())
    written["options"] |= {"processes": 2, "dtype": "bfloat16"}
    (tmp_path / "run.json").write_text(json.dumps(written))
    record = make_trainer(tmp_path / "out", **FOUR_STEPS).record
    said = r"another run: dtype was 'bfloat16' and is 'float32'; processes was 2 and is 1\. Restore"
    with pytest.raises(ValueError, match=said):
        record.check(tmp_path, anyway=False)


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
    trainer = make_trainer(finished, model=named(make_model("gpt2"), model), ref_model=frozen, beta=0.2, **FOUR_STEPS)
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
    make_trainer(folder, peft_config=adapters(), **{**FOUR_STEPS, "max_steps": 2}).train()
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
    trainer = make_trainer(finished_adapters, peft_config=adapters(**changes), **{**FOUR_STEPS, "max_steps": 2})
    with pytest.raises(ValueError, match=r"checkpoint-2 is of another run") as refused:
        trainer.train(resume_from_checkpoint=True)
    assert f"is of another run: {said}. Restore" in str(refused.value)


def test_other_data_are_refused_unless_it_is_wanted(finished, caplog):
    other = make_preferences().select(range(20))
    with pytest.raises(ValueError, match="the training data, as tokens, are others"):
        make_trainer(finished, train_dataset=other, **FOUR_STEPS).train(resume_from_checkpoint=True)
    trainer = make_trainer(finished, train_dataset=other, resume_anyway=True, **FOUR_STEPS)
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
            ValueError,
            match=r"is of another run: objective was '\S*test_record.of_kls\(scale=1.0\) #\w+\(scale=0.5\)' and is",
        ):
            make_trainer(tmp_path, objective=other, max_steps=3, **options).train(resume_from_checkpoint=True)


def test_longer_runs_and_other_places_of_logs_are_the_same_run(finished, tmp_path):
    more = {"max_steps": 5, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "output_dir": str(tmp_path)}
    trainer = make_trainer(tmp_path, **{**FOUR_STEPS, **{name: more[name] for name in more if name != "output_dir"}})
    trainer.train(resume_from_checkpoint=str(finished / "checkpoint-4"))
    assert trainer.state.global_step == 5
