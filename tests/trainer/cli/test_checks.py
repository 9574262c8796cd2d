"""Wrong command lines are refused before torch, transformers or datasets are imported, and no hub is asked."""

import json

import pytest
from tdpo.cli.checks import REQUIRED, check_command, check_dataset
from tdpo.cli.main import _COMMANDS
from tdpo.cli.parse import read_options

from helpers.trainer_cases import run_python

# Runs command lines one after another in one process, and says after each what it has loaded.
RUN = """
import contextlib, io, json, sys
from tdpo.cli.main import main
for line in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            status = main(line)
        except SystemExit as ended:
            status = ended.code
    slow = sorted({"torch", "transformers", "datasets", "numpy"} & sys.modules.keys())
    print(json.dumps([status, said.getvalue(), slow]))
"""
TRAIN = ["train", "--model", "a/model", "--dataset", "data.jsonl"]
WRONG = [
    (["trian", "lora.yaml"], "unknown command 'trian'; did you mean 'train'?"),
    (["train", "--betta", "0.2"], "unknown flag --betta; did you mean 'beta'?"),
    (["train", "missing.yaml"], "the configuration file missing.yaml does not exist"),
    (["train", "key.yaml"], "key.yaml: unknown option 'bta'; did you mean 'beta'?"),
    (["train", "value.yaml"], "value.yaml: bf16 is maybe; true or false is needed"),
    (["train", "broken.yaml"], "the configuration file broken.yaml is not valid YAML: "),
    (["train", "list.yaml"], "the configuration file list.yaml holds no mapping of options to values"),
    (["train"], "model is missing; give --model or put it in the configuration file"),
    (["train", "--model", "a/model"], "dataset is missing; give --dataset"),
    (["evaluate", "--model", "a/model"], "ref_model is missing; give --ref_model"),
    ([*TRAIN, "--max_steps", "many"], "--max_steps is many; an integer is needed"),
    ([*TRAIN, "--variant", "tdpo3"], "--variant is 'tdpo3'; allowed are tdpo2, "),
    ([*TRAIN, "--optim", "adamw_trch"], "did you mean 'adamw_torch'?"),
    ([*TRAIN, "--beta", "0"], "beta is 0.0; it must be positive"),
    ([*TRAIN, "--alpha", "-1"], "alpha is -1.0; it must not be negative"),
    ([*TRAIN, "--variant", "dpo", "--alpha", "0.3"], "alpha is 0.3, but the loss dpo does not use it"),
    ([*TRAIN, "--max_length", "40"], "max_prompt_length is 512; it must be below max_length, 40"),
    ([*TRAIN, "--columns", "prompt"], "columns is 'prompt'; write prompt=question"),
    ([*TRAIN, "--use_liger_kernel"], "use_liger_kernel is True; leave it at False: Liger"),
    ([*TRAIN, "--lora_alpha", "8"], "lora_alpha is 8, but lora_r is 0, so that no adapters are added: set lora_r too"),
    ([*TRAIN, "--lora_target_modules", "q_proj"], "lora_target_modules is ['q_proj'], but lora_r is 0"),
    ([*TRAIN, "--streaming"], "max_steps is not set, but the training data are a stream"),
    (
        [*TRAIN, "--streaming", "--max_steps", "4", "--precompute_reference"],
        "precompute_reference is True, but the data are",
    ),
    (["cache-reference", *TRAIN[1:], "--streaming"], "streaming is True, but a cache holds the hidden states"),
    ([*TRAIN, "--output_dir", "data.jsonl"], "output_dir is data.jsonl, but "),
    ([*TRAIN, "--output_dir", "data.jsonl/out"], "output_dir is data.jsonl/out, but "),
    ([*TRAIN, "--eval_sample_tokens", "0"], "eval_sample_tokens is 0; it must be at least 1"),
    ([*TRAIN, "--dtype", "int8"], "--dtype is 'int8'; allowed are auto, "),
    ([*TRAIN, "--lora_r", "-1"], "lora_r is -1; it must be at least 0"),
    ([*TRAIN, "--lora_dropout", "1"], "lora_dropout is 1.0; it must be in [0, 1)"),
    ([*TRAIN, "--ref_gguf_file", "x.gguf"], "ref_gguf_file is x.gguf, but its folder, ref_model, is missing"),
    ([*TRAIN, "--gguf_file", "x.gguf", "--load_in_4bit"], "load_in_4bit is True, but gguf_file is x.gguf"),
    ([*TRAIN, "--deepspeed", "zero9.json"], "deepspeed is zero9.json; there is no such file"),
    ([*TRAIN, "--resume_from_checkpoint", "out/1"], "resume_from_checkpoint is out/1; there is no such folder"),
    ([*TRAIN, "--model", "plain", "--merge_adapters"], "merge_adapters is True, but there are no adapters to merge"),
    ([*TRAIN, "--model", "adapters", "--lora_r", "2", "--load_in_4bit"], "load_in_4bit is True, but model, adapters,"),
    ([*TRAIN, "--model", "plain", "--output_dir", "plain"], "output_dir is plain, the folder of model"),
    ([*TRAIN, "--model", "./x"], "the model ./x does not exist"),
    ([*TRAIN, "--model", "no/such/folder"], "the model no/such/folder does not exist"),
    ([*TRAIN, "--ref_model", "plain/x"], "the model plain/x does not exist"),
    ([*TRAIN, "--dataset", "none.jsonl"], "the dataset file none.jsonl does not exist"),
    ([*TRAIN, "--eval_dataset", "no/such/folder"], "the dataset no/such/folder does not exist"),
    ([*TRAIN, "--dataset", "none/*.jsonl"], "the dataset file none/*.jsonl does not exist"),
    ([*TRAIN, "--model", "plain", "--gguf_file", "x.gguf"], "gguf_file is x.gguf, which is not in plain; GGUF "),
    (
        [*TRAIN, "--ref_model", "plain", "--ref_gguf_file", "x.gguf"],
        "ref_gguf_file is x.gguf, which is not in plain; GGUF files there: none",
    ),
    ([*TRAIN, "--eval_strategy", "steps"], "eval_strategy is steps, but there are no data to evaluate on"),
    ([*TRAIN, "--eval_on_start"], "eval_on_start is True, but there are no data to evaluate on"),
    ([*TRAIN, "--eval_split", "dev"], "eval_split is dev, but eval_dataset is missing"),
    ([*TRAIN, "--eval_dataset", "data.jsonl", "--eval_samples", "2"], "eval_samples is set, but nothing is evaluated"),
    ([*TRAIN, "--hub_model_id", "me/it"], "hub_model_id is me/it, but push_to_hub is False: set push_to_hub "),
    ([*TRAIN, "--hub_strategy", "end"], "hub_strategy is end, but push_to_hub is False: set push_to_hub "),
    ([*TRAIN, "--reference_dtype", "float8"], "reference_dtype is float8, but precompute_reference is False: set "),
    ([*TRAIN, "--reference_cache", "c"], "reference_cache is c, but precompute_reference is False: set "),
    ([*TRAIN, "--metric_for_best_model", "acuracy"], "metric_for_best_model is acuracy; an evaluation has loss, "),
    ([*TRAIN, "--optim_args", "eps=1"], "optim_args is 'eps=1', but of such arguments optim adamw_torch_fused reads "),
    ([*TRAIN, "more"], "unrecognized arguments: more"),
    (["demo", "--step", "3"], "unknown flag --step; did you mean 'steps'?"),
    (["demo", "--steps", "few"], "--steps is few; an integer is needed"),
    (["demo", "--steps", "0"], "steps is 0; it must be positive"),
]


