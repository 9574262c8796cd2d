"""Commands on data that are read while they are used: --streaming."""

import json

import pytest
from tdpo.cli.main import main

from helpers.trainer_cases import write_home

EVALUATION = ["--eval_split", "train", "--eval_strategy", "steps", "--eval_steps", "2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    write_home(folder, eval_dataset=str(folder / "data.jsonl"), streaming=True)
    return folder


def test_train_resume_and_evaluate(home, tmp_path, capsys):
    config, out = str(home / "config.yaml"), tmp_path / "out"
    options = ["--output_dir", str(out), "--save_steps", "2", *EVALUATION]
    assert main(["train", config, *options]) == 0
    assert "train_dataset: a stream, tokenized while it is read" in capsys.readouterr().err
    assert json.loads((out / "run.json").read_text())["training data"] == "a stream"
    assert f"on `{home / 'data.jsonl'}` with tdpo_ext, for 4 steps" in (out / "README.md").read_text()
    assert main(["train", config, *options, "--max_steps", "6"]) == 0
    assert "at step 4 of 6" in capsys.readouterr().err
    assert main(["audit", config, "--output_dir", str(tmp_path / "audit")]) == 0
    assert "audit: 2 pairs against plain arithmetic" in capsys.readouterr().out
    models = ["--model", str(out), "--ref_model", str(home / "model"), "--eval_split", "train"]
    losses = []
    for streaming in ("true", "false"):
        command = ["evaluate", config, *models, "--output_dir", str(tmp_path / streaming), "--streaming", streaming]
        assert main(command) == 0
        losses.append(json.loads((tmp_path / streaming / "metrics.json").read_text())["eval_loss"])
    assert losses[0] == losses[1] < 0.69


@pytest.mark.parametrize("command", ["train", "audit"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_steps", "-1"], "max_steps is not set, but the training data are a stream, which has no end: set it"),
        (["--precompute_reference"], "precompute_reference is True, but the data are a stream"),
    ],
)
def test_what_streams_can_not_do_is_refused_before_models_are_read(command, options, message, home, tmp_path, capsys):
    arguments = ["--model", "no-such-model", "--output_dir", str(tmp_path), *options]
    assert main([command, str(home / "config.yaml"), *arguments]) == 2
    assert f"tdpo: {message}" in capsys.readouterr().err


def test_caching_a_stream_is_refused(home, tmp_path, capsys):
    assert main(["cache-reference", str(home / "config.yaml"), "--output_dir", str(tmp_path)]) == 2
    assert "tdpo: streaming is True, but a cache holds the hidden states of rows by number" in capsys.readouterr().err
