"""The precision in which a policy trains, is evaluated and is compared with its reference."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file
from tdpo import TDPOConfig, TDPOTrainer
from tdpo.cli.main import main
from tdpo.models.loading import load_policy, load_reference, loaded_dtype, lora_config
from tdpo.options import ModelOptions
from tdpo.precision import spacing, typical_size
from tdpo.trl import TDPOTrainer as TRLTrainer
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from trl import DPOConfig

from helpers.device import USE_CPU
from helpers.model_families import make_model, make_tokenizer
from helpers.trainer_cases import SETTINGS, losses, make_preferences, make_trainer

LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder of a bfloat16 checkpoint, as most are, and of preferences."""
    folder = tmp_path_factory.mktemp("home")
    make_model("llama").to(torch.bfloat16).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    make_preferences().to_json(str(folder / "data.jsonl"))
    return folder


def flags(home, out, *more, **options):
    """Flags of a command on the checkpoint, with the default learning rate."""
    settings = {name: value for name, value in SETTINGS.items() if name not in ("learning_rate", "report_to")}
    given = {"model": home / "model", "dataset": home / "data.jsonl", "eval_dataset": home / "data.jsonl"}
    given |= {**settings, "max_steps": 2, "report_to": "none", "output_dir": out, **options}
    return [*(f"--{name}={value}" for name, value in given.items()), *more]


def share_of_changed(start, trained):
    """The share of a model's weights, embeddings apart, whose values are others after training."""
    before, after = (load_file(Path(folder, "model.safetensors")) for folder in (start, trained))
    names = [name for name in before if ".layers." in name]
    changed = sum((before[name].double() != after[name].double()).sum().item() for name in names)
    return changed / sum(before[name].numel() for name in names)


def first_entry(out):
    return json.loads(Path(out, "trainer_state.json").read_text())["log_history"][0]


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # a head of its own, and one that is tied
def test_evaluations_are_of_the_weights_as_they_are(family, tmp_path):
    """The fused optimizer changes weights without a trace in their version counters."""
    reference = make_model(family, 1)
    options = {"bf16": True, "learning_rate": 3e-2, "optim": "adamw_torch_fused", "max_steps": 2}
    trainer = make_trainer(tmp_path, make_model(family, 0), reference, eval_strategy="steps", eval_steps=1, **options)
    expected = []

    def evaluate_a_copy(*arguments, model, **others):
        reloaded = make_model(family, 0)
        reloaded.load_state_dict(model.state_dict())
        expected.append(make_trainer(tmp_path, reloaded, reference, **options).evaluate())

    trainer.add_callback(type("EvaluateACopy", (transformers.TrainerCallback,), {"on_step_end": evaluate_a_copy})())
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    evaluations.append(trainer.evaluate())
    expected.append(expected[-1])
    for found, right in zip(evaluations, expected, strict=True):
        for name in ("eval_loss", "eval_kl/chosen"):
            assert found[name] == right[name], name


