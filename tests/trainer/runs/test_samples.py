"""Samples of evaluation prompts: how many, from which models, and where they are written."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tdpo import TDPOConfig
from tdpo.reference.reference import Reference
from tdpo.runs.samples import show_samples

from helpers.device import USE_CPU
from helpers.model_families import make_model
from helpers.trainer_cases import make_preferences, make_trainer

SAMPLES = {"eval_samples": 2, "eval_sample_tokens": 3}


def samples_of(path):
    return {file.name: json.loads(file.read_text()) for file in (path / "samples").glob("*")}


@pytest.mark.parametrize(("wanted", "drawn"), [(1, 1), (3, 3), (50, 3)])
def test_no_more_samples_than_rows(wanted, drawn, tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=make_preferences(3), **{**SAMPLES, "eval_samples": wanted})
    trainer.evaluate()
    samples = samples_of(tmp_path)["eval-step-0.json"]
    prompts = [trainer.processing_class.decode(row["prompt_ids"]) for row in trainer.eval_dataset]
    assert [sample["prompt"] for sample in samples] == prompts[:drawn]


def test_no_samples_by_default(tmp_path):
    make_trainer(tmp_path).evaluate()
    assert samples_of(tmp_path) == {}


def test_every_split_and_step_has_a_file(tmp_path):
    splits = {"one": make_preferences(3), "two": make_preferences(4)}
    evaluations = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    trainer = make_trainer(tmp_path, eval_dataset=splits, **SAMPLES, **evaluations)
    trainer.train()
    assert set(samples_of(tmp_path)) == {f"eval_{split}-step-{n}.json" for split in splits for n in (1, 2)}


@pytest.mark.parametrize("adapters", [False, True])
def test_a_reference_of_which_only_the_head_is_left_is_not_sampled(adapters, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear") if adapters else None
    options = {"model": make_model("llama"), "peft_config": config, "precompute_reference": True}
    trainer = make_trainer(tmp_path, **options, **SAMPLES)
    trainer.evaluate()
    assert [set(sample) for sample in samples_of(tmp_path)["eval-step-0.json"]] == 2 * [{"prompt", "policy"}]


@pytest.mark.parametrize("training", [True, False])
def test_models_are_sampled_in_evaluation_mode_and_left_in_their_own(training, tokenizer, tmp_path):
    model, seen, end = make_model("gpt2").train(training), [], tokenizer.eos_token_id

    def generate(*, input_ids, do_sample, max_new_tokens, **options):
        seen.append((model.training, input_ids.tolist(), do_sample, max_new_tokens))
        return torch.cat([input_ids, torch.tensor([[5, end]])], dim=1)

    model.generate = generate
    rows = Dataset.from_list([{"prompt_ids": []}, {"prompt_ids": [7, 8]}])
    args = TDPOConfig(output_dir=str(tmp_path), use_cpu=USE_CPU, **SAMPLES)
    show_samples(model, Reference(make_model("gpt2"), None, 1.0, None), tokenizer, rows, args, "some")
    samples = [{"prompt": s["prompt"], "policy": s["policy"]} for s in samples_of(tmp_path)["some.json"]]
    # An empty prompt begins behind the end of another text.
    assert seen == [(False, [[end]], False, 3), (False, [[7, 8]], False, 3)]
    assert model.training == training
    assert samples == [{"prompt": prompt, "policy": tokenizer.decode([5])} for prompt in ("", tokenizer.decode([7, 8]))]
