"""Killed runs end like unbroken ones once they resume; finished runs stay as they are unless they go on."""

import json
import signal

import pytest
from tdpo.runs.checkpoints import STAGING, last_checkpoint

from helpers.model_families import make_model
from helpers.trainer_cases import FOUR_STEPS, losses, make_trainer, run_python


def make_saving_trainer(out):
    return make_trainer(
        out,
        model=make_model("llama"),
        ref_model=make_model("llama", 1),
        max_steps=8,
        save_strategy="steps",
        save_steps=3,
        weight_decay=0.1,
    )


KILLED = """
import os, signal, sys

from helpers.forked import run_forked
from trainer.runs.test_resume import make_saving_trainer


def train_killed(out, when):
    trainer = make_saving_trainer(out)
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
    else:
        trainer._save_optimizer_and_scheduler = killed_save_optimizer
    trainer.train()


print({when: run_forked(train_killed, sys.argv[1] + "/" + when, when).status for when in ("step", "checkpoint")})
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with the outputs `step` and `checkpoint` of runs that were killed there."""
    folder = tmp_path_factory.mktemp("killed")
    done = run_python("-c", KILLED, str(folder), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert str({"step": -signal.SIGKILL.value, "checkpoint": -signal.SIGKILL.value}) in done.stdout, done.stderr
    return folder


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    trainer = make_saving_trainer(tmp_path_factory.mktemp("unbroken"))
    trainer.train()
    return losses(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["step", "checkpoint"])
def test_killed_and_resumed(when, killed, unbroken):
    out = killed / when
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-3"]
    assert (out / STAGING).exists() == (when == "checkpoint")
    assert last_checkpoint(out) == str(out / "checkpoint-3")
    trainer = make_saving_trainer(out)
    trainer.train(resume_from_checkpoint=True)
    assert losses(trainer) == unbroken
    state = json.loads((out / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["global_step"] == 8
    assert not (out / STAGING).exists()


def test_a_finished_run_is_loaded_and_left_as_it_is(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    trainer = make_trainer(finished, **FOUR_STEPS)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.was_finished
    assert trainer.state.global_step == 4
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    other = make_trainer(finished, **FOUR_STEPS)
    other.train(resume_from_checkpoint=str(finished / "checkpoint-2"))
    assert not other.was_finished
    assert f"Resuming from {finished / 'checkpoint-2'}, at step 2 of 4." in capsys.readouterr().err
    for name, value in other.model.state_dict().items():  # what was loaded is what was trained
        assert value.equal(trainer.model.state_dict()[name]), name


def test_a_run_that_goes_on_is_no_longer_finished(tmp_path):
    trainer = make_trainer(tmp_path, **{**FOUR_STEPS, "max_steps": 2})
    trainer.train()
    assert not trainer.was_finished
    trainer.train(resume_from_checkpoint=True)
    assert trainer.was_finished
    trainer.args.max_steps = 4
    trainer.train(resume_from_checkpoint=True)
    assert not trainer.was_finished
    assert trainer.state.global_step == 4
