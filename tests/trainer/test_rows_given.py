"""What the trainer makes of rows: responses of several turns, several pairs of a prompt, and rows given later."""

import pytest
import torch
from datasets import Dataset
from tdpo import TDPOConfig, TDPOTrainer
from tdpo.data.collator import Sequence

from helpers.model_families import make_model, make_tokenizer
from helpers.token_rows import CHAT, message
from helpers.trainer_cases import SETTINGS, losses, make_preferences, make_trainer

SAID = ["good fun", "bad plot", "great acting"]


def make_turns(rows=8):
    """Chosen responses of two turns of the assistant, with one of the user between them."""

    def row(i):
        chosen = [message("assistant", SAID[i % 3]), message("user", "why?" * (i % 2 + 1)), message("assistant", "so")]
        return {
            "prompt": [message("user", "film?")],
            "chosen": chosen,
            "rejected": [message("assistant", SAID[(i + 1) % 3])],
        }

    return Dataset.from_list([row(i) for i in range(rows)])


def trainer_of_turns(path, **options):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    args = TDPOConfig(output_dir=str(path), **{**SETTINGS, "max_length": 90, "max_prompt_length": 40, **options})
    models = make_model("llama"), make_model("llama", 1)
    return TDPOTrainer(*models, args, train_dataset=make_turns(), processing_class=tokenizer)


def plain_loss(trainer, row):
    """TDPO2 of a tokenized pair from float32 logits of each sequence alone."""
    sums = {}
    for side in ("chosen", "rejected"):
        ids, _, learned = Sequence.of(row, side)
        tokens, places = torch.tensor([ids]), torch.tensor(learned) - 1
        with torch.no_grad():
            logps, ref_logps = (
                model(input_ids=tokens).logits[0, places].log_softmax(-1)
                for model in (trainer.model, trainer.ref_model)
            )
        targets = tokens[0, places + 1][:, None]
        logratio = (logps - ref_logps).gather(1, targets).sum()
        sums[side] = logratio, (ref_logps.exp() * (ref_logps - logps)).sum()
    (chosen, kl), (rejected, other_kl) = sums["chosen"], sums["rejected"]
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected - 0.5 * (other_kl - kl)))


@pytest.mark.parametrize("shared_prompts", ["always", "never"])
@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_turns_of_the_assistant_are_the_loss(cached, padding_free, shared_prompts, tmp_path):
    layout = {"padding_free": padding_free, "shared_prompts": shared_prompts}
    cache = {"precompute_reference": True, "reference_dtype": "float32"} if cached else {}
    trainer = trainer_of_turns(tmp_path, **layout, **cache)
    plain = trainer_of_turns(tmp_path / "plain")
    rows = trainer.train_dataset.to_list()
    assert not all(rows[0]["chosen_mask"])
    loss = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert loss == pytest.approx(torch.stack([plain_loss(plain, row) for row in rows]).mean().item(), rel=1e-5)
    trainer.train()  # with an audit before its first step
    other = trainer_of_turns(tmp_path / "all", learned_turns="all", **layout)
    other.train()
    assert losses(trainer)[0] != pytest.approx(losses(other)[0], rel=1e-3)


def test_every_pair_of_a_prompt_counts_in_an_evaluation(tmp_path):
    responses = [" great", " good", " bad", " awful"]
    ranked = Dataset.from_list([{"prompt": "the film was", "responses": responses, "scores": [4.0, 3.0, 2.0, 1.0]}] * 2)
    pairs = [
        {"prompt": "the film was", "chosen": responses[better], "rejected": responses[worse]}
        for better in range(4)
        for worse in range(better + 1, 4)
    ]
    trainer = make_trainer(tmp_path, ref_model=make_model("gpt2", 1), pairing="all")
    of_ranked, of_pairs = trainer.evaluate(ranked), trainer.evaluate(Dataset.from_list(pairs))
    for name in ("eval_loss", "eval_kl/chosen", "eval_rewards/margins", "eval_rewards/accuracies"):
        assert of_ranked[name] == pytest.approx(of_pairs[name], rel=1e-5), name


@pytest.mark.parametrize("of_several", [False, True])
def test_rows_may_be_given_later(of_several, tmp_path):
    trainer = make_trainer(tmp_path, ref_model=make_model("gpt2", 1))
    rows = make_preferences().select(range(8))
    expected = trainer.evaluate()
    if of_several:
        evaluated = trainer.evaluate({"a": rows})
        assert evaluated["eval_a_loss"] == expected["eval_loss"]
        return
    assert trainer.evaluate(rows)["eval_loss"] == expected["eval_loss"]
    predicted = trainer.predict(rows)
    assert predicted.metrics["test_loss"] == expected["eval_loss"]
    assert predicted.metrics["test_kl/chosen"] == expected["eval_kl/chosen"]
    unlike = rows.rename_column("prompt", "question")
    with pytest.raises(ValueError, match="row 0 of the dataset: it has no 'prompt'"):
        trainer.evaluate(unlike)


def test_what_becomes_of_rows_is_told(tmp_path, capsys):
    rows = [*make_preferences(3).to_list(), {"prompt": "a", "chosen": " b", "rejected": " b"}]
    data = {"train_dataset": Dataset.from_list(rows), "eval_dataset": {"held out": make_preferences(2)}}
    make_trainer(tmp_path, **data, max_prompt_length=30)
    said = capsys.readouterr().err
    assert "train_dataset: 3 pairs of 4 rows; dropped 1: 1 with equal responses; tokens: prompt " in said
    assert "eval_dataset['held out']: 2 pairs of 2 rows; tokens: prompt " in said
