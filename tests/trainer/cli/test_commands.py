"""The commands train, evaluate and cache-reference, as a user types them."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from peft import PeftModel
from tdpo.cli import commands
from tdpo.cli.main import main
from tdpo.cli.parse import read_options
from tdpo.data.tokenize import tokenize_rows
from tdpo.models.loading import lora_config
from tdpo.options import ModelOptions
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.damage import flip_bit
from helpers.model_families import make_model, make_tokenizer
from helpers.trainer_cases import make_preferences, write_home

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    write_home(folder, eval_dataset=str(folder / "data.jsonl"))
    return folder


def test_train_then_evaluate(home, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--output_dir", str(out), "--beta", "0.2", "--save_steps", "2"]
    assert main(["train", str(home / "config.yaml"), *options]) == 0
    card = (out / "README.md").read_text()
    assert "variant: tdpo2\nbeta: 0.2\n" in card
    assert f"on `{home / 'data.jsonl'}` (24 pairs)" in card
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    second = (out / "checkpoint-2" / "model.safetensors").stat().st_mtime_ns
    assert main(["train", str(home / "config.yaml"), *options, "--max_steps", "6"]) == 0  # resumes
    state = json.loads((out / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert (out / "checkpoint-2" / "model.safetensors").stat().st_mtime_ns == second  # not trained anew

    evaluation = ["--model", str(out), "--ref_model", str(home / "model"), "--output_dir", str(tmp_path / "evaluation")]
    assert main(["evaluate", str(home / "config.yaml"), *evaluation]) == 0
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert metrics["eval_rewards/accuracies"] > 0.5
    assert metrics["eval_kl/chosen"] > 0


def test_cache_then_train(home, tmp_path):
    options = [str(home / "config.yaml"), "--output_dir", str(tmp_path), "--reference_cache", str(tmp_path / "cache")]
    assert main(["cache-reference", *options]) == 0
    header = json.loads((tmp_path / "cache" / "train" / "header.json").read_text())
    assert header["rows"] == 24
    written = (tmp_path / "cache" / "train" / "00000.safetensors").stat().st_mtime_ns
    assert main(["train", *options, "--precompute_reference", "--eval_strategy", "steps", "--eval_steps", "2"]) == 0
    assert (tmp_path / "cache" / "train" / "00000.safetensors").stat().st_mtime_ns == written


def test_processes_tokenize_for_a_cache_too(home, tmp_path, monkeypatch):
    asked = []

    def record(dataset, tokenizer, options, token_columns):
        asked.append(options.dataset_num_proc)
        alone = copy.copy(options)
        alone.dataset_num_proc = None
        return tokenize_rows(dataset, tokenizer, alone, token_columns)

    monkeypatch.setattr("tdpo.tokenization.tokenize_rows", record)
    options = [str(home / "config.yaml"), "--output_dir", str(tmp_path), "--eval_split", "train"]
    assert main(["cache-reference", *options, "--dataset_num_proc", "3"]) == 0
    assert asked == [3, 3]


@pytest.mark.parametrize("bf16", [True, False])
def test_a_cache_is_computed_in_what_training_runs_in(bf16, home, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(commands, "cache_reference", lambda *_, **__: found.append(torch.is_autocast_enabled("cpu")))
    options = [str(home / "config.yaml"), "--output_dir", str(tmp_path), "--bf16", str(bf16)]
    assert main(["cache-reference", *options, "--eval_split", "train"]) == 0
    assert found == [bf16, bf16]


@pytest.mark.parametrize("precision", ["float32", "float8"])
def test_a_cache_has_the_precision_that_was_asked_for(precision, home, tmp_path, capsys):
    """Training reads it as it is; in another precision it is another cache."""
    cache = tmp_path / "cache"
    options = [str(home / "config.yaml"), "--reference_cache", str(cache), "--eval_split", "train"]
    asked = ["--reference_dtype", precision]
    assert main(["cache-reference", *options, "--output_dir", str(tmp_path / "one"), *asked]) == 0
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    assert {path.parent.name for path in written} == {"train", "eval"}
    train = ["train", *options, "--precompute_reference"]
    assert main([*train, "--output_dir", str(tmp_path / "two")]) == 2
    assert "dtype" in capsys.readouterr().err
    assert main([*train, *asked, "--output_dir", str(tmp_path / "three")]) == 0
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == written


def test_evaluation_splits(home, tmp_path, capsys):
    DatasetDict({"held_out": make_preferences(3)}).save_to_disk(str(tmp_path / "data"))
    models = ["--model", str(home / "model"), "--ref_model", str(home / "model"), "--output_dir", str(tmp_path)]
    data = ["--eval_dataset", str(tmp_path / "data")]
    assert main(["evaluate", str(home / "config.yaml"), *models, *data, "--eval_split", "held_out"]) == 0
    assert main(["evaluate", str(home / "config.yaml"), *models, *data]) == 2
    assert "no split 'test'; it has held_out" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "cache-reference"])
def test_the_split_of_evaluation_data(command, home, tmp_path, capsys):
    DatasetDict({"held_out": make_preferences(3)}).save_to_disk(str(tmp_path / "data"))
    options = [str(home / "config.yaml"), "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    options += ["--eval_dataset", str(tmp_path / "data")]
    assert main([command, *options]) == 2
    assert "no split 'test'; it has held_out" in capsys.readouterr().err
    assert main([command, *options, "--eval_split", "held_out"]) == 0


def test_the_reference_and_the_limits_are_those_of_training(home, tmp_path):
    make_model("llama", seed=5).save_pretrained(tmp_path / "other")
    rows = [*make_preferences(), {"prompt": "the film", "chosen": " great" * 60, "rejected": " bad"}]
    Dataset.from_list(rows).to_json(str(tmp_path / "data.jsonl"))
    options = [str(home / "config.yaml"), "--output_dir", str(tmp_path), "--dataset", str(tmp_path / "data.jsonl")]
    options += ["--ref_model", str(tmp_path / "other"), "--overlong", "drop", "--max_steps", "1"]
    assert main(["cache-reference", *options]) == 0
    header = json.loads((tmp_path / "reference-cache" / "train" / "header.json").read_text())
    assert header["rows"] == 16  # of 25; eight prompts and a response are too long
    assert main(["train", *options, "--precompute_reference"]) == 0  # would refuse the cache of another


def test_options_of_adapters():
    models = ModelOptions(lora_r=4, lora_alpha=7, lora_dropout=0.25, lora_target_modules=["q_proj"])
    adapters = lora_config(models)
    assert (adapters.r, adapters.lora_alpha, adapters.lora_dropout) == (4, 7, 0.25)
    assert adapters.target_modules == {"q_proj"}
    assert lora_config(ModelOptions(lora_r=4)).target_modules == "all-linear"
    for names, taken in ((["all-linear"], "all-linear"), ([".*q_proj"], ".*q_proj"), (["q_proj"], {"q_proj"})):
        assert lora_config(ModelOptions(lora_r=4, lora_target_modules=names)).target_modules == taken
    assert lora_config(ModelOptions()) is None


def test_null_leaves_the_default(tmp_path):
    config = {"logits_budget": None, "reference_cache": None, "beta": None, "output_dir": str(tmp_path), "alpha": 0.0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "use_cpu": True}))
    args = read_options("train", "", [str(tmp_path / "config.yaml")]).options().training
    assert (args.logits_budget, args.reference_cache, args.beta, args.alpha) == (None, None, 0.1, 0.0)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("bad input"), 2),
        (RuntimeError("it failed"), 1),
        (FloatingPointError("the loss is nan"), 1),
        (OSError(28, "No space left on device", "/disk"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_status(error, status, monkeypatch, capsys):
    def fails(arguments):
        raise error

    monkeypatch.setattr(commands, "train", fails)
    assert main(["train", "--model", "a/model", "--dataset", "a/dataset"]) == status
    shown = capsys.readouterr().err
    assert ("Interrupted" if status == 130 else f"tdpo: {error}") in shown
    assert "Traceback" not in shown


DAMAGE = {
    "config.yaml": (b"beta: [0.1\nalpha: {", "config.yaml is not valid YAML"),
    "data.jsonl": (b'{"chosen": "a", "rejected"', "data.jsonl' (split 'train') could not be loaded"),
    "model/model.safetensors": (b"\x10\0\0\0\0\0\0\0{", "model/model.safetensors could not be loaded"),
    "model/config.json": (b"{", "model/config.json could not be loaded"),
    "model/tokenizer.json": (b'{"version": ', "model/tokenizer.json could not be loaded"),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("empty", [False, True])
def test_damaged_input_is_named_in_a_sentence(name, empty, home, tmp_path, capsys):
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    content, message = DAMAGE[name]
    (tmp_path / name).write_bytes(b"" if empty else content)
    paths = ["--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "data.jsonl")]
    arguments = [str(tmp_path / "config.yaml"), *paths, "--output_dir", str(tmp_path / "out")]
    if (name, empty) == ("config.yaml", True):  # an empty file has no options, which is no error
        assert read_options("train", "", [*arguments, "--use_cpu"]).options().models.model == str(tmp_path / "model")
        return
    assert main(["train", *arguments]) == 2
    shown = capsys.readouterr().err
    said = [line for line in shown.splitlines() if line.startswith("tdpo: ")]
    assert len(said) == 1
    assert name in said[0] if empty else message in said[0]
    assert "Traceback" not in shown


def test_damaged_checkpoints_are_no_models(home, tmp_path, capsys):
    options = [str(home / "config.yaml"), "--output_dir", str(tmp_path), "--save_steps", "2"]
    assert main(["train", *options]) == 0
    flip_bit(tmp_path / "checkpoint-4" / "model.safetensors", 100_000)
    models = ["--model", str(tmp_path / "checkpoint-4"), "--ref_model", str(home / "model")]
    assert main(["evaluate", str(home / "config.yaml"), *models]) == 2
    assert "checkpoint-4/model.safetensors is damaged" in capsys.readouterr().err
    assert main(["train", *options, "--max_steps", "5"]) == 0  # from checkpoint-2
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 5


def test_adapters_and_merging(home, tmp_path):
    options = [str(home / "config.yaml"), "--output_dir", str(tmp_path), "--lora_r", "4", "--merge_adapters"]
    assert main(["train", *options, "--max_steps", "2"]) == 0
    assert (tmp_path / "adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "model"), tmp_path)
    assert any(value.abs().max() > 0 for name, value in adapted.named_parameters() if "lora_B" in name)
    tokens = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(merged(input_ids=tokens).logits, adapted(input_ids=tokens).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == make_tokenizer().get_vocab()


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


YAML = """
output_dir: {out}
use_cpu: yes
beta: 1e-1
seed: 7
max_grad_norm: 2
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {{min_lr: 1.0e-6}}
lora_target_modules: q_proj
token_columns: [weight]
report_to: []
save_strategy: no
eval_strategy: off
logging_strategy: steps
disable_dropout: no
resume_from_checkpoint: true
accelerator_config:
  even_batches: false
