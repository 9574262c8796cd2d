"""The commands train, evaluate and cache-reference, as a user types them."""

import json
from pathlib import Path

import pytest
import yaml
from model_families import make_model, make_tokenizer
from tdpo.cli import main
from tdpo.options import parse_options
from trainer_cases import make_preferences

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    make_model("llama").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    make_preferences().to_json(str(folder / "data.jsonl"))
    config = {
        "model": str(folder / "model"),
        "dataset": str(folder / "data.jsonl"),
        "eval_dataset": str(folder / "data.jsonl"),
        "max_length": 40,
        "max_prompt_length": 16,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "learning_rate": 1e-3,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_train_then_evaluate(home, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--output_dir", str(out), "--beta", "0.2", "--save_steps", "2"]
    assert main(["train", str(home / "config.yaml"), *options]) == 0
    assert "TDPO2, beta 0.2" in (out / "README.md").read_text()
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    assert main(["train", str(home / "config.yaml"), *options, "--max_steps", "6"]) == 0  # resumes
    state = json.loads((out / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4, 5, 6]

    evaluation = ["--model", str(out), "--ref_model", str(home / "model"), "--output_dir", str(tmp_path / "evaluation")]
    assert main(["evaluate", str(home / "config.yaml"), *evaluation]) == 0
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert metrics["eval_rewards/accuracies"] > 0.5
    assert metrics["eval_kl/chosen"] > 0


def test_cache_then_train(home, tmp_path):
    options = [str(home / "config.yaml"), "--output_dir", str(tmp_path), "--reference_cache", str(tmp_path / "cache")]
    assert main(["cache-reference", *options]) == 0
    header = json.loads((tmp_path / "cache" / "train" / "header.json").read_text())
    assert header["done"] == header["rows"] == 24
    written = (tmp_path / "cache" / "train" / "hidden.bin").stat().st_mtime_ns
    assert main(["train", *options, "--precompute_reference", "--eval_strategy", "steps", "--eval_steps", "2"]) == 0
    assert (tmp_path / "cache" / "train" / "hidden.bin").stat().st_mtime_ns == written


def test_adapters_and_merging(home, tmp_path):
    options = [str(home / "config.yaml"), "--output_dir", str(tmp_path), "--lora_r", "4", "--merge_adapters"]
    assert main(["train", *options, "--max_steps", "2"]) == 0
    assert (tmp_path / "adapter_config.json").exists()
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bta", "3"], "did you mean 'beta'"),
        (["nowhere.yaml"], "nowhere.yaml does not exist"),
        ([], "model is missing"),
        (["--model", "m", "--beta", "0"], "beta is 0"),
        (["--model", "m", "--dataset", "none.jsonl"], "none.jsonl does not exist"),
    ],
)
def test_bad_options(arguments, message, capsys):
    assert main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_unknown_keys_of_a_file(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("alhpa: 0.3\n")
    assert main(["train", str(tmp_path / "config.yaml")]) == 2
    assert "did you mean 'alpha'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["full", "lora", "cached_reference", "fsdp2"])
def test_examples_parse(name, tmp_path):
    example = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    (tmp_path / "cpu.yaml").write_text(yaml.safe_dump({**example, "use_cpu": True, "bf16": False}))
    models, data, args = parse_options("train", "", [str(tmp_path / "cpu.yaml"), "--beta", "0.3"])
    assert args.beta == 0.3
    assert models.model == example["model"]
    assert data.dataset == example["dataset"]
    assert args.learning_rate == example["learning_rate"]


def test_help_documents_the_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--beta", "--padding_free", "--reference_cache", "--learning_rate", "--lora_r"):
        assert option in shown
