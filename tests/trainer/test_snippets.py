"""Every snippet of README and docs, run as it stands, in a folder where the models and data that it names are tiny.

What can't run here is named in NOT_RUN with the reason; its options are parsed, and its files must exist.
"""

import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tdpo import TDPOConfig, tokenize_preferences
from tdpo.cli.main import main
from tdpo.cli.parse import read_options
from torch.distributed.run import get_args_parser
from transformers import training_args

from helpers.device import USE_CPU
from helpers.model_families import make_model, make_tokenizer
from helpers.snippets import snippets
from helpers.trainer_cases import make_preferences

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md", *ROOT.glob("docs/*.md")]
    if snippets(path.read_text())
)
NOT_RUN = {  # by what a command holds
    "--load_in_4bit": "needs bitsandbytes: `make engines` runs it",
    "--gguf_file": "needs a GGUF file: models/test_gguf.py runs it",
    "accelerate": "several processes: `make engines` and test_trainer_distributed.py run them",
    "torchrun": "several processes or machines",
    "srun": "a cluster",
    "sdist": "builds a release", "wheel": "builds a release", "test-torches": "builds a release",
    "make": "installs and builds for minutes", "pip": "installs", "bash": "measures on a GPU",
    "pre-commit": "changes the checkout", "cmake": "builds", "ctest": "tests what cmake builds",
    ".": "activates an environment", "python": "run by other tests, or prints what is installed",
}  # fmt: skip
OF_OTHER_TESTS = {"docs/data.md": "data/test_data_page.py", "examples/README.md": "test_first_steps.py"}
MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "sft", "base")
DATA = ("pairs.jsonl", "test.jsonl", "trl-lib/ultrafeedback_binarized/train.jsonl")

pytestmark = pytest.mark.skipif(not USE_CPU, reason="the command line picks its own device")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The current folder: tiny models and pairs under the names that the pages have, and a copy of the examples."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    for name in MODELS:
        make_model("llama").save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for name in DATA:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        make_preferences(4).to_json(str(tmp_path / name))
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    adapted = get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules="all-linear"))
    adapted.peft_config["default"].base_model_name_or_path = "sft"
    adapted.save_pretrained("sft-adapters")
    tokenizer.save_pretrained("sft-adapters")
    # The pages' configurations compute in bfloat16, which transformers refuses without an accelerator unless use_cpu.
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)
    return tmp_path


def stand_ins():
    """Values for the names that a snippet takes from the reader: 2 chosen and 2 rejected sequences of 6 tokens."""
    torch.manual_seed(0)
    head, ref_head = torch.nn.Linear(8, 50, bias=False), torch.nn.Linear(8, 50, bias=False)
    hidden, ref_hidden = torch.randn(4, 6, 8, requires_grad=True), torch.randn(4, 6, 8)
    labels = torch.randint(50, (4, 6))
    return {
        "logits": head(hidden), "ref_logits": ref_head(ref_hidden).detach(), "input_labels": labels, "labels": labels,
        "hidden": hidden, "ref_hidden": ref_hidden, "lm_head": head, "ref_lm_head": ref_head,
        "weight": head.weight, "ref_weight": ref_head.weight.detach(),
        "teacher_hidden": ref_hidden, "teacher_weight": ref_head.weight.detach(),
        "model": make_model("llama"), "tokenizer": make_tokenizer(), "pairs": make_preferences(4),
        "args": TDPOConfig(output_dir="stand-in", max_steps=1),
    }  # fmt: skip


def why_not_run(command):
    return next((NOT_RUN[word] for word in command if word in NOT_RUN), None)


def check_command(command):
    """Runs a command, or checks its words as far as can be told here."""
    program, *arguments = command
    reason = why_not_run(command)
    if program == "tdpo" and reason is None:
        assert main(arguments) == 0, command
        return
    assert reason is not None, f"{' '.join(command)}: neither run nor named in NOT_RUN"
    if "tdpo" in command and program in ("tdpo", "accelerate", "torchrun", "srun"):
        place = 0 if program == "tdpo" else command.index("-m") + 1
        name, *options = command[place + 1 :]
        read_options(name, "", options)
        launcher = command[1 : place + 1] if program != "srun" else command[2 : place + 1]
        if program == "accelerate":
            launched = launch_command_parser().parse_args([*launcher[1:], *options])
            assert launched.module
            assert yaml.safe_load(Path(launched.config_file).read_text())["num_processes"] > 1
        elif program in ("torchrun", "srun"):
            assert get_args_parser().parse_args([*launcher, *options]).module
    for word in arguments:
        if re.fullmatch(r"(examples|tools|benchmarks|tests)/[\w./]+", word):
            assert (ROOT / word).exists(), word
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets)
    if program == "pip":
        extras = re.findall(r"\.\[(.+)\]", " ".join(arguments))
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
    if program == "python" and arguments[0] == "-m":
        assert find_spec(arguments[1]) is not None


def check_json(text):
    for line in text.splitlines():
        row = json.loads(line)
        columns = tuple(name.removeprefix("chosen_") for name in row if re.fullmatch("chosen_(?!ids|mask).*", name))
        assert len(tokenize_preferences(Dataset.from_list([row]), make_tokenizer(), 40, 16, token_columns=columns)) == 1


@pytest.mark.parametrize("page", [page for page in PAGES if page not in OF_OTHER_TESTS])
def test_snippets(page, home):
    for snippet in snippets((ROOT / page).read_text()):
        if snippet.language == "python":
            code = compile("\n" * (snippet.line - 1) + snippet.text, page, "exec")
            exec(code, {"__name__": "__main__", **stand_ins()})
        elif snippet.language in ("sh", "bash"):
            assert subprocess.run(["bash", "-n"], input=snippet.text, text=True).returncode == 0
            for command in snippet.commands:
                if snippet.language == "sh" or "tdpo" in command:
                    check_command(command)
        elif snippet.language == "yaml":
            Path("snippet.yaml").write_text(snippet.text)
            read_options("train", "", ["snippet.yaml"])
        else:
            assert snippet.language == "json", f"{page}, line {snippet.line}: how is this run?"
            check_json(snippet.text)


def test_the_pages_are_found():
    assert {"README.md", "docs/cookbook.md", "docs/objectives.md", *OF_OTHER_TESTS} <= set(PAGES)
    assert len([s for s in snippets((ROOT / "README.md").read_text()) if s.language == "python"]) == 5
    assert not re.search(r"^    (tdpo|pip|make|accelerate) ", (ROOT / "README.md").read_text(), re.MULTILINE)


def test_a_wrong_snippet_is_noticed(home):
    with mock.patch.dict(NOT_RUN, clear=True), pytest.raises(AssertionError, match="neither run nor named"):
        check_command(["make", "test"])
    with pytest.raises(AssertionError, match="neither run nor named"):
        check_command(["tpdo", "train"])
    with pytest.raises(ValueError, match="unknown flag --betta"):
        check_command(["torchrun", "-m", "tdpo", "train", "--betta", "1"])
    with pytest.raises(AssertionError):
        check_command(["tdpo", "train", "--model", "no-such-folder/", "--dataset", "pairs.jsonl"])
