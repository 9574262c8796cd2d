"""The learning rates of resumed runs."""

import pytest

from helpers.trainer_cases import FOUR_STEPS, make_trainer

EIGHT_STEPS = {**FOUR_STEPS, "max_steps": 8, "save_steps": 4}


def rates(trainer):
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_a_run_that_is_extended_follows_its_new_schedule_from_its_first_step(scheduler, tmp_path):
    options = {"lr_scheduler_type": scheduler}
    unbroken = make_trainer(tmp_path / "unbroken", **EIGHT_STEPS, **options)
    unbroken.train()
    make_trainer(tmp_path / "extended", **FOUR_STEPS, **options).train()
    extended = make_trainer(tmp_path / "extended", **EIGHT_STEPS, **options)
    extended.train(resume_from_checkpoint=True)
    assert len(rates(extended)) == 8
    assert rates(extended)[4:] == rates(unbroken)[4:]
    assert min(rates(extended)[4:]) > 0


def test_a_run_that_resumes_takes_the_rates_of_an_unbroken_one(tmp_path):
    unbroken = make_trainer(tmp_path, **EIGHT_STEPS, lr_scheduler_type="cosine", warmup_steps=3)
    unbroken.train()
    resumed = make_trainer(tmp_path / "resumed", **EIGHT_STEPS, lr_scheduler_type="cosine", warmup_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert rates(resumed) == rates(unbroken)
