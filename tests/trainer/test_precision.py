"""In which precision a policy trains, is evaluated and is compared with its reference."""

import copy

import pytest
import transformers
from model_families import make_model
from trainer_cases import make_trainer


def evaluated_anew(path, trained, reference, **options):
    """The metrics of a trainer that has never seen another state of the policy."""
    return make_trainer(path, copy.deepcopy(trained), reference, **options).evaluate()


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # a head of its own, and one that is tied
def test_evaluations_are_of_the_weights_as_they_are(family, tmp_path):
    """The fused optimizer changes weights without a trace in their version counters."""
    reference = make_model(family, 1)
    options = {"bf16": True, "learning_rate": 3e-2, "optim": "adamw_torch_fused", "max_steps": 2}
    trainer = make_trainer(tmp_path, make_model(family, 0), reference, eval_strategy="steps", eval_steps=1, **options)
    expected = []

    def record(*arguments, model, **others):
        policy = make_model(family, 0)
        policy.load_state_dict(model.state_dict())
        expected.append(evaluated_anew(tmp_path, policy, reference, **options))

    callback = type("Record", (transformers.TrainerCallback,), {"on_step_end": record})
    trainer.add_callback(callback())
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    evaluations.append(trainer.evaluate())
    expected.append(expected[-1])
    for found, right in zip(evaluations, expected, strict=True):
        for name in ("eval_loss", "eval_kl/chosen"):
            assert found[name] == right[name], name
