"""The command memory, as a user types it, against the models that training loads and what it makes of them."""

import json

import pytest
import torch
import yaml
from tdpo import TDPOConfig
from tdpo.cli import commands
from tdpo.cli.main import main
from tdpo.data.collator import PreferenceCollator
from tdpo.memory.sizes import bytes_of, text_of
from tdpo.memory.training import Batch, Device, Training
from tdpo.models.loading import load_policy, lora_config
from tdpo.options import ModelOptions
from transformers import AutoModelForCausalLM, PreTrainedModel

import tdpo_ext.fused.call
from helpers.model_families import make_model
from helpers.trainer_cases import make_trainer, with_trained_adapters

PROMPT, RESPONSE, PAIRS = 6, 20, 3
SETTINGS = {
    "max_length": PROMPT + RESPONSE,
    "max_prompt_length": PROMPT,
    "per_device_train_batch_size": PAIRS,
    "use_cpu": True,
    "report_to": "none",
    "learning_rate": 1e-3,
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a model's configuration and no weights, and a configuration that names it; no data."""
    make_model("llama").config.save_pretrained(tmp_path / "model")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": str(tmp_path / "model"), **SETTINGS}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def counted(capsys, *options):
    assert main(["memory", "config.yaml", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def token_rows(rows=PAIRS):
    lengths = {"prompt_ids": PROMPT, "chosen_ids": RESPONSE, "rejected_ids": RESPONSE}
    return [{name: torch.randint(1, 200, (length,)).tolist() for name, length in lengths.items()} for _ in range(rows)]


def optimizer_bytes(optimizer):
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize(
    ("flags", "optim"),
    [
        ([], "adamw_torch_fused"),
        ([], "rmsprop"),
        ([], "adafactor"),
        ([], "sgd"),
        (["--dtype", "bfloat16"], "adamw_torch"),
        (["--lora_r", "4"], "adamw_torch_fused"),
    ],
)
def test_weights_gradients_and_optimizer_are_those_of_training(flags, optim, home, tmp_path, capsys):
    found = counted(capsys, *flags, "--optim", optim)
    make_model("llama").save_pretrained(home / "model")
    models = ModelOptions(
        model=str(home / "model"),
        dtype=flags[1] if "--dtype" in flags else "auto",
        lora_r=4 if "--lora_r" in flags else 0,
    )
    trainer = make_trainer(
        tmp_path / "out", load_policy(models), peft_config=lora_config(models), optim=optim, max_steps=1
    )
    policy = trainer.model
    trainer.train()
    assert found["parameters"] == sum(p.numel() for p in policy.parameters())
    assert found["trained"] == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert found["weights"] == sum(p.nbytes for p in policy.parameters())
    assert found["gradients"] == sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    assert found["optimizer"] == optimizer_bytes(trainer.optimizer)


def test_the_plan_is_the_one_of_a_training_step(home, tmp_path, capsys, monkeypatch):
    made = []

    def recorded(*arguments, **options):
        made.append(make_plan(*arguments, **options))
        return made[-1]

    make_plan = tdpo_ext.fused.call.make_plan
    budget = 60_000
    found = counted(capsys, "--logits_budget", str(budget), "--bf16")
    options = {**SETTINGS, "bf16": True, "logits_budget": budget, "report_to": []}
    trainer = make_trainer(tmp_path / "out", make_model("llama"), **options)
    batch = PreferenceCollator(0)([{**row, "dataset_row": i, "token_row": i} for i, row in enumerate(token_rows())])
    monkeypatch.setattr(tdpo_ext.fused.call, "make_plan", recorded)
    with trainer.accelerator.autocast():
        trainer.model(preference=batch)
    assert [str(plan) for plan in made] == [found["plan"]]
    assert len({found["plan"], counted(capsys)["plan"]}) == 2


def saved_bytes(model, length, autocast):
    """Bytes that autograd keeps of a real forward pass of a padded sequence, and not the parameters themselves."""
    kept, mask = {}, torch.ones((1, length), dtype=torch.long)
    mask[0, -1] = 0

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    precision = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), precision:
        output = model.base_model(input_ids=mask, attention_mask=mask, use_cache=False)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    del output
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("autocast", [False, True])
def test_activations_are_what_autograd_keeps(family, autocast, home):
    model = make_model(family).train()
    model.config.save_pretrained(home / "model")
    models = ModelOptions(model=str(home / "model"), attn_implementation=model.config._attn_implementation)
    args = TDPOConfig(output_dir="out", bf16=autocast, **{**SETTINGS, "report_to": []})
    activations = Training.of(models, args, Device("cpu", None)).activations
    for length in (24, 64):
        estimated = activations.copies + activations.forward(1, length, checkpointed=False)
        assert estimated == pytest.approx(saved_bytes(model, length, autocast), rel=0.05)


def test_the_reference_has_the_bytes_of_its_form(home, tmp_path, capsys):
    whole = counted(capsys)
    assert whole["reference"] == whole["weights"]
    assert counted(capsys, "--lora_r", "4")["reference"] == 0
    head = make_model("llama").get_output_embeddings().weight.nbytes
    assert counted(capsys, "--precompute_reference")["reference"] == head
    other = make_model("llama")
    other.config.num_hidden_layers += 1
    other.config.save_pretrained(tmp_path / "other")
    larger = counted(capsys, "--ref_model", str(tmp_path / "other"))["reference"]
    built = AutoModelForCausalLM.from_config(other.config)
    assert larger == sum(p.numel() for p in built.parameters()) * 4


def test_a_loss_without_a_reference_has_none(home, capsys):
    found, dpo = counted(capsys, "--variant", "simpo"), counted(capsys, "--variant", "dpo")
    assert found["reference"] == 0 < dpo["reference"]
    assert found["loss"]["tdpo"] < dpo["loss"]["tdpo"]
    assert counted(capsys, "--variant", "simpo", "--ref_model", str(home / "model"))["reference"] == dpo["reference"]


def test_adapters_of_a_folder_are_trained_further(home, capsys):
    base = make_model("llama")
    base.save_pretrained(home / "model")
    adapted = with_trained_adapters(AutoModelForCausalLM.from_pretrained(home / "model"))
    adapted.save_pretrained(home / "adapters")
    (home / "adapters" / "adapter_model.safetensors").unlink()  # weights are not read
    found = counted(capsys, "--model", str(home / "adapters"))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert found["trained"] == trained > 0
    assert found["reference"] == found["gradients"] == 4 * trained


def test_four_bits_are_counted_without_the_package(home, capsys):
    whole, found = (counted(capsys, "--lora_r", "4", *more) for more in ([], ["--load_in_4bit"]))
    model = make_model("llama")
    linear = [m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    saved = sum(4 * size - (size / 2 + size / 64 * 4) for size in linear)
    assert found["weights"] == pytest.approx(whole["weights"] - saved, abs=4 * len(linear))


def test_no_weights_and_no_data_are_read(home, monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("weights or data are read")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.setattr(commands, "load_preferences", refuse)
    monkeypatch.setattr(commands, "load_tokenizer", refuse)
    before = sorted(home.rglob("*"))
    counted(capsys, "--dataset", "nowhere.jsonl", "--lora_r", "4")
    assert sorted(home.rglob("*")) == before


def test_an_adapted_head_is_a_frozen_one(home, capsys):
    """It stays fused: no logits, and no dW of the size of W."""
    found = counted(capsys, "--lora_r", "4", "--lora_target_modules", "q_proj", "lm_head")
    assert found["plan"] == counted(capsys, "--lora_r", "4")["plan"]


def test_flash_attention_is_counted_where_it_is_not_installed(home, capsys):
    flash, sdpa = (
        counted(capsys, "--attn_implementation", name)["activations"] for name in ("flash_attention_2", "sdpa")
    )
    assert flash == sdpa < counted(capsys, "--attn_implementation", "eager")["activations"]


def test_what_grows_with_what(home, capsys):
    plain = counted(capsys)
    longer = counted(capsys, "--max_length", "200", "--response_tokens", "80")
    more = counted(capsys, "--per_device_train_batch_size", "6")
    shared = counted(capsys, "--shared_prompts", "always")
    accumulated = counted(capsys, "--gradient_accumulation_steps", "2")
    checkpointed = counted(capsys, "--activation_checkpointing")
    assert more["activations"] == pytest.approx(2 * plain["activations"], abs=1)
    assert more["loss"]["published"] == 2 * plain["loss"]["published"]
    assert longer["activations"] > plain["activations"] > shared["activations"]
    assert shared["loss"] == plain["loss"]
    held = plain["weights"] + plain["optimizer"] + plain["reference"] + plain["copies"]
    at_the_loss = held + plain["activations"] + plain["loss"]["published"]
    assert plain["together"]["published"] == at_the_loss  # gradients come as activations go
    assert accumulated["together"]["published"] == at_the_loss + plain["gradients"]
    assert plain["activations"] > plain["activations_checkpointed"]
    assert plain["together"]["tdpo"] > checkpointed["together"]["tdpo"] > held + plain["gradients"]
    on_a_gpu = counted(capsys, "--gpu_memory", "80GB", "--activation_checkpointing")
    assert on_a_gpu["loss"] == plain["loss"]
    assert on_a_gpu["together"]["tdpo"] < checkpointed["together"]["tdpo"]  # where the temporaries stay to the end


def test_the_longest_responses_fit_and_longer_ones_do_not(home):
    models = ModelOptions(model=str(home / "model"))
    args = TDPOConfig(output_dir="out", **{**SETTINGS, "report_to": []})
    memory = 1 << 30
    training = Training.of(models, args, Device("cuda", memory))
    found = {way: training.longest(Batch(PAIRS, PROMPT, 1, False), memory, way) for way in ("tdpo", "published")}
    assert found["tdpo"] > found["published"] > 0
    for way, longest in found.items():
        assert training.together(Batch(PAIRS, PROMPT, longest, False))[way] <= memory
        assert training.together(Batch(PAIRS, PROMPT, longest + longest // 100 + 1, False))[way] > memory
    assert training.longest(Batch(PAIRS, PROMPT, 1, False), 1000, "tdpo") == 0


def test_the_table(home, capsys):
    assert main(["memory", "config.yaml", "--gpu_memory", "1GB"]) == 0
    shown = capsys.readouterr().out
    for part in ("weights  ", "optimizer states (adamw_torch_fused)", "reference: a copy of the policy", "(rough)"):
        assert part in shown
    assert "longest responses within 1 GB, tokens" in shown
    assert f"plan of the loss: chunked: all {2 * PAIRS * RESPONSE} rows fit the budget at once" in shown
    assert "shared_prompts is auto" in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_what_is_left_out_is_said(home, capsys, monkeypatch):
    notes = counted(capsys, "--optim", "adamw_8bit")
    assert notes["optimizer"] is None
    assert any("the states of" in note and "8bit" in note for note in notes["notes"])
    assert any("sharding" in note for note in counted(capsys, "--tp_plan", "auto")["notes"])

    def fails(*_, **__):
        raise RuntimeError("a value is needed")

    monkeypatch.setattr("tdpo.memory.activations._kept_bytes", fails)
    found = counted(capsys, "--gpu_memory", "1GB")
    assert found["activations"] is None
    assert found["longest"] is None
    assert any("activations" in note and "a value is needed" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu_memory", "80"], "gpu_memory is '80'; a size with its unit"),
        (["--gpu_memory", "0GB"], "gpu_memory is '0GB'"),
        (["--prompt_tokens", "0"], "prompt_tokens is 0; it must be at least 1"),
        (["--prompt_tokens", "7"], "prompt_tokens is 7, but max_prompt_length is 6"),
        (["--response_tokens", "21"], "response_tokens is 21, but max_length is 26"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--lora_alpha", "3"], "lora_alpha is 3, but lora_r is 0"),
        (["--prompt_tokns", "7"], "unknown flag --prompt_tokns; did you mean 'prompt_tokens'"),
    ],
)
def test_wrong_options_are_named(flags, message, home, capsys):
    assert main(["memory", "config.yaml", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_quantized_checkpoint_is_refused(home, capsys):
    path = home / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    assert main(["memory", "config.yaml"]) == 2
    assert "whose checkpoint is quantized" in capsys.readouterr().err


def test_a_reference_of_another_vocabulary_is_refused(home, tmp_path, capsys):
    config = make_model("llama").config
    config.vocab_size += 8
    config.save_pretrained(tmp_path / "other")
    assert main(["memory", "config.yaml", "--ref_model", str(tmp_path / "other")]) == 2
    assert "ref_model has a vocabulary of" in capsys.readouterr().err


def test_sizes_of_memory():
    assert bytes_of("gpu_memory", "80GB") == 80 * 10**9
    assert bytes_of("gpu_memory", "1.5 gib") == 3 << 29
    assert text_of(80 * 10**9) == "80 GB"
    assert text_of(2_345_678) == "2.35 MB"
    assert text_of(123_456_789) == "123 MB"
