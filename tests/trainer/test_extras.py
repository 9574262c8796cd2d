"""Where an extra is not installed, every command and every import says which."""

import re
from pathlib import Path

import pytest
from tdpo.extras import INCLUDES, PACKAGES

from helpers.trainer_cases import run_python

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
NAMES = {"yaml": "pyyaml", "sklearn": "scikit-learn"}  # of packages that are installed under another
TRAIN = "the trainer needs more packages: pip install 'tdpo_ext[train]'"
ENGINES = "DeepSpeed and 4-bit weights need more packages: pip install 'tdpo_ext[engines]'"
BLOCK = "import sys\nfor name in {}: sys.modules[name] = None\n"
MAIN = "from tdpo.cli.main import main\nsys.exit(main({}))"


def without(packages, code, cwd):
    return run_python("-c", BLOCK.format(packages) + code, cwd=cwd)


def extras_of_project():
    text = PROJECT.read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    lines = re.findall(r"^(\w+) = \[(.*)\]$", text, re.MULTILINE)
    return {name: re.findall(r'"([\w-]+)(?:\[([\w,]+)\])?', requirements) for name, requirements in lines}


@pytest.mark.parametrize("extra", PACKAGES)
def test_packages_are_those_of_the_project(extra):
    needed = extras_of_project()[extra]
    packages = {name for name, _ in needed} - {"tdpo_ext"}
    newer = {"transformers"} if extra == "gguf" else set()  # a newer one than train needs
    assert {NAMES.get(name, name) for name in PACKAGES[extra]} == packages - newer
    included = {name for _, names in needed for name in names.split(",") if name}
    assert set(INCLUDES[extra]) == included


@pytest.mark.parametrize("package", PACKAGES["train"])
@pytest.mark.parametrize("command", ["train", "audit", "evaluate", "cache-reference"])
def test_commands_without_the_trainers_packages(command, package, tmp_path):
    done = without([package], MAIN.format([command, "--model", "a/b", "--dataset", "a/b"]), tmp_path)
    assert (done.returncode, done.stderr) == (2, f"tdpo: {TRAIN}\n")


def test_help_and_version_need_no_extra(tmp_path):
    missing = [package for packages in PACKAGES.values() for package in packages]
    for arguments in (["train", "--help"], ["--help"], ["--version"]):
        done = without(missing, MAIN.format(arguments), tmp_path)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("package", "arguments", "said"),
    [
        ("peft", ["--lora_r", "2"], "adapters need more packages: pip install 'tdpo_ext[peft]'"),
        ("gguf", ["--gguf_file", "a.gguf"], "GGUF files need more packages: pip install 'tdpo_ext[gguf]'"),
        ("bitsandbytes", ["--load_in_4bit"], ENGINES),
        ("deepspeed", ["--deepspeed", "{}"], ENGINES),
    ],
)
def test_options_that_need_an_extra(package, arguments, said, tmp_path):
    done = without([package], MAIN.format(["train", "--model", "a/b", "--dataset", "a/b", *arguments]), tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"tdpo: {said}\n"


def test_the_demo_without_its_packages(tmp_path):
    for package in ("sklearn", "matplotlib", "peft", "transformers"):
        done = without([package], MAIN.format(["demo"]), tmp_path)
        said = "the demo needs more packages: pip install 'tdpo_ext[demo]'"
        assert (done.returncode, done.stderr) == (2, f"tdpo: {said}\n")


@pytest.mark.parametrize(
    ("package", "imported", "said"),
    [
        ("transformers", "from tdpo import TDPOTrainer", TRAIN),
        ("datasets", "from tdpo import load_preferences", TRAIN),
        ("accelerate", "import tdpo; tdpo.TDPOConfig", TRAIN),
        ("transformers", "from tdpo.data.tokenize import tokenize_preferences", TRAIN),
        ("transformers", "from tdpo.loss.objectives import OBJECTIVES", TRAIN),
        ("trl", "from tdpo.trl import TDPOTrainer", "tdpo.trl needs more packages: pip install 'tdpo_ext[trl]'"),
        ("peft", "import tdpo.trl", "tdpo.trl needs more packages: pip install 'tdpo_ext[trl]'"),
        ("matplotlib", "import tdpo; tdpo.plot_log([])", "pictures need more packages: pip install 'tdpo_ext[plot]'"),
        ("sklearn", "import tdpo.demo", "the demo needs more packages: pip install 'tdpo_ext[demo]'"),
    ],
)
def test_imports(package, imported, said, tmp_path):
    done = without([package], imported, tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"tdpo.extras.MissingExtra: {said}"


def test_other_missing_modules_are_not_taken_for_an_extra(tmp_path):
    done = without(["json"], MAIN.format(["train"]), tmp_path)
    assert "MissingExtra" not in done.stderr
    assert "ModuleNotFoundError" in done.stderr
