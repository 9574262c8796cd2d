"""Rows of token ids with numbers per token, and objectives that read them."""

import pytest
import torch
from datasets import Dataset
from tdpo.data.tokenize import tokenize_preferences
from tdpo.loss.objectives import tis_dpo

from helpers.model_families import make_model, make_tokenizer
from helpers.trainer_cases import losses, make_trainer
from tdpo_ext import eager, per_token

LIMITS = {"tokenizer": make_tokenizer(), "max_length": 12, "max_prompt_length": 4}
ROW = {
    "prompt_ids": [5, 6, 7],
    "chosen_ids": [8, 9, 10, 0],
    "rejected_ids": [11, 0],
    "chosen_weight": [1.0, 0.5, 2.0, 0.25],
    "rejected_weight": [0.75, 1.5],
}


def make_rows(rows=24):
    generator = torch.Generator().manual_seed(5)

    def draw(length):
        return torch.randint(1, 290, (length,), generator=generator).tolist()

    def weights(length):
        return (torch.rand(length, generator=generator) + 0.5).tolist()

    return Dataset.from_list(
        [
            {
                "prompt_ids": draw(i % 4),  # some have no prompt, so that nothing predicts their first token
                "chosen_ids": draw(3 + i % 3),
                "rejected_ids": draw(2 + i % 5),
                "chosen_weight": weights(3 + i % 3),
                "rejected_weight": weights(2 + i % 5),
            }
            for i in range(rows)
        ]
    )


def tokenized(*rows, columns=("weight",), **limits):
    return tokenize_preferences(Dataset.from_list(list(rows)), **{**LIMITS, **limits}, token_columns=columns)


def test_rows_are_kept_as_they_are():
    row = tokenized(ROW)[0]
    assert {name: row[name] for name in ROW} == ROW
    assert (row["dataset_row"], row["length"], row["token_row"]) == (0, 7, 0)
    assert "chosen_weight" not in tokenized(ROW, columns=()).column_names


def test_long_rows_are_cut_with_their_columns():
    row = tokenized(ROW, max_length=4, max_prompt_length=2)[0]
    assert row["prompt_ids"] == [6, 7]
    assert row["chosen_ids"] == [8, 9]
    assert row["chosen_weight"] == [1.0, 0.5]
    with pytest.raises(ValueError, match="a prompt over 2 tokens"):
        tokenized(ROW, max_prompt_length=2, overlong="drop")
    with pytest.raises(ValueError, match="prompt and 'chosen' response over 6 tokens"):
        tokenized(ROW, max_length=6, overlong="drop")


def ids(prompt, chosen, rejected):
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


@pytest.mark.parametrize(("chosen", "rejected"), [([5, 6, 7, 0], [8, 0]), ([5, 0], [6, 7, 8, 9, 0])])
def test_the_length_is_that_of_the_prompt_and_the_longer_response(chosen, rejected):
    tokens = tokenized(ids([1, 2, 3], chosen, rejected), columns=())
    assert tokens["length"] == [3 + max(len(chosen), len(rejected))]
    cut = tokenized(ids([1, 2, 3], chosen, rejected), max_length=5, max_prompt_length=2, columns=())
    assert cut["length"] == [2 + min(3, max(len(chosen), len(rejected)))]


def test_rows_that_are_left_know_where_they_stood_and_stand():
    tokens = tokenized(ids([1], [2], [2]), ids([1], [2], [3]), ids([1], [4], []), ids([1], [5], [6]), columns=())
    assert tokens["dataset_row"] == [1, 3]
    assert tokens["token_row"] == [0, 1]
    assert set(tokens.column_names) == {
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
        "chosen_mask",
        "rejected_mask",
        "dataset_row",
        "length",
        "token_row",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen_ids": [8, 9, 10, 1000]}, r"row 1 .*'chosen_ids' holds 1000; token ids are 0 to 289"),
        ({"rejected_ids": [-1, 0]}, "'rejected_ids' holds -1"),
        ({"prompt_ids": None}, "'prompt_ids' is None"),
        ({"chosen_weight": [1.0]}, "'chosen_weight' has 1 numbers for 4 tokens"),
        ({"rejected_weight": [float("nan"), 1.0]}, "'rejected_weight' .* finite"),
        ({"rejected_weight": None}, "'rejected_weight' is None"),
    ],
)
def test_bad_rows_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        tokenized(ROW, {**ROW, **change})


def test_missing_columns_are_named():
    plain = {name: value for name, value in ROW.items() if not name.endswith("weight")}
    with pytest.raises(ValueError, match="lacks chosen_weight, rejected_weight"):
        tokenized(plain)
    with pytest.raises(ValueError, match="numbers per token, which only rows of token ids have"):
        tokenized({"prompt": "a", "chosen": "b", "rejected": "c"})


def test_equal_responses_are_dropped():
    equal = {**ROW, "rejected_ids": ROW["chosen_ids"], "rejected_weight": ROW["chosen_weight"]}
    assert tokenized(equal, ROW)["dataset_row"] == [1]
    with pytest.raises(ValueError, match="1 with equal responses"):
        tokenized(equal)


