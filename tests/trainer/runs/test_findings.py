"""What is said of a log: how it went, and each warning on one side of its threshold only."""

import pytest
from tdpo.runs.findings import findings

from helpers.log_histories import evaluation, training

START = training(10, margin=0.0, accuracy=0.5, chosen=0.0, kl=(0.0, 0.0))


def said(*history, kl_warning=20.0):
    return list(findings(history, kl_warning=kl_warning))


def test_a_run_in_which_nothing_stands_out():
    evaluated = [evaluation(20, loss=0.5), evaluation(40, loss=0.52)]
    assert said(START, training(40, margin=1.25, accuracy=0.8, kl=(3.0, 4.0)), *evaluated) == [
        "steps 10 to 40: the margin went from 0 to 1.25, the accuracy from 0.50 to 0.80; the KL is 3 nats of chosen "
        "responses, 4 of rejected ones"
    ]


def test_ends_are_means_of_a_tenth():
    margins = [1.0, 3.0, *[100.0] * 16, 6.0, 8.0]
    (line,) = said(*(training(step, margin=margin) for step, margin in enumerate(margins, 1)))
    assert line.startswith("steps 1 to 20: the margin went from 2 to 7,")


def test_one_entry_is_said_to_be_one():
    assert said(training(4, margin=0.5, accuracy=0.75, kl=None)) == [
        "step 4, the only one that was logged: the margin is 0.5, the accuracy 0.75"
    ]


@pytest.mark.parametrize(
    ("inside", "beyond", "words"),
    [
        ({"accuracy": 0.55}, {"accuracy": 0.54}, "the accuracy, 0.54, is still that of chance"),
        ({"kl": (20.0, 20.0)}, {"kl": (20.1, 20.0)}, "the KL of chosen responses, 20.1 nats, is above kl_warning"),
        ({"kl": (2.0, 4.0)}, {"kl": (2.0, 4.1)}, "the KL of rejected responses, 4.1 nats, is far above"),
        ({"kl": (0.1, 1.0)}, {"kl": (0.1, 1.1)}, "the KL of rejected responses, 1.1 nats, is far above"),
        ({"chosen": -0.2}, {"chosen": -0.3}, "the rewards of chosen responses fell"),
    ],
)
def test_what_to_look_at(inside, beyond, words):
    assert len(said(START, training(40, **inside))) == 1
    _, warning = said(START, training(40, **beyond))
    assert warning.startswith(f"look at this: {words}")


def test_rewards_without_a_reference_may_be_of_any_sign():
    assert len(said(training(10, kl=None), training(40, chosen=-9.0, kl=None))) == 1


def test_an_accuracy_of_one_at_once():
    end = training(40, accuracy=1.0)
    assert len(said(training(10, accuracy=0.98), end)) == 1
    assert "the accuracy is 0.99 from the beginning" in said(training(10, accuracy=0.99), end)[1]


def test_a_loss_of_evaluation_that_rises():
    run = [START, training(40)]
    falls = [evaluation(step, loss=loss) for step, loss in ((10, 0.6), (20, 0.5))]
    assert len(said(*run, *falls, evaluation(30, loss=0.525))) == 1
    assert "rose from 0.5, its lowest, to 0.53" in said(*run, *falls, evaluation(30, loss=0.53))[1]
    other = [evaluation(step, loss=loss, prefix="eval_b_") for step, loss in ((10, 0.6), (20, 0.7))]
    assert "rose from 0.6, its lowest, to 0.7" in said(*run, *falls, evaluation(30, loss=0.53), *other)[1]
    assert len(said(*run, evaluation(10, loss=0.0), evaluation(20, loss=0.0))) == 1


def test_the_limit_of_the_kl_is_the_option():
    history = (START, training(40, kl=(5.0, 5.0)))
    assert [len(said(*history, kl_warning=limit)) for limit in (0, 4, 6)] == [1, 2, 1]
