"""What `tdpo COMMAND --help` and `--help-all` print."""

from dataclasses import fields

import pytest
from tdpo.cli.main import main
from tdpo.config import TDPOConfig
from tdpo.options import CommonOptions, DataOptions, ModelOptions, RareOptions, TDPOOptions

from helpers.trainer_cases import run_python

HELP = "import sys; from tdpo.cli.main import main\ntry: main({})\nfinally: sys.stderr.write(' '.join(sys.modules))"


@pytest.mark.parametrize("command", ["train", "data", "memory", "audit", "evaluate", "cache-reference"])
def test_help_is_quick_and_names_each_option_once(command, tmp_path):
    done = run_python("-c", HELP.format([command, "--help"]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "datasets"} & set(done.stderr.split())  # which take seconds to load
    flags = [word for word in done.stdout.split() if word.startswith("--")]
    for option in ("beta", "padding_free", "reference_cache", "learning_rate", "lora_r", "output_dir", "dataset"):
        assert flags.count(f"--{option}") == 1
    positions = [done.stdout.index(title) for title in ("\nModels:", "\nData:", "\nTDPO and the run:", "\nOften set")]
    assert positions == sorted(positions)
    assert "--adam_beta2" not in flags
    assert ("--show_rows" in flags) == (command == "data")  # no other command has a use for it
    assert ("--gpu_memory" in flags) == (command == "memory")


def test_the_commands_are_listed(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out.split("commands:\n")[1].split("\n\n")[0].splitlines()
    names = ["train", "data", "memory", "audit", "evaluate", "cache-reference", "demo"]
    assert [line.split()[0] for line in listed] == names


def test_help_all_lists_every_option_once(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help-all"])
    assert stopped.value.code == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    names = {
        field.name for options in (TDPOConfig, ModelOptions, DataOptions) for field in fields(options) if field.init
    }
    assert sorted(listed) == sorted(f"--{name}" for name in names)


def test_help_tells_the_true_defaults():
    defaults = {field.name: field.default for field in fields(TDPOConfig)}
    common = [*fields(CommonOptions), *fields(RareOptions)]
    assert not {field.name for field in common} & {field.name for field in fields(TDPOOptions)}
    for field in common:
        default = getattr(defaults[field.name], "value", defaults[field.name])
        assert (field.default or None) == (default or None), field.name  # some switches that are off are None