@pytest.fixture
def folder(tmp_path):
    for name, text in {
        "key.yaml": "bta: 0.2\n",
        "value.yaml": "bf16: maybe\n",
        "broken.yaml": "beta: [0.1\n",
        "list.yaml": "- beta\n",
        "data.jsonl": "{}\n",
        "adapters/adapter_config.json": "{}",
        "plain/config.json": "{}",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_wrong_command_lines_load_nothing(folder):
    done = run_python("-c", RUN, json.dumps([arguments for arguments, _ in WRONG]), cwd=folder)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    for (arguments, expected), (status, said, loaded) in zip(WRONG, results, strict=True):
        assert status == 2, (arguments, said)
        assert expected in said, arguments
        assert not loaded, arguments


def test_every_command_says_what_it_needs():
    assert set(REQUIRED) >= _COMMANDS.keys() - {"demo"}


@pytest.mark.parametrize(("command", "unread"), [("evaluate", "dataset"), ("audit", "eval_dataset")])
def test_files_that_a_command_does_not_read_may_be_missing(command, unread, folder, monkeypatch):
    """One file of options serves several commands, on machines that need not have all the data."""
    monkeypatch.chdir(folder)
    models = ["--model", "plain", "--ref_model", "plain"]
    for missing in ("dataset", "eval_dataset"):
        data = {"dataset": "data.jsonl", "eval_dataset": "data.jsonl", missing: "none.jsonl"}
        given = read_options(command, "", [*models, *(f"--{name}={file}" for name, file in data.items())])
        if missing == unread:
            check_command(command, given)
        else:
            with pytest.raises(ValueError, match=r"^the dataset file none.jsonl does not exist"):
                check_command(command, given)


@pytest.mark.parametrize("name", ["a_dataset", "owner/dataset", "owner/dataset.v2"])
def test_names_of_a_hub_are_no_missing_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_dataset(name)


def test_a_home_is_found_in_files_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.yaml").write_text("model: ~/m\ndataset: ~/d.jsonl\nreference_cache: ~/cache\n")
    given = read_options("train", "", [str(tmp_path / "config.yaml"), "--eval_dataset", "~/e.jsonl"])
    assert (given.models.model, given.data.dataset) == (str(tmp_path / "m"), str(tmp_path / "d.jsonl"))
    assert (given.data.eval_dataset, given.training["reference_cache"]) == (
        str(tmp_path / "e.jsonl"),
        str(tmp_path / "cache"),
    )
