"""The demo as its users call it, in the smallest of sizes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SMALL_DEMO = [
    *("--reviews", "600"),
    *("--pretrain-steps", "5", "--prompts", "24", "--eval-prompts", "8", "--steps", "4", "--eval-every", "2"),
    *("--response-tokens", "6", "--batch-pairs", "4"),
]


def demo(*arguments):
    code = "import sys; from tdpo.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)


@pytest.mark.slow
def test_demo_runs_resumes_and_refuses_other_settings(tmp_path):
    out = tmp_path / "demo"
    first = demo("--out", str(out), *SMALL_DEMO, "--methods", "dpo")
    assert first.returncode == 0, first.stderr
    base = (out / "base" / "model.safetensors").stat().st_mtime
    curve = json.loads((out / "dpo" / "frontier.json").read_text())
    assert [point["step"] for point in curve] == [0, 2, 4]
    assert curve[0]["kl"] == pytest.approx(0, abs=1e-5)
    second = demo("--out", str(out), *SMALL_DEMO, "--methods", "dpo", "tdpo2")
    assert second.returncode == 0, second.stderr
    assert (out / "base" / "model.safetensors").stat().st_mtime == base
    assert json.loads((out / "dpo" / "frontier.json").read_text()) == curve
    assert (out / "frontier.png").stat().st_size > 5000
    assert "matched KL" in second.stdout
    assert demo("--out", str(out), *SMALL_DEMO, "--seed", "1").returncode == 2


@pytest.mark.slow
def test_interrupted_demo_goes_on(tmp_path):
    out = tmp_path / "demo"
    # A job in the background is started deaf to interrupts.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = listen + "import sys; from tdpo.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "demo", "--out", str(out), *SMALL_DEMO, "--methods", "dpo", "--steps", "40"]
    here = Path(__file__).parent
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here) as running:
        checkpoints = out / "dpo" / "checkpoints"
        while running.poll() is None and not list(checkpoints.glob("checkpoint-*")):
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate()
    assert running.returncode == 130, errors
    assert "to go on from here" in errors
    assert not (out / "dpo" / "model").exists()
    before = {path.name for path in checkpoints.glob("checkpoint-*")}
    assert before
    done = subprocess.run(command, capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stderr
    steps = [point["step"] for point in json.loads((out / "dpo" / "frontier.json").read_text())]
    assert steps == list(range(0, 41, 2))


def test_demo_help_documents_its_knobs():
    shown = demo("--help").stdout
    for knob in ("--beta", "--methods", "--eval-every", "--seed"):
        assert knob in shown


def test_demo_rejects_unknown_methods():
    refused = demo("--methods", "ppo")
    assert refused.returncode == 2
    assert "ppo" in refused.stderr