"""


def test_values_of_a_file_keep_their_types(tmp_path):
    (tmp_path / "config.yaml").write_text(YAML.format(out=tmp_path))
    models, _, args = read_options("train", "", [str(tmp_path / "config.yaml"), "--seed", "8"]).options()
    assert (args.beta, args.seed, args.max_grad_norm) == (0.1, 8, 2.0)  # YAML takes 1e-1 for text
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert (models.lora_target_modules, args.token_columns, args.report_to) == (["q_proj"], ["weight"], [])
    assert (args.save_strategy, args.eval_strategy, args.logging_strategy) == ("no", "no", "steps")
    assert args.disable_dropout is False
    assert args.accelerator_config.even_batches is False


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("beta: [0.1]", "config.yaml: beta is [0.1], a list, which it does not take"),
        ("seed: {a: 1}", "config.yaml: seed is {'a': 1}, a mapping, which it does not take"),
        ("dataset: [a, b]", "config.yaml: dataset is ['a', 'b'], a list"),
        ("save_strategy: never", "config.yaml: save_strategy is 'never'; allowed are no, steps, epoch, best"),
        ("optim: true", "config.yaml: optim is 'true'; allowed are adamw_torch, "),
        ("variant: no", "config.yaml: variant is 'no'; allowed are tdpo2, "),
        ("seed: 1.5", "config.yaml: seed is 1.5; an integer is needed"),
        ("bf16: maybe", "config.yaml: bf16 is maybe; true or false is needed"),
        ("beta: true", "config.yaml: beta is true; a number is needed"),
        ("beta: -1", "config.yaml: beta is -1; it must be positive"),
        ("beta: 0.1\nbeta: 0.2", "config.yaml: beta is given twice"),
        ("log_level: loud", "config.yaml: log_level is 'loud'; allowed are detail, debug, "),
    ],
)
def test_values_of_a_file_that_do_not_fit_are_named(line, said, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(f"{line}\noutput_dir: {tmp_path}\nuse_cpu: true\n")
    with pytest.raises((SystemExit, ValueError)) as raised:
        read_options("train", "", [str(tmp_path / "config.yaml")]).options()
    assert said in f"{raised.value} {capsys.readouterr().err}"


def test_resuming_can_be_asked_for_and_refused(home, tmp_path, capsys):
    options = [str(home / "config.yaml"), "--output_dir", str(tmp_path), "--save_steps", "2"]
    assert main(["train", *options, "--resume_from_checkpoint", "true"]) == 2
    assert "holds no good checkpoint to resume from" in capsys.readouterr().err
    assert main(["train", *options, "--resume_from_checkpoint", "false"]) == 0
    assert main(["train", *options, "--resume_from_checkpoint", "true", "--max_steps", "6"]) == 0
    assert f"Resuming from {tmp_path / 'checkpoint-4'}, at step 4 of 6." in capsys.readouterr().err
    older = str(tmp_path / "checkpoint-4")  # although the run is finished
    assert main(["train", *options, "--resume_from_checkpoint", older, "--max_steps", "6"]) == 0
    assert f"Resuming from {older}, at step 4 of 6." in capsys.readouterr().err
    assert main(["train", *options, "--resume_from_checkpoint", "false"]) == 2
    assert "resume_from_checkpoint is false, but output_dir" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["full", "lora", "cached_reference", "fsdp2"])
def test_examples_parse(name, tmp_path):
    example = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    (tmp_path / "cpu.yaml").write_text(yaml.safe_dump({**example, "use_cpu": True, "bf16": False}))
    models, data, args = read_options("train", "", [str(tmp_path / "cpu.yaml"), "--beta", "0.3"]).options()
    assert args.beta == 0.3
    assert models.model == example["model"]
    assert data.dataset == example["dataset"]
    assert args.learning_rate == example["learning_rate"]


def test_a_run_called_again_changes_nothing(home, tmp_path, capsys):
    for saves in ("steps", "no"):
        out = tmp_path / saves
        command = ["train", str(home / "config.yaml"), "--output_dir", str(out), "--save_strategy", saves]
        assert main(command) == 0
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        capsys.readouterr()
        assert main(command) == 0
        assert capsys.readouterr().out == f"{out} holds a finished run of 4 steps: nothing was trained or changed\n"
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
        assert main([*command, "--beta", "0.7"]) == 2
        assert "beta was 0.1 and is 0.7" in capsys.readouterr().err
    assert main([*command, "--max_steps", "6"]) == 2
    assert "a run of 4 steps without checkpoints, so it can't be continued to 6" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_run_that_ended_before_its_model_was_saved(home, tmp_path):
    command = ["train", str(home / "config.yaml"), "--output_dir", str(tmp_path)]
    assert main(command) == 0
    weights = (tmp_path / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "trainer_state.json"):
        (tmp_path / name).unlink()
    assert main(command) == 0
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def test_evaluation_prints_json_alone(home, tmp_path, capsys):
    models = ["--model", str(home / "model"), "--ref_model", str(home / "model"), "--output_dir", str(tmp_path)]
    assert main(["evaluate", str(home / "config.yaml"), *models, "--eval_samples", "1"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert "eval at step 0: loss 0.6931" in shown.err


def test_logs_are_readable(home, tmp_path, capsys):
    options = ["--output_dir", str(tmp_path), "--max_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2"]
    assert main(["train", str(home / "config.yaml"), *options]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"saved {tmp_path}\n"
    lines = [line for line in re.split(r"\r|\n|\x1b\[A", shown.err) if "loss 0" in line]
    starts = ["step 1/2: loss 0.6931, accuracy ", "step 2/2: loss 0", "eval at step 2: loss 0", "trained 2 steps in "]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts
    assert "{" not in "".join(lines)


def test_merging_needs_adapters(home, tmp_path, capsys):
    assert main(["train", str(home / "config.yaml"), "--output_dir", str(tmp_path), "--merge_adapters"]) == 2
    assert "merge_adapters is True, but there are no adapters" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # before training


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./none", "the model ./none does not exist"),
        ("no/such", "the model no/such could not be loaded: there is no such"),
    ],
)
@pytest.mark.parametrize("option", ["--model", "--ref_model"])
def test_models_that_do_not_exist(option, name, said, home, tmp_path, capsys):
    assert main(["train", str(home / "config.yaml"), "--output_dir", str(tmp_path), option, name]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"tdpo: {said}")
