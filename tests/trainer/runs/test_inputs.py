"""Evaluations by a split's name, and the tokens that transformers counts."""

import pytest

from helpers.model_families import make_model
from helpers.trainer_cases import make_preferences, make_trainer


def test_splits_by_name(tmp_path):
    rows = make_preferences()
    splits = {"short": rows.select(range(4)), "long": rows.select(range(8, 20))}
    trainer = make_trainer(tmp_path, ref_model=make_model("gpt2", 1), eval_dataset=splits)
    every = trainer.evaluate()
    for name in splits:
        alone = trainer.evaluate(name)
        assert alone["eval_loss"] == every[f"eval_{name}_loss"]
        assert alone["eval_kl/chosen"] == every[f"eval_{name}_kl/chosen"]
    with pytest.raises(ValueError, match=r"^eval_dataset is 'shrt', .* it has 'short', 'long'$"):
        trainer.evaluate("shrt")


def test_a_name_without_splits(tmp_path):
    with pytest.raises(ValueError, match=r"^eval_dataset is 'test', .* none, since eval_dataset is not a dict"):
        make_trainer(tmp_path).evaluate("test")


@pytest.mark.parametrize("layout", ["padded", "shared", "packed"])
@pytest.mark.parametrize("counted", ["no", False, "all", True, "non_padding"])
def test_tokens_are_counted_as_transformers_does(counted, layout, tmp_path):
    options = {"shared_prompts": "always" if layout == "shared" else "never", "padding_free": layout == "packed"}
    options |= {"train_sampling_strategy": "sequential", "max_steps": 3, "include_num_input_tokens_seen": counted}
    trainer = make_trainer(tmp_path, model=make_model("llama"), **options)
    trainer.train()
    rows = trainer.train_dataset.select(range(12)).to_list()
    trained, places = 0, 0  # tokens of the input, and with its padding
    for first in range(0, 12, 4):
        pairs = [(len(r["prompt_ids"]), len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows[first : first + 4]]
        if layout == "shared":
            lines = [sum(pair) for pair in pairs]
        else:
            lines = [prompt + response for prompt, *responses in pairs for response in responses]
        trained += sum(lines)
        places += max(lines) * len(lines)
    both = sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)
    expected = {"no": both, False: both, "non_padding": trained}.get(counted, trained if layout == "packed" else places)
    assert trainer.state.num_input_tokens_seen == expected
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    names = ("num_tokens", "num_input_tokens_seen")
    assert [last.get(name) for name in names] == ([both, None] if counted in ("no", False) else [None, expected])


def test_predictions_of_a_split_by_name(tmp_path):
    rows = make_preferences().select(range(4))
    trainer = make_trainer(tmp_path, eval_dataset={"a": rows})
    assert trainer.predict("a").metrics["test_loss"] == trainer.predict(rows).metrics["test_loss"]
    with pytest.raises(ValueError, match="test_dataset is 'b', which is no split of the trainer's; it has 'a'"):
        trainer.predict("b")
    with pytest.raises(ValueError, match="test_dataset is None; rows or the name of a split are needed"):
        trainer.predict(None)
