"""What a newcomer runs first: the commands of examples/tiny and the notebook, without a hub."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import run_notebook
from datasets import load_dataset

from helpers.device import USE_CPU
from helpers.snippets import snippets
from helpers.trainer_cases import run_python

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMANDS = re.findall(r"^#     (.+)$", (EXAMPLES / "tiny/config.yaml").read_text(), re.MULTILINE)

pytestmark = pytest.mark.skipif(not USE_CPU, reason="the example asks for the CPU")


@pytest.fixture
def examples(tmp_path):
    """A copy of the examples, beside which their outputs land."""
    return shutil.copytree(EXAMPLES, tmp_path / "examples")


def test_three_commands_train_evaluate_and_sample(examples):
    home = examples.parent
    (block,) = snippets((examples / "README.md").read_text())
    assert block.text.splitlines() == COMMANDS
    assert [command.split()[:2] for command in COMMANDS] == [
        ["python", "examples/tiny/make_model.py"],
        ["tdpo", "train"],
        ["tdpo", "evaluate"],
    ]
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        done = run_python(*(["-m", "tdpo"] if program == "tdpo" else []), *arguments, cwd=home)
        assert done.returncode == 0, done.stderr
    metrics = json.loads((home / "out/tiny/policy/metrics.json").read_text())
    assert metrics["eval_loss"] < 0.6
    assert metrics["eval_rewards/accuracies"] > 0.8
    samples = json.loads((home / "out/tiny/policy/samples/eval-step-0.json").read_text())
    chosen = load_dataset("json", data_files=str(examples / "tiny/pairs.jsonl"), split="train[24:28]")["chosen"]
    changed = [sample["policy"] != sample["reference"] for sample in samples]
    assert sum(changed) >= 2
    assert sum(sample["policy"] == text for sample, text in zip(samples, chosen)) >= 2


def test_the_notebook(examples):
    stored = json.loads((examples / "quickstart.ipynb").read_text())
    done = run_notebook.run(stored, examples)
    for before, after in zip(stored["cells"], done["cells"]):
        kinds = [[output["output_type"] for output in cell.get("outputs", [])] for cell in (before, after)]
        assert kinds[0] == kinds[1], "python tools/run_notebook.py examples/quickstart.ipynb"
        assert (before.get("execution_count") is None) == (before["cell_type"] == "markdown")