@pytest.mark.parametrize("options", [{}, {"padding_free": True}, {"shared_prompts": "never"}])
def test_tis_dpo_of_a_batch(options, tmp_path):
    """The trainer's loss is the formula on the models' own logits, every weight at its token."""
    policy, frozen = make_model("llama", 0), make_model("llama", 1)
    rows = make_rows(8)
    trainer = make_trainer(
        tmp_path, policy, frozen, train_dataset=rows, eval_dataset=rows, variant="tis_dpo", alpha=0.3, **options
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.model(preference=batch).loss

    def side(row, name):
        ids = torch.tensor([row["prompt_ids"] + row[f"{name}_ids"]])
        first = max(len(row["prompt_ids"]), 1)
        with torch.no_grad():
            logits, ref_logits = (model(input_ids=ids).logits[0, first - 1 : -1].double() for model in (policy, frozen))
        values = eager.token_divergence(logits, ref_logits, ids[0, first:], kl_direction="reverse")
        weight = torch.tensor(row[f"{name}_weight"])[-len(values.kl) :]
        return (weight * values.logratio).sum(), (weight * values.kl).sum()

    expected = []
    for index in batch["dataset_row"].tolist():
        (u_w, k_w), (u_l, k_l) = (side(rows[index], name) for name in ("chosen", "rejected"))
        expected.append(-torch.nn.functional.logsigmoid(0.1 * (u_w - u_l - 0.3 * (k_w - k_l))))
    torch.testing.assert_close(loss.detach().double(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)


def test_tis_dpo_trains_and_evaluates(tmp_path):
    rows = make_rows()
    trainer = make_trainer(
        tmp_path, train_dataset=rows, eval_dataset=rows.select(range(6)), variant="tis_dpo", max_steps=8
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert 0 < trainer.evaluate()["eval_loss"] < 0.6932


@pytest.mark.parametrize("direction", [None, "reverse"])
def test_an_objective_of_your_own_by_hand(direction, tmp_path):
    """Its loss and its gradient, from the models' own logits; `alpha` and `beta` of the options change neither."""

    @per_token
    def own(chosen, rejected):
        margins = chosen.sum(chosen.columns["weight"] * chosen.kl) - rejected.sum(rejected.logratio)
        return torch.nn.functional.softplus(margins)

    policy, frozen, rows = make_model("llama", 0), make_model("llama", 1), make_rows(8)
    trainer = make_trainer(
        *(tmp_path, policy, frozen),
        train_dataset=rows,
        eval_dataset=rows,
        objective=own,
        token_columns=["weight"],
        kl_direction=direction,
        beta=0.3,
        per_device_eval_batch_size=8,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.model(preference=batch).loss
    loss.backward()
    grad = policy.lm_head.weight.grad.clone()
    policy.zero_grad()

    def values(row, side):
        ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
        first = max(len(row["prompt_ids"]), 1)
        with torch.no_grad():
            ref_logits = frozen(input_ids=ids).logits[0, first - 1 : -1]
        logits = policy(input_ids=ids).logits[0, first - 1 : -1]
        values = eager.token_divergence(logits, ref_logits, ids[0, first:], kl_direction=direction or "forward")
        return values, torch.tensor(row[f"{side}_weight"])[-len(values.kl) :]

    def loss_of(row):
        (chosen, weight), (rejected, _) = (values(row, side) for side in ("chosen", "rejected"))
        return torch.nn.functional.softplus((weight * chosen.kl).sum() - rejected.logratio.sum())

    expected = torch.stack([loss_of(rows[index]) for index in batch["dataset_row"].tolist()]).mean()
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, policy.lm_head.weight.grad, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        everything = torch.stack([loss_of(row) for row in rows]).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(everything, rel=1e-4)


def test_an_objective_of_your_own(tmp_path):
    """On columns of any name, and on sums; it takes the place of the configuration's."""

    @per_token
    def masked(chosen, rejected):
        margins = chosen.sum(chosen.columns["weight"] * chosen.kl) - rejected.sum(rejected.logratio)
        return torch.nn.functional.softplus(margins)

    rows, frozen = make_rows(8), make_model("llama", 1)
    found = [
        make_trainer(
            tmp_path,
            make_model("llama", 0),
            frozen,
            train_dataset=rows,
            eval_dataset=rows,
            objective=objective,
            token_columns=["weight"],
            kl_direction=direction,
        )
        for objective, direction in ((masked, None), (masked, "reverse"), (tis_dpo(0.1, 0.5), "reverse"))
    ]
    batch = next(iter(found[0].get_train_dataloader()))
    values = [trainer.model(preference=batch).loss.item() for trainer in found]
    assert len(set(values)) == 3
    named = make_trainer(
        tmp_path, make_model("llama", 0), frozen, train_dataset=rows, eval_dataset=rows, variant="tis_dpo"
    )
    assert named.model(preference=batch).loss.item() == values[2]
    with pytest.raises(TypeError, match="objective is 'tdpo2'; a function is needed"):
        make_trainer(tmp_path, objective="tdpo2")
