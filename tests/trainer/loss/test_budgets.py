"""A training step is the same whatever memory the logits may take, for batches of long and short pairs together."""

import pytest
from datasets import Dataset

from helpers.model_families import make_model
from helpers.trainer_cases import make_trainer

VOCABULARY = 1000
BUDGETS = (600_000, 1_200_000, 1_800_000, 3_000_000, 4_400_000)  # bytes


def one_long_pair_among(short, *, words, long):
    """Pairs with responses of about `words` words, and a last one of about `long`."""
    lengths = [*[words] * short, long]
    return Dataset.from_list(
        [
            {"prompt": "the film was", "chosen": " good" * (length + i), "rejected": " bad" * (length - i)}
            for i, length in enumerate(lengths)
        ]
    )


def first_step(path, pairs, **options):
    models = {"model": make_model("llama", 0), "ref_model": make_model("llama", 1)}
    for model in models.values():
        model.resize_token_embeddings(VOCABULARY)
    trainer = make_trainer(
        path,
        **models,
        train_dataset=pairs,
        max_steps=1,
        max_length=512,
        per_device_train_batch_size=len(pairs),
        **options,
    )
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize(("short", "words", "long"), [(3, 20, 90), (3, 30, 120), (7, 12, 100)])
def test_loss_and_gradient_do_not_depend_on_the_budget(short, words, long, tmp_path):
    pairs = one_long_pair_among(short, words=words, long=long)
    expected = first_step(tmp_path, pairs)
    for budget in BUDGETS:
        found = first_step(tmp_path, pairs, logits_budget=budget)
        for name in ("loss", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), (budget, name)
