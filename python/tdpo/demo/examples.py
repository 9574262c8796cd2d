"""Which of the judged samples are shown: first those whose texts differ between the methods."""

from __future__ import annotations

from typing import NamedTuple

from .evaluation import Evaluation


class Continuation(NamedTuple):
    text: str
    reward: float
    names: list[str]  # "before" and the methods that wrote exactly this


class Example(NamedTuple):
    """A prompt and what was written after it, each text once."""

    prompt: str
    continuations: list[Continuation]


def all_examples(prompts: list[str], last: dict[str, Evaluation]) -> list[Example]:
    """Every prompt with its distinct continuations, those with most of them first; else in the order of the prompts.

    Args:
        last: the evaluations of "before" and of every method after its last step.
    """
    examples = []
    for index, prompt in enumerate(prompts):
        groups: dict[str, Continuation] = {}
        for name, evaluation in last.items():
            text = evaluation.texts[index]
            groups.setdefault(text, Continuation(text, evaluation.rewards[index], [])).names.append(name)
        examples.append(Example(prompt, list(groups.values())))
    return sorted(examples, key=lambda example: (-_written_by_methods(example), -len(example.continuations)))


def differing(examples: list[Example]) -> int:
    """Of how many prompts the methods' texts are not all the same."""
    return sum(_written_by_methods(example) > 1 for example in examples)


def _written_by_methods(example: Example) -> int:
    """The number of distinct texts, without the one that only the start wrote."""
    return sum(any(name != "before" for name in continuation.names) for continuation in example.continuations)
