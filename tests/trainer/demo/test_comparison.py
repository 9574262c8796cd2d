"""Paired differences and their bootstrap intervals, against what is known of simple cases."""

import numpy as np
import pytest
from tdpo.demo.comparison import compare, kl_after, reward_after, reward_at_equal_kl
from tdpo.demo.evaluation import Evaluation, reward_at

PROMPTS = 300


def evaluation(step, rewards, kls):
    return Evaluation(step, [""] * len(rewards), list(rewards), list(kls))


@pytest.fixture
def rewards():
    """Of two policies on the same prompts: a spread of 0.2 over prompts, of which they share most."""
    random = np.random.default_rng(0)
    prompt = random.normal(0.5, 0.2, PROMPTS)
    return [prompt + random.normal(gain, 0.05, PROMPTS) for gain in (0.02, 0.0)]


def test_equal_evaluations_differ_by_exactly_nothing(rewards):
    curve = [evaluation(0, rewards[0], [0.0]), evaluation(1, rewards[1], [1.0])]
    for statistic in (reward_after, kl_after, reward_at_equal_kl):
        same = compare(statistic, curve, curve)
        assert (same.value, same.low, same.high, same.error) == (0, 0, 0, 0)
        assert not same.clear


def test_the_interval_of_a_mean_is_the_classical_one(rewards):
    one, other = rewards
    found = compare(reward_after, [evaluation(1, one, [0.0])], [evaluation(1, other, [0.0])])
    differences = one - other
    error = differences.std() / PROMPTS**0.5
    assert found.value == pytest.approx(differences.mean())
    assert found.error == pytest.approx(error, rel=0.06)
    assert found.low == pytest.approx(differences.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(differences.mean() + 1.96 * error, abs=0.15 * error)
    assert found.unpaired_error == pytest.approx(np.hypot(one.std(), other.std()) / PROMPTS**0.5, rel=0.06)
    assert found.error < 0.4 * found.unpaired_error
    assert found.prompts == PROMPTS
    assert found.clear
    assert found == compare(reward_after, [evaluation(1, one, [0.0])], [evaluation(1, other, [0.0])])
    assert found != compare(reward_after, [evaluation(1, one, [0.0])], [evaluation(1, other, [0.0])], seed=1)


def test_the_interval_turns_with_the_sign(rewards):
    one, other = ([evaluation(1, each, [0.0])] for each in rewards)
    forth, back = compare(reward_after, one, other), compare(reward_after, other, one)
    assert (back.value, back.low, back.high) == pytest.approx((-forth.value, -forth.high, -forth.low))


def test_rewards_are_compared_where_the_kls_are_equal(rewards):
    steep = [evaluation(step, 0.5 + 0.2 * kl * np.ones(PROMPTS), [kl]) for step, kl in enumerate((0.0, 0.5))]
    flat = [evaluation(step, 0.5 + 0.1 * kl * np.ones(PROMPTS), [kl]) for step, kl in enumerate((0.0, 0.4, 1.0))]
    assert compare(reward_at_equal_kl, steep, flat).value == pytest.approx(0.05)
    assert compare(reward_at_equal_kl, flat, steep).value == pytest.approx(-0.05)
    assert compare(reward_after, steep, flat).value == pytest.approx(0)
    assert compare(kl_after, steep, flat).value == pytest.approx(-0.5)


def test_the_spread_of_the_kl_is_part_of_the_interval():
    level = np.ones(PROMPTS)
    kls = np.random.default_rng(1).exponential(1.0, 64)
    one = [evaluation(0, 0.5 * level, 0 * kls), evaluation(1, 0.7 * level, kls)]
    other = [evaluation(0, 0.5 * level, 0 * kls), evaluation(1, 0.9 * level, 2 * kls[::-1])]
    known = [evaluation(each.step, each.rewards, [np.mean(each.kls)] * PROMPTS) for each in other]
    exact = [evaluation(each.step, each.rewards, [np.mean(each.kls)] * PROMPTS) for each in one]
    assert compare(reward_at_equal_kl, exact, known).error == pytest.approx(0)
    assert compare(reward_at_equal_kl, one, other).error > 0.005


def test_the_kl_is_that_of_the_first_prompts():
    one = [evaluation(1, np.zeros(PROMPTS), [1.0, 3.0])]
    other = [evaluation(1, np.zeros(PROMPTS), [0.0, 0.0])]
    assert compare(kl_after, one, other).value == 2
    assert reward_at([{"kl": 0.0, "reward": 0.2}, {"kl": 1.0, "reward": 0.4}], 0.5) == pytest.approx(0.3)
