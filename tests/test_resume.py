"""Training killed in the middle of a step, and of a checkpoint, then resumed: the loss curve of an unbroken run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import json, os, signal, sys
from model_families import make_model, make_tokenizer
from trainer_cases import losses, make_preferences, make_trainer

out, when = sys.argv[1], sys.argv[2]
trainer = make_trainer(out, make_tokenizer(), make_preferences(), make_model("llama"), ref_model=make_model("llama", 1),
                       max_steps=8, save_strategy="steps", save_steps=3, weight_decay=0.1)
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
if when == "step":
    step = trainer.training_step
    def training_step(*arguments):
        loss = step(*arguments)
        if trainer.state.global_step == 4:
            die()
        return loss
    trainer.training_step = training_step
if when == "checkpoint":
    save = trainer._save_optimizer_and_scheduler
    def save_optimizer(folder):
        if trainer.state.global_step == 6:
            die()
        save(folder)
    trainer._save_optimizer_and_scheduler = save_optimizer
from transformers.trainer_utils import get_last_checkpoint
last = get_last_checkpoint(out) if os.path.isdir(out) else None
trainer.train(resume_from_checkpoint=last)
print(json.dumps([last, losses(trainer)]))
"""


def run(out, when):
    command = [sys.executable, "-c", RUN, str(out), when]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    if when != "never":
        assert done.returncode == -signal.SIGKILL, done.stderr
        return None
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return run(tmp_path_factory.mktemp("unbroken") / "out", "never")[1]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["step", "checkpoint"])
def test_killed_and_resumed(when, tmp_path, unbroken):
    run(tmp_path / "out", when)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-3"]
    last, losses = run(tmp_path / "out", "never")
    assert last.endswith("checkpoint-3")
    assert losses == unbroken
    assert not os.path.exists(tmp_path / "out" / ".checkpoint-being-written")
