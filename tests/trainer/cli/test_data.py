"""The command data, as a user types it."""

import json
import re
import sys

import pytest
import yaml
from tdpo.cli.main import main
from tdpo.data.summary import Summary
from tdpo.trainer import TDPOTrainer

from helpers.model_families import make_tokenizer
from helpers.trainer_cases import make_preferences, run_python

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
    assert "  prompt   │ the ·film ·was\n" in shown
    assert "  chosen   │ ·great <|end|>\n" in shown
    assert "  rejected │ ·bad <|end|>\n" in shown
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_no_weights_are_read_and_nothing_is_written(home):
    """The folder of the model has no weights; none are loaded from anywhere."""
    before = sorted(home.rglob("*"))
    assert not [path for path in before if path.suffix in (".safetensors", ".bin")]
    code = (
        "import transformers, sys\n"
        "def refuse(*_, **__): raise AssertionError('weights are read')\n"
        "transformers.PreTrainedModel.from_pretrained = refuse\n"
        "from tdpo.cli.main import main\n"
        "sys.exit(main(['data', 'config.yaml']))"
    )
    done = run_python("-c", code, cwd=home)
    assert done.returncode == 0, done.stderr
    assert sorted(home.rglob("*")) == before


def test_the_tokens_are_those_that_the_trainer_gets(home, capsys, monkeypatch):
    summaries = []
    lengths = Summary.histogram
    monkeypatch.setattr(
        Summary, "histogram", lambda summary, *limit: summaries.append(summary) or lengths(summary, *limit)
    )
    assert main(["data", "config.yaml", "--max_length", "20", "--learned_turns", "all"]) == 0
    assert capsys.readouterr().out.count("max_length 20)") == 1
    (summary,) = summaries
    from datasets import Dataset
    from tdpo import TDPOConfig

    from helpers.model_families import make_model

    args = TDPOConfig(str(home / "out"), use_cpu=True, max_length=20, max_prompt_length=16, report_to=[])
    trainer = TDPOTrainer(
        make_model("llama"), args=args, train_dataset=Dataset.from_list(ROWS), processing_class=make_tokenizer()
    )
    assert list(map(len, trainer.train_dataset["prompt_ids"])) == summary.prompts.tolist()
    assert list(map(len, trainer.train_dataset["rejected_ids"])) == summary.rejected.tolist()


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
        assert "  prompt   │ the\n           │ … 1 token left out …\n  prompt   │ ·was\n" in part
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


def test_output_in_an_encoding_that_lacks_the_marks(home):
    done = run_python("-m", "tdpo", "data", "config.yaml", cwd=home, environment={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "  chosen   \\u2502 \\xb7great <|end|>\n" in done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dataset", "none.jsonl"], "the dataset file none.jsonl does not exist"),
        (["--split", "train[3:2"], "no split 'train[3:2'"),
        (["--model", "./none"], "the tokenizer ./none does not exist"),
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
