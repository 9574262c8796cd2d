"""Folders of adapters on the command line: trained further, merged before new ones, given as a reference."""

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tdpo.cli import commands
from tdpo.cli.main import main
from tdpo.models.loading import load_policy, load_reference, load_tokenizer
from tdpo.options import ModelOptions
from transformers import AutoModelForCausalLM

from helpers.model_families import make_model, make_tokenizer
from helpers.trainer_cases import with_trained_adapters, write_home

TOKENS = torch.tensor([[1, 2, 3, 4]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, adapters that were trained on it, and data."""
    folder = tmp_path_factory.mktemp("home")
    write_home(folder, model=str(folder / "sft"), max_steps=3, learning_rate=1e-2)
    with_trained_adapters(AutoModelForCausalLM.from_pretrained(folder / "model")).save_pretrained(folder / "sft")
    return folder


def log_of(out):
    return [entry for entry in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in entry]


def starts_from_sft(home, out):
    """Whether a run began at the policy with its adapters, which was its own reference."""
    first = log_of(out)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["kl/chosen"] == pytest.approx(0, abs=1e-6)
    return first["logps/chosen"]


def test_adapters_are_trained_further(home, tmp_path, capsys):
    """And a run is interrupted, resumed and merged."""
    options = [str(home / "config.yaml"), "--output_dir", str(tmp_path), "--save_steps", "1", "--merge_adapters"]
    assert main(["train", *options, "--max_steps", "2"]) == 0
    assert "; the reference is the policy; " in capsys.readouterr().err
    assert main(["train", *options]) == 0
    starts_from_sft(home, tmp_path)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (home / "sft", tmp_path))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    base = AutoModelForCausalLM.from_pretrained(home / "model")
    adapted = PeftModel.from_pretrained(base, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)


def test_adapters_are_merged_before_new_ones(home, tmp_path, caplog):
    options = [str(home / "config.yaml"), "--output_dir", str(tmp_path), "--lora_r", "2", "--merge_adapters"]
    with caplog.at_level(logging.WARNING):
        assert main(["train", *options, "--save_steps", "1", "--max_steps", "2"]) == 0
    assert f"the adapters in {home / 'sft'} are merged into the weights; lora_r adds new ones" in caplog.text
    assert main(["train", *options, "--save_steps", "1"]) == 0
    of_new = starts_from_sft(home, tmp_path)
    assert main(["train", str(home / "config.yaml"), "--output_dir", str(tmp_path / "further")]) == 0
    assert of_new == pytest.approx(starts_from_sft(home, tmp_path / "further"), rel=1e-4)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (2, str(tmp_path / "start"))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "start"), tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)


def same_as_adapted(home, out):
    """Whether the merged model in `out` is the one that was trained."""
    base = AutoModelForCausalLM.from_pretrained(home / "model")
    adapted = PeftModel.from_pretrained(base, out)
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)
    assert not list(out.glob("_*"))


@pytest.mark.parametrize("when", ["before it is written", "half written", "before it is in its place"])
def test_a_merge_that_was_killed_is_finished_by_the_same_command(when, home, tmp_path, monkeypatch, capsys):
    command = ["train", str(home / "config.yaml"), "--output_dir", str(tmp_path), "--merge_adapters"]

    def killed(*arguments):
        raise KeyboardInterrupt

    def half_written(folder, *arguments, **options):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        (folder / "pytorch_model.bin").write_bytes(b"of another merge")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if when == "before it is written":
            patched.setattr(commands, "merge_adapters", killed)
        elif when == "half written":
            patched.setattr(commands, "merge_adapters", lambda *_: SimpleNamespace(save_pretrained=half_written))
        else:
            patched.setattr(commands, "write_json", killed)
        assert main(command) == 130
    assert not (tmp_path / "merged").exists()
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said == f"{tmp_path} holds a finished run of 3 steps: its adapters were merged, to {tmp_path / 'merged'}\n"
    same_as_adapted(home, tmp_path)
    assert not (tmp_path / "merged" / "pytorch_model.bin").exists()
    assert main(command) == 0
    assert "nothing was trained or changed" in capsys.readouterr().out


def test_a_finished_run_can_be_merged_and_a_longer_one_is_merged_again(home, tmp_path, capsys):
    command = ["train", str(home / "config.yaml"), "--output_dir", str(tmp_path), "--save_steps", "1"]
    assert main(command) == 0
    assert main([*command, "--merge_adapters"]) == 0
    same_as_adapted(home, tmp_path)
    before = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert main([*command, "--max_steps", "6"]) == 0  # leaves the old one
    capsys.readouterr()
    assert main([*command, "--max_steps", "6", "--merge_adapters"]) == 0
    assert "its adapters were merged" in capsys.readouterr().out
    same_as_adapted(home, tmp_path)
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"]])
def test_a_head_that_shares_the_embedding_is_merged_on_its_own(targets, home, tmp_path):
    make_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    model = ["--model", str(tmp_path / "model"), "--lora_r", "2", "--lora_target_modules", *targets]
    out = tmp_path / "out"
    assert main(["train", str(home / "config.yaml"), *model, "--output_dir", str(out), "--merge_adapters"]) == 0
    same_as_adapted(tmp_path, out)
    before_others = load_policy(ModelOptions(model=str(out), lora_r=2))
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    torch.testing.assert_close(logits(before_others), logits(merged), rtol=1e-4, atol=1e-4)
    assert not torch.equal(*(module.weight for module in (merged.lm_head, merged.model.embed_tokens)))


def test_merging_starts_again_with_a_new_run(home, tmp_path):
    """What an abandoned run left is not taken for this run's start."""
    options = [str(home / "config.yaml"), "--output_dir", str(tmp_path), "--lora_r", "2", "--max_steps", "1"]
    make_model("llama", 5).save_pretrained(tmp_path / "start")
    assert main(["train", *options]) == 0
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    torch.testing.assert_close(logits(start), logits(load_policy(ModelOptions(model=str(home / "sft"), lora_r=2))))


def test_a_folder_of_adapters_is_a_model_everywhere(home, tmp_path, capsys):
    """As a policy it trains, as a reference it is frozen; its tokenizer is the model's where it has none."""
    adapters = str(home / "sft")
    expected = logits(with_trained_adapters(make_model("llama")))
    policy, reference = load_policy(ModelOptions(model=adapters)), load_reference(ModelOptions(ref_model=adapters))
    for model, trains in ((policy, True), (reference, False)):
        torch.testing.assert_close(logits(model), expected)
        assert any(parameter.requires_grad for parameter in model.parameters()) == trains
    assert load_tokenizer(ModelOptions(model=adapters)).get_vocab() == make_tokenizer().get_vocab()
    options = [str(home / "config.yaml"), "--output_dir", str(tmp_path), "--ref_model", adapters]
    assert main(["evaluate", *options, "--eval_dataset", str(home / "data.jsonl"), "--eval_split", "train"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["eval_kl/chosen"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("new", [[], ["--lora_r", "2"]])
def test_a_cache_is_of_the_adapters_too(new, home, tmp_path):
    options = [str(home / "config.yaml"), "--output_dir", str(tmp_path), "--precompute_reference", "--max_steps", "1"]
    assert main(["cache-reference", *options, *new, "--reference_dtype", "float32"]) == 0
    written = (tmp_path / "reference-cache" / "train" / "00000.safetensors").stat().st_mtime_ns
    assert main(["train", *options, *new, "--reference_dtype", "float32"]) == 0
    starts_from_sft(home, tmp_path)
    assert (tmp_path / "reference-cache" / "train" / "00000.safetensors").stat().st_mtime_ns == written


def test_four_bits_and_merging_are_refused(home, tmp_path, capsys):
    options = [str(home / "config.yaml"), "--output_dir", str(tmp_path), "--lora_r", "2", "--load_in_4bit"]
    assert main(["train", *options]) == 2
    assert "load_in_4bit is True, but model, " in capsys.readouterr().err


def test_adapters_without_a_base_are_named(home, tmp_path, capsys):
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    config = json.loads((home / "sft" / "adapter_config.json").read_text())
    (adapters / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    options = [str(home / "config.yaml"), "--output_dir", str(tmp_path / "out"), "--model", str(adapters)]
    assert main(["train", *options]) == 2
    assert f"of the adapters {adapters} does not name the model that they were trained on" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["model", "sft"])
@pytest.mark.parametrize("option", ["--model", "--ref_model"])
def test_training_does_not_write_over_what_it_reads(model, option, home, tmp_path, capsys):
    before = {path: path.read_bytes() for path in (home / model).iterdir()}
    options = [str(home / "config.yaml"), "--model", str(home / "other"), option, str(home / model)]
    assert main(["train", *options, "--output_dir", str(home / model)]) == 2
    assert f"output_dir is {home / model}, the folder of {option[2:]}" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (home / model).iterdir()} == before


def test_base_weights_that_changed_are_refused(home, tmp_path, capsys):
    options = [str(home / "config.yaml"), "--output_dir", str(tmp_path / "out"), "--save_steps", "1"]
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    changing = ["--model", str(tmp_path / "model"), "--lora_r", "2"]
    assert main(["train", *options, *changing, "--max_steps", "1"]) == 0
    make_model("llama", 3).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    assert main(["train", *options, *changing]) == 2
    assert "the weights of model are others than those that it started with" in capsys.readouterr().err


def test_audit(home, tmp_path, capsys):
    options = [str(home / "config.yaml"), "--output_dir", str(tmp_path / "out")]
    assert main(["audit", *options]) == 0
    assert capsys.readouterr().out.startswith("audit: 2 pairs against plain arithmetic: log-probabilities ")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
