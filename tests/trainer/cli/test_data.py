"""The command data, as a user types it."""

import io
import json
import re
import sys

import pytest
import yaml
from datasets import Dataset
from tdpo.cli import commands
from tdpo.cli.main import main
from tdpo.data.summary import Summary
from transformers import PreTrainedModel

from helpers.model_families import make_tokenizer
from helpers.trainer_cases import make_preferences, make_trainer

ROWS = [*make_preferences(5), {"prompt": "the film", "chosen": " great", "rejected": ""}]


def write_rows(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a tokenizer but no weights, data, and a configuration to train with on a GPU."""
    make_tokenizer().save_pretrained(tmp_path / "model")
    config = {
        "model": str(tmp_path / "model"),
        "dataset": write_rows(tmp_path / "pairs.jsonl", ROWS),
        "output_dir": str(tmp_path / "out"),
        "max_length": 40,
        "max_prompt_length": 16,
        "bf16": True,
        "tf32": True,
        "gradient_checkpointing": True,
        "lora_r": 8,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def test_the_data_of_training_is_shown(home, capsys):
    assert main(["data", "config.yaml"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(
        f"train data: {home / 'pairs.jsonl'}, split train\n\n  rows           6\n  pairs          5\n"
    )
    assert "  dropped        1 with an empty 'rejected' response\n" in shown
    assert re.findall(r"^row (\d)", shown, re.MULTILINE) == ["0", "1", "2"]
    assert "  prompt   │ the · fi lm ·w as\n  chosen   │ · gr eat <|end|>\n  rejected │ ·b ad <|end|>\n" in shown
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines()[1:])) <= 100


def test_no_weights_are_read_and_nothing_is_written(home, monkeypatch):
    """The folder of the model has none, and no other model is loaded instead."""

    def refuse(*_, **__):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.setattr(PreTrainedModel, "__init__", refuse)
    before = sorted(home.rglob("*"))
    assert not [path for path in before if path.suffix in (".safetensors", ".bin")]
    assert main(["data", "config.yaml"]) == 0
    assert sorted(home.rglob("*")) == before


def test_the_lengths_are_those_that_the_trainer_gets(home, capsys, monkeypatch):
    summaries = []
    monkeypatch.setattr(Summary, "histogram", lambda summary, limit: summaries.append(summary) or str(limit))
    assert main(["data", "config.yaml", "--max_length", "8", "--max_prompt_length", "6"]) == 0
    assert "(max_prompt_length 6)" in capsys.readouterr().out
    limits = {"max_length": 8, "max_prompt_length": 6}
    trained = make_trainer(home / "out", train_dataset=Dataset.from_list(ROWS), **limits).train_dataset
    for name, lengths in {"prompt": summaries[0].prompts, "rejected": summaries[0].rejected}.items():
        assert lengths.tolist() == list(map(len, trained[f"{name}_ids"]))


def test_evaluation_data_is_shown_too(home, capsys):
    held_out = write_rows(home / "held-out.jsonl", make_preferences(4))
    options = ["--eval_dataset", held_out, "--eval_split", "test[:2]", "--show_rows", "1", "--show_tokens", "2"]
    assert main(["data", "config.yaml", *options]) == 0
    shown = capsys.readouterr().out
    train, evaluation = shown.split(f"eval data: {held_out}, split test[:2]\n")
    assert "  rows           6\n" in train
    assert "  rows           2\n" in evaluation
    for part in (train, evaluation):
        assert part.count("\nrow ") == 1
        assert "  prompt   │ the\n           │ … 4 tokens left out …\n  prompt   │ as\n" in part
    assert shown.count("Tokens stand apart") == 1


def test_rows_need_not_be_shown(home, capsys):
    assert main(["data", "config.yaml", "--show_rows", "0"]) == 0
    shown = capsys.readouterr().out
    assert "max_length" in shown
    assert "token by token" not in shown
    assert "Tokens stand apart" not in shown


@pytest.mark.parametrize(
    ("terminal", "no_color", "coloured"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_colours_are_for_terminals(terminal, no_color, coloured, home, capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert main(["data", "config.yaml"]) == 0
    assert ("\x1b[" in capsys.readouterr().out) == coloured


def test_numbers_per_token_are_read_as_in_training(home, capsys):
    row = {"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [8], "chosen_weight": [1.0, 0.5]}
    weights = ["--variant", "tis_dpo", "--dataset"]
    assert (
        main(["data", "config.yaml", *weights, write_rows(home / "whole.jsonl", [{**row, "rejected_weight": [1.0]}])])
        == 0
    )
    assert "  pairs          1\n" in capsys.readouterr().out
    assert main(["data", "config.yaml", *weights, write_rows(home / "half.jsonl", [row])]) == 2
    assert "the dataset lacks rejected_weight" in capsys.readouterr().err


def test_output_in_an_encoding_that_lacks_the_marks(home, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert main(["data", "config.yaml"]) == 0
    assert b"  rejected \\u2502 \\xb7b ad <|end|>\n" in written.getvalue()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dataset", "none.jsonl"], "the dataset file none.jsonl does not exist"),
        (["--split", "train[3:2"], "no split 'train[3:2'"),
        (["--model", "./none"], "the model ./none does not exist"),
        (["--show_rows", "-1"], "show_rows is -1; it must be at least 0"),
        (["--show_tokens", "1"], "show_tokens is 1; it must be at least 2"),
        (["--split", "train[5:]"], "no row of the dataset is left: of 1 rows, 1 with an empty 'rejected' response"),
        (["--max_length", "3"], "max_prompt_length is 16; it must be below max_length, 3"),
    ],
)
def test_bad_data_and_options_are_named(options, said, home, capsys):
    assert main(["data", "config.yaml", *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    errors = [line for line in shown.err.splitlines() if line.startswith("tdpo: ")]
    assert len(errors) == 1
    assert said in errors[0]


def test_other_commands_take_no_options_of_showing(home, capsys):
    assert main(["train", "config.yaml", "--show_rows", "1"]) == 2
    assert "unknown flag --show_rows" in capsys.readouterr().err


def test_the_beginning_of_a_stream_is_shown(home, capsys, monkeypatch):
    monkeypatch.setattr("tdpo.cli.commands._OF_A_STREAM", 4)
    assert main(["data", "config.yaml", "--streaming", "--max_steps", "3"]) == 0
    shown = capsys.readouterr().out
    assert f"train data: {home / 'pairs.jsonl'}, split train, its first 4 rows\n\n  rows           4\n" in shown


@pytest.mark.parametrize(
    ("command", "flags", "said"),
    [
        ("train", ["--token_columns", "weight"], "the loss reads chosen_weight, rejected_weight, numbers per token"),
        ("audit", ["--variant", "tis_dpo"], "the loss reads chosen_weight, rejected_weight, numbers per token"),
        ("train", ["--columns", "chosen=best"], "best"),
    ],
)
def test_what_rows_lack_is_said_before_models_are_loaded(command, flags, said, home, monkeypatch, capsys):
    def load(_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(commands, "load_policy", load)
    assert main([command, "config.yaml", "--use_cpu", "--no_tf32", *flags]) == 2
    assert said in capsys.readouterr().err
