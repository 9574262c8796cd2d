"""What is said while a run trains."""

import pytest

from helpers.trainer_cases import make_trainer


@pytest.mark.parametrize(("limit", "warnings"), [(1.0, 1), (0, 0), (1e6, 0)])
def test_a_kl_that_explodes_is_warned_of_once(limit, warnings, tmp_path, caplog):
    trainer = make_trainer(tmp_path, learning_rate=0.3, max_steps=5, kl_warning=limit)
    with caplog.at_level("WARNING"):
        trainer.train()
    kl = [entry["kl/chosen"] for entry in trainer.state.log_history if "kl/chosen" in entry]
    assert sum(value > 1.0 for value in kl) > 1
    assert caplog.text.count("the policy leaves its reference fast; a lower learning_rate (0.3 now)") == warnings
