"""The trainer's options: the loss that they name, and what is refused, by name."""

import functools
from dataclasses import fields

import numpy as np
import pytest
import torch
from tdpo import TDPOConfig, TDPOTrainer
from tdpo.loss.objectives import OBJECTIVES as OBJECTIVES_BY_NAME
from tdpo.options import TDPOOptions, identity_options
from tdpo.reference.stored_states import STORED_STATES
from transformers import HfArgumentParser, TrainingArguments

from helpers.device import USE_CPU
from helpers.model_families import make_model, make_tokenizer
from helpers.trainer_cases import make_trainer
from tdpo_ext import TokenDivergence, dpo_loss, tdpo_loss
from tdpo_ext.divergence import KL_DIRECTIONS

OBJECTIVES = {
    "tdpo2": functools.partial(tdpo_loss, beta=0.3, alpha=0.7, variant="tdpo2"),
    "tdpo1": functools.partial(tdpo_loss, beta=0.3, variant="tdpo1"),
    "dpo": functools.partial(dpo_loss, beta=0.3),
}


@pytest.mark.parametrize("variant", OBJECTIVES)
def test_options_name_a_loss(variant, tmp_path):
    alpha = {"alpha": 0.7} if variant == "tdpo2" else {}
    args = TDPOConfig(output_dir=str(tmp_path), use_cpu=USE_CPU, variant=variant, beta=0.3, **alpha)
    chosen, rejected = (TokenDivergence.unstack(3 * torch.rand(6, 5)) for _ in range(2))
    losses = args.trained_objective().objective(chosen, rejected)
    assert torch.equal(losses, OBJECTIVES[variant](chosen, rejected))
    for other in OBJECTIVES.keys() - {variant}:
        assert not torch.allclose(losses, OBJECTIVES[other](chosen, rejected))
    margins = chosen.logps - chosen.ref_logps - rejected.logps + rejected.ref_logps
    if variant != "dpo":
        margins -= (0.7 if variant == "tdpo2" else 1.0) * (rejected.kl - chosen.kl)
    torch.testing.assert_close(losses, torch.log1p(torch.exp(-0.3 * margins)))


NOT_NUMBERS = ["0.1", None, [0.1], True, torch.ones(2)]
NOT_COUNTS = ["3", None, 2.5, True, [3]]
NOT_SWITCHES = ["yes", 1, None, 0.0]
WRONG_TYPES = {
    "beta": NOT_NUMBERS,
    "alpha": NOT_NUMBERS,
    "label_smoothing": NOT_NUMBERS,
    "simpo_gamma": NOT_NUMBERS,
    "max_length": NOT_COUNTS,
    "max_prompt_length": NOT_COUNTS,
    "eval_samples": NOT_COUNTS,
    "eval_sample_tokens": NOT_COUNTS,
    "logits_budget": ["1e9", 1.5, True, [1]],
    "disable_dropout": NOT_SWITCHES,
    "padding_free": NOT_SWITCHES,
    "precompute_reference": NOT_SWITCHES,
    "remove_unused_columns": NOT_SWITCHES,
    "reference_cache": [3, True, ["folder"]],
    "token_columns": ["weight", 3, [3]],
    "kl_warning": NOT_NUMBERS,
    "dataset_num_proc": ["3", 2.5, True, [3]],
    "resume_anyway": NOT_SWITCHES,
    "learning_rate": ["1e-5", True, [0.1]],
}
OUT_OF_RANGE = {
    "beta": [0.0, -1.0, float("inf"), float("nan")],
    "alpha": [-1.0, float("inf"), float("nan")],
    "label_smoothing": [0.5, -0.1],
    "simpo_gamma": [-1.0],
    "kl_direction": ["backward", 1],
    "variant": ["cpo", 3, None],
    "overlong": ["cut", None],
    "reference_dtype": ["int8", torch.float32, None],
    "max_length": [0, 1, -5],
    "max_prompt_length": [0, -1, 40, 41],
    "eval_samples": [-1],
    "eval_sample_tokens": [-1],
    "logits_budget": [0, -1],
    "kl_warning": [-1.0, float("nan")],
    "dataset_num_proc": [0, -1],
    "shared_prompts": ["sometimes", None, True],
    "learning_rate": [-1.0, float("nan")],
}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [(name, value, TypeError) for name, values in WRONG_TYPES.items() for value in values]
    + [(name, value, ValueError) for name, values in OUT_OF_RANGE.items() for value in values],
)
def test_bad_options_are_named(name, value, error, tmp_path):
    options = {"max_length": 40, "max_prompt_length": 8, **{name: value}}
    with pytest.raises(error, match=rf"^{name} is "):
        TDPOConfig(output_dir=str(tmp_path), use_cpu=USE_CPU, **options)


