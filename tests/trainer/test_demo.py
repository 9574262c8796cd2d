"""The demo as its users call it, at the smallest scale."""

import json
import signal
import subprocess
import sys
import time

import pytest
from trainer_cases import run_python

SETTINGS = {
    "reviews": 600,
    "pretrain-steps": 5,
    "prompts": 24,
    "eval-prompts": 8,
    "steps": 4,
    "eval-every": 2,
    "response-tokens": 6,
    "batch-pairs": 4,
}
RUN = "import sys; from tdpo.cli import main; sys.exit(main())"


def small(out, methods=(), **settings):
    """The flags of a small demo."""
    flags = [f"--{name}={value}" for name, value in {"out": out, **SETTINGS, **settings}.items()]
    return [*flags, "--methods", *methods] if methods else flags


@pytest.fixture
def demo(tmp_path):
    """Runs `tdpo demo` with some flags."""

    def run(flags):
        return run_python("-c", RUN, "demo", *flags, cwd=tmp_path)

    return run


@pytest.mark.slow
def test_demo_runs_resumes_and_refuses_other_settings(demo, tmp_path):
    out = tmp_path / "demo"
    first = demo(small(out, ["dpo"]))
    assert first.returncode == 0, first.stderr
    base = (out / "base" / "model.safetensors").stat().st_mtime
    curve = json.loads((out / "dpo" / "frontier.json").read_text())
    assert [point["step"] for point in curve] == [0, 2, 4]
    assert curve[0]["kl"] == pytest.approx(0, abs=1e-5)
    second = demo(small(out, ["dpo", "tdpo2"]))
    assert second.returncode == 0, second.stderr
    assert (out / "base" / "model.safetensors").stat().st_mtime == base
    assert json.loads((out / "dpo" / "frontier.json").read_text()) == curve
    assert (out / "frontier.png").stat().st_size > 5000
    assert "matched KL" in second.stdout
    assert demo(small(out, seed=1)).returncode == 2


@pytest.mark.slow
def test_interrupted_demo_resumes(demo, tmp_path):
    out = tmp_path / "demo"
    flags = small(out, ["dpo"], steps=40)
    # A job in the background starts with interrupts ignored.
    handle_interrupts = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = [sys.executable, "-c", handle_interrupts + RUN, "demo", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as running:
        checkpoints = out / "dpo" / "checkpoints"
        while running.poll() is None and not list(checkpoints.glob("checkpoint-*")):
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate()
    assert running.returncode == 130, errors
    assert "run the same command again to resume" in errors
    assert not (out / "dpo" / "model").exists()
    before = {path.name for path in checkpoints.glob("checkpoint-*")}
    assert before
    done = demo(flags)
    assert done.returncode == 0, done.stderr
    steps = [point["step"] for point in json.loads((out / "dpo" / "frontier.json").read_text())]
    assert steps == list(range(0, 41, 2))


def test_demo_help_documents_its_options(demo):
    shown = demo(["--help"]).stdout
    for option in ("--beta", "--methods", "--eval-every", "--seed"):
        assert option in shown


def test_demo_rejects_unknown_methods(demo):
    refused = demo(["--methods", "ppo"])
    assert refused.returncode == 2
    assert "ppo" in refused.stderr
