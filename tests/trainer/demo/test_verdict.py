"""What the demo says it found, for every way it can end, and which samples it shows."""

import dataclasses

import numpy as np
import pytest
from tdpo.demo.comparison import Difference
from tdpo.demo.evaluation import Evaluation
from tdpo.demo.examples import all_examples, differing
from tdpo.demo.results import Results
from tdpo.demo.verdict import outcome, prompts_needed

CLEAR = Difference(value=0.02, low=0.004, high=0.037, error=0.008, unpaired_error=0.02, prompts=384)
UNCLEAR = Difference(value=-0.002, low=-0.015, high=0.012, error=0.007, unpaired_error=0.02, prompts=100)


def evaluations(*rewards, kls=(0.0, 1.0)):
    """A method's evaluations at two steps or more: mean rewards, with equal noise for all methods."""
    noise = np.random.default_rng(0).normal(0, 0.2, 64)
    return [
        Evaluation(step, [f"{reward}"] * 64, list(reward + noise), [kl] * 4)
        for step, (reward, kl) in enumerate(zip(rewards, kls))
    ]


def test_a_clear_difference_is_said_with_its_interval():
    said = outcome("At equal KL", "TDPO2", "DPO", CLEAR)
    assert said == (
        "At equal KL TDPO2 earns more reward than DPO: +0.020 (95% interval +0.004 to +0.037; 384 prompts)."
    )
    worse = dataclasses.replace(CLEAR, value=-0.02, low=-0.037, high=-0.004)
    said = outcome("", "TDPO2", "DPO", worse)
    assert "TDPO2 earns less reward than DPO: -0.020 (95% interval -0.037 to -0.004" in said


def test_an_unclear_one_says_how_many_prompts_it_would_take():
    said = outcome("At equal KL", "TDPO2", "DPO", UNCLEAR)
    assert "cannot tell the reward of TDPO2 from that of DPO: -0.002 (95% interval -0.015 to +0.012; 100" in said
    assert prompts_needed(UNCLEAR) == 9600  # 100 x (2.8 x 0.007 / 0.002)^2 = 9,604
    assert "about 9,600 prompts" in said
    nothing = dataclasses.replace(UNCLEAR, value=0.0)
    assert "more than a million prompts" in outcome("", "TDPO2", "DPO", nothing)


def test_equal_policies_are_called_equal():
    equal = Difference(value=0.0, low=0.0, high=0.0, error=0.0, unpaired_error=0.02, prompts=8)
    assert "earn exactly the same: +0.000" in outcome("", "TDPO2", "DPO", equal)


@pytest.mark.parametrize(("tdpo2", "word"), [(0.7, "more"), (0.5, "less")])
def test_the_verdict_is_about_the_last_method_and_the_first(tdpo2, word):
    # At KL 0.5, where TDPO2 ends, DPO has 0.6.
    curves = {
        "dpo": evaluations(0.5, 0.7),
        "tdpo1": evaluations(0.5, 0.6),
        "tdpo2": evaluations(0.5, tdpo2, kls=(0.0, 0.5)),
    }
    said = Results(["a"] * 64, curves).verdict
    sign, after = ("+", "+0.000") if word == "more" else ("-", "-0.200")
    assert said.startswith(f"At equal KL (0.50 nats) TDPO2 earns {word} reward than DPO: {sign}0.100 (95% interval ")
    assert f"After the last step, TDPO2 minus DPO is {after} in reward" in said
    assert "-0.50 nats in KL (-0.50 to -0.50)" in said


def test_a_single_method_is_compared_with_the_start():
    results = Results(["a"] * 64, {"dpo": evaluations(0.5, 0.7)})
    assert results.verdict.startswith("After the last step DPO earns more reward than the start: +0.200")
    assert results.comparisons == []


def test_samples_whose_texts_differ_between_methods_come_first():
    texts = {"before": "abcd", "dpo": "axcx", "tdpo1": "axcy", "tdpo2": "axzz"}
    last = {name: Evaluation(1, list(text), [0.1 * i for i in range(4)], []) for name, text in texts.items()}
    examples = all_examples(["one", "two", "three", "four"], last)
    assert [example.prompt for example in examples] == ["four", "three", "two", "one"]
    assert differing(examples) == 2
    assert [each.names for each in examples[0].continuations] == [["before"], ["dpo"], ["tdpo1"], ["tdpo2"]]
    three = examples[1].continuations
    assert [(each.text, each.names) for each in three] == [("c", ["before", "dpo", "tdpo1"]), ("z", ["tdpo2"])]
    assert [each.reward for each in three] == [0.2, 0.2]
    assert examples[-1].continuations[0].names == ["before", "dpo", "tdpo1", "tdpo2"]