@pytest.mark.parametrize(
    ("variant", "name", "value"),
    [("dpo", "alpha", 0.3), ("tdpo1", "alpha", 0.0), ("ipo", "label_smoothing", 0.1), ("tdpo2", "simpo_gamma", 1.0)],
)
def test_options_without_use_are_refused(variant, name, value, tmp_path):
    with pytest.raises(ValueError, match=rf"^{name} is {value}, but the loss {variant} does not use it"):
        TDPOConfig(output_dir=str(tmp_path), use_cpu=USE_CPU, variant=variant, **{name: value})


def test_beta_is_checked_for_every_variant(tmp_path):
    for variant in OBJECTIVES:
        with pytest.raises(ValueError, match=r"^beta is 0"):
            TDPOConfig(output_dir=str(tmp_path), use_cpu=USE_CPU, variant=variant, beta=0)


def test_good_options(tmp_path):
    options = {"beta": 1, "alpha": 0, "max_length": 2, "max_prompt_length": 1, "logits_budget": 1, "eval_samples": 0}
    args = TDPOConfig(output_dir=str(tmp_path), use_cpu=USE_CPU, **options)
    assert args.reference_folder == tmp_path / "reference-cache"
    assert TDPOConfig(output_dir=str(tmp_path), use_cpu=USE_CPU, beta=np.float32(0.5)).beta == 0.5
    assert TDPOConfig(output_dir="out", use_cpu=USE_CPU, reference_cache=tmp_path).reference_folder == tmp_path


def test_bad_arguments_of_the_trainer_are_named(tmp_path):
    args = TDPOConfig(output_dir=str(tmp_path), use_cpu=USE_CPU, max_length=64, max_prompt_length=32)
    good = {"model": make_model("gpt2"), "args": args, "processing_class": make_tokenizer()}
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=USE_CPU)
    for name, value in {
        "model": "gpt2",
        "ref_model": "gpt2",
        "args": plain,
        "train_dataset": [{"chosen": "a"}],
    }.items():
        with pytest.raises(TypeError, match=name.replace("train_", "") + " is "):
            TDPOTrainer(**{**good, name: value})
    with pytest.raises(ValueError, match="processing_class"):
        TDPOTrainer(good["model"], args=args)


def test_choices_are_what_there_is():
    choices = {field.name: field.metadata.get("choices") for field in fields(TDPOOptions)}
    assert choices["variant"] == tuple(OBJECTIVES_BY_NAME)
    assert choices["kl_direction"] == KL_DIRECTIONS
    assert set(choices["reference_dtype"]) == set(STORED_STATES)


def test_what_identifies_a_run_and_what_a_card_shows_is_said_by_the_options(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, eval_sample_tokens=7)
    assert "eval_sample_tokens" not in trainer.record.options
    assert "eval_sample_tokens" not in trainer.card()
    assert set(identity_options()) <= trainer.record.options.keys()
    text = next(field.metadata["help"] for field in fields(TDPOOptions) if field.name == "eval_sample_tokens")
    monkeypatch.setattr(text, "card", True)
    assert "eval_sample_tokens: 7\n" in trainer.card()
    monkeypatch.setattr(text, "identity", True)
    del trainer.record  # made once a trainer
    assert trainer.record.options["eval_sample_tokens"] == 7
    monkeypatch.setattr(text, "least", 8)
    with pytest.raises(ValueError, match="eval_sample_tokens is 7"):
        TDPOConfig(output_dir=str(tmp_path), use_cpu=USE_CPU, eval_sample_tokens=7)


def test_other_parsers_take_the_options(tmp_path):
    parser = HfArgumentParser(TDPOConfig)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", "--variant", "ipo"])
    assert args.variant == "ipo"
