"""How the commands end: what is missing or unknown is named, and a signal has the shell's exit status."""

from pathlib import Path

import pytest
import yaml
from tdpo.cli import commands
from tdpo.cli.main import main
from tdpo.cli.parse import read_options
from tdpo.runs.stopping import Terminated

import tdpo_ext

NEEDED = {
    "train": ["model", "dataset"],
    "data": ["model", "dataset"],
    "evaluate": ["model", "ref_model", "eval_dataset"],
    "cache-reference": ["model", "dataset"],
}


@pytest.mark.parametrize(("command", "missing"), [(name, option) for name in NEEDED for option in NEEDED[name]])
def test_what_is_missing_is_named(command, missing, tmp_path, capsys):
    given = {name: str(tmp_path / "none.jsonl") for name in NEEDED[command] if name != missing}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**given, "use_cpu": True, "output_dir": str(tmp_path)}))
    assert main([command, str(tmp_path / "config.yaml")]) == 2
    assert f"tdpo: {missing} is missing" in capsys.readouterr().err


def test_sigterm_has_the_shells_exit_status(monkeypatch, capsys):
    def terminated(options):
        raise Terminated

    monkeypatch.setattr(commands, "train", terminated)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--model", "a/model", "--dataset", "a/dataset"])
    assert ended.value.code == 143
    assert "Terminated; run the same command again to resume." in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["columns.yaml"],
        ["--columns", "prompt=question,chosen="],
        ["--columns", '{"prompt": "question", "chosen": null}'],
    ],
)
def test_columns_under_other_names(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("columns.yaml").write_text("columns: {prompt: question, chosen: null}\n")
    assert read_options("train", "", arguments).options().training.columns == {"prompt": "question", "chosen": None}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian", "lora.yaml"], "tdpo: unknown command 'trian'; did you mean 'train'?"),
        (["serve"], "tdpo: unknown command 'serve'; there are train, "),
        ([], "tdpo: a command is needed: train, "),
    ],
)
def test_unknown_commands(arguments, said, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(said)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tdpo {tdpo_ext.__version__}\n"
