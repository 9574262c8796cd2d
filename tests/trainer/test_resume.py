"""Training killed in the middle of a step or of a checkpoint, then resumed: the loss curve of an unbroken run."""

import json
import signal

import pytest
from trainer_cases import run_python

RUN = """
import json, os, signal, sys

from model_families import make_model
from tdpo.checkpoints import last_checkpoint
from trainer_cases import losses, make_trainer

out, when = sys.argv[1:]
trainer = make_trainer(
    out,
    model=make_model("llama"),
    ref_model=make_model("llama", 1),
    max_steps=8,
    save_strategy="steps",
    save_steps=3,
    weight_decay=0.1,
)
training_step, save_optimizer = trainer.training_step, trainer._save_optimizer_and_scheduler


def killed_training_step(*arguments):
    loss = training_step(*arguments)
    if trainer.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss


def killed_save_optimizer(folder):
    if trainer.state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    save_optimizer(folder)


if when == "step":
    trainer.training_step = killed_training_step
if when == "checkpoint":
    trainer._save_optimizer_and_scheduler = killed_save_optimizer
last = last_checkpoint(out)
trainer.train(resume_from_checkpoint=last is not None)
print(json.dumps([last, losses(trainer)]))
"""


def run(folder, when):
    done = run_python("-c", RUN, str(folder / "out"), when, cwd=folder)
    if when != "never":
        assert done.returncode == -signal.SIGKILL, done.stderr
        return None
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return run(tmp_path_factory.mktemp("unbroken"), "never")[1]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["step", "checkpoint"])
def test_killed_and_resumed(when, tmp_path, unbroken):
    run(tmp_path, when)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-3"]
    last, losses = run(tmp_path, "never")
    assert last.endswith("checkpoint-3")
    assert losses == unbroken
    assert not (tmp_path / "out" / ".checkpoint-being-written").exists()