@pytest.mark.parametrize("bf16", [False, True])
def test_a_whole_policy_trains_in_float32_and_starts_as_its_reference(bf16, home, tmp_path, caplog):
    """Of a bfloat16 checkpoint; on its own precision most steps would be lost."""
    assert main(["train", *flags(home, tmp_path, bf16=bf16)]) == 0
    assert share_of_changed(home / "model", tmp_path) > 0.95
    start = first_entry(tmp_path)
    assert start["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert start["kl/chosen"] == start["kl/rejected"] == 0
    assert "weights train" not in caplog.text


def test_low_precision_is_there_for_the_asking_and_told_of(home, tmp_path, caplog):
    assert main(["train", *flags(home, tmp_path, dtype="bfloat16")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert share_of_changed(home / "model", tmp_path) < 0.05
    assert caplog.text.count("bfloat16 weights train: a step of the learning rate, 1e-06, is 0.0") == 1


def test_the_sentence_by_hand(tmp_path, caplog):
    model = make_model("llama").to(torch.bfloat16)
    with torch.no_grad():
        for weights in model.parameters():
            weights.fill_(-0.75)  # in [1/2, 1), where bfloat16 numbers are 2^-8 apart
    trainer = make_trainer(tmp_path, model, make_model("llama", 1), learning_rate=2**-10, max_steps=1)
    trainer.evaluate()
    assert not caplog.text  # nothing trains
    trainer.train()
    assert (
        "bfloat16 weights train: a step of the learning rate, 0.000976562, is 0.25 of the spacing of a typical weight "
        "(0.0039 at 0.75), and less than half a spacing is rounded away" in caplog.text
    )


def test_spacings_and_typical_sizes():
    for dtype in (torch.bfloat16, torch.float16):
        for size in (1e-3, 0.05, 0.5, 1.0, 3.0):
            number = torch.tensor(size, dtype=dtype)
            above = (number.view(torch.int16) + 1).view(dtype)
            assert spacing(number.item(), dtype) == above.item() - number.item()
        assert spacing(0.0, dtype) > 0
    assert typical_size([torch.tensor([0.0, -3.0, 1.0]), torch.tensor([[0.0], [-2.0]])]) == 2
    assert typical_size([torch.zeros(3)]) == 0
    large = torch.linspace(-1, 1, 3_000_001)
    assert typical_size([large, large + 1]) == pytest.approx(2 / 3, rel=1e-3)


def test_adapters_train_in_float32_beside_frozen_weights_as_they_are_stored(home, tmp_path, caplog):
    models = ModelOptions(model=str(home / "model"), lora_r=4)
    trainer = make_trainer(tmp_path, load_policy(models), peft_config=lora_config(models), max_steps=2)
    trainer.train()
    dtypes = {(weights.requires_grad, weights.dtype) for weights in trainer.model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-7)
    assert "weights train" not in caplog.text


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, "float32"),
        ({"lora_r": 4}, "auto"),
        ({"load_in_4bit": True}, "auto"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16", "lora_r": 4}, "float16"),
    ],
)
def test_the_precision_that_weights_are_loaded_in(options, dtype):
    assert loaded_dtype(ModelOptions(**options)) == dtype


def test_policy_and_reference_are_loaded_alike(home):
    for models in (
        ModelOptions(model=home / "model", ref_model=home / "model", **more) for more in ({}, {"lora_r": 4})
    ):
        assert load_policy(models).dtype == load_reference(models).dtype


def test_an_evaluation_repeats_that_of_the_training(home, tmp_path):
    training = flags(home, tmp_path, "--do_eval", eval_split="train", eval_strategy="steps", eval_steps=2)
    assert main(["train", *training, "--learning_rate=0.001"]) == 0
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    (trained,) = [entry for entry in log if "eval_loss" in entry]
    models = {"model": tmp_path, "ref_model": home / "model", "output_dir": tmp_path / "evaluation"}
    assert main(["evaluate", *flags(home, eval_split="train", **{"out": None, **models})]) == 0
    evaluated = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    for name in ("eval_loss", "eval_kl/chosen", "eval_kl/rejected"):
        assert evaluated[name] == pytest.approx(trained[name], rel=1e-5), name


@pytest.mark.parametrize("bf16", [False, True])
def test_a_cached_reference_is_the_policy_as_it_starts(bf16, home, tmp_path, capsys):
    caching = {"reference_cache": tmp_path / "cache", "reference_dtype": "float32"}
    options = flags(home, tmp_path / "out", bf16=bf16, **caching)
    assert main(["cache-reference", *options]) == 0
    assert main(["train", *options, "--precompute_reference"]) == 0
    start = first_entry(tmp_path / "out")
    assert max(start["kl/chosen"], start["kl/rejected"]) < 1e-6
    other = flags(home, tmp_path / "new", bf16=not bf16, **caching)
    assert main(["train", *other, "--precompute_reference"]) == 2
    assert "cache/train was made with another autocast" in capsys.readouterr().err


def test_a_run_resumes_in_its_precision(home, tmp_path, capsys):
    assert main(["train", *flags(home, tmp_path, save_strategy="steps", save_steps=2)]) == 0
    longer = flags(home, tmp_path, save_strategy="steps", save_steps=2, max_steps=3)
    assert main(["train", *longer, "--dtype=bfloat16"]) == 2
    assert "dtype was 'float32' and is 'bfloat16'" in capsys.readouterr().err
    assert main(["train", *longer]) == 0


def half_precision_attention(module, query, *arguments, **options):
    if query.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        raise RuntimeError("only float16 and bfloat16")
    return AttentionInterface()["sdpa"](module, query, *arguments, **options)


@pytest.mark.parametrize("cached", [False, True])
def test_attention_that_needs_low_precision(cached, tmp_path, recwarn):
    """As flash attention does: probes, the cache and samples run in what training runs in."""
    AttentionInterface.register("half_precision", half_precision_attention)
    AttentionMaskInterface.register("half_precision", sdpa_mask)
    model = make_model("llama")
    model.set_attn_implementation("half_precision")
    options = {"padding_free": True, "eval_samples": 1, "precompute_reference": cached}
    trainer = make_trainer(tmp_path, model, bf16=True, max_steps=1, **options)
    trainer.train()
    trainer.evaluate()
    (sample,) = json.loads((tmp_path / "samples" / "eval-step-1.json").read_text())
    assert ("reference" in sample) != cached
    assert not [warning for warning in recwarn if "fused loss" in str(warning.message)]


@pytest.mark.parametrize("name", ["model", "ref_model"])
def test_flash_attention_over_float32_is_refused_without_autocast(name, tmp_path):
    models = {"model": make_model("llama"), "ref_model": make_model("llama", 1)}
    models[name].config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=f"attention of {name} is flash_attention_2.*float32: set bf16"):
        make_trainer(tmp_path, **models)


def test_options_serve_more_than_one_trainer(tmp_path):
    args = TDPOConfig(output_dir=str(tmp_path), **{**SETTINGS, "learning_rate": None})
    for adapters, expected in ((None, 1e-6), (LORA, 1e-5), (None, 1e-6)):
        trainer = TDPOTrainer(
            make_model("llama"),
            args=args,
            train_dataset=make_preferences(),
            processing_class=make_tokenizer(),
            peft_config=adapters,
        )
        assert trainer.args.learning_rate == expected
    assert args.learning_rate is None


def test_trls_trainer_tells_of_low_precision_and_probes_in_its_own(tmp_path, caplog):
    AttentionInterface.register("half_precision", half_precision_attention)
    AttentionMaskInterface.register("half_precision", sdpa_mask)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    settings = {"use_cpu": USE_CPU, "report_to": "none", "max_steps": 1, "bf16": True, "save_strategy": "no"}
    for dtype, told in ((torch.float32, 0), (torch.bfloat16, 1)):
        models = [make_model("llama", seed).to(dtype) for seed in (0, 1)]
        for model in models:
            model.set_attn_implementation("half_precision")
        TRLTrainer(
            *models,
            args=DPOConfig(output_dir=str(tmp_path), **settings),
            train_dataset=make_preferences(),
            processing_class=tokenizer,
        ).train()
        assert caplog.text.count("bfloat16 weights train") == told
