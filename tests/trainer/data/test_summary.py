"""What became of a data set's rows: counts, lengths and a histogram."""

from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from tdpo.data.summary import Summary
from tdpo.data.tokenize import tokenize_rows
from tdpo.options import RowOptions

from helpers.token_rows import message

LIMITS = {"max_length": 60, "max_prompt_length": 20}
GOOD = {"prompt": "the film", "chosen": " great", "rejected": " bad"}
LONG_PROMPT, LONG_RESPONSE = {**GOOD, "prompt": "z" * 21}, {**GOOD, "chosen": " great" + "z" * 60}
EQUAL, EMPTY = {**GOOD, "rejected": " great"}, {**GOOD, "chosen": ""}


def summarize(rows, tokenizer, **options):
    return tokenize_rows(Dataset.from_list(rows), tokenizer, RowOptions(**LIMITS, **options))


def summary_of(lengths, **counts):
    """Of pairs with one token of prompt and these lengths in all."""
    responses = np.array(lengths) - 1
    counts = {"cut_prompts": 0, "cut_responses": 0, "context": 0, **counts}
    return Summary(
        len(lengths), Counter(), **counts, prompts=np.ones_like(responses), chosen=responses, rejected=responses
    )


def test_kept_dropped_and_cut_rows_are_counted(tokenizer):
    rows = [GOOD, GOOD, GOOD, EQUAL, EMPTY, EMPTY, LONG_PROMPT, LONG_RESPONSE, LONG_RESPONSE]
    encoded, summary = summarize(rows, tokenizer)
    assert (summary.rows, summary.pairs, len(encoded)) == (9, 6, 6)
    assert summary.dropped == {"equal responses": 1, "an empty 'chosen' response": 2}
    assert (summary.cut_prompts, summary.cut_responses, summary.context) == (1, 2, 0)
    for name in ("prompt", "chosen", "rejected"):
        lengths = {"prompt": summary.prompts, "chosen": summary.chosen, "rejected": summary.rejected}[name]
        assert lengths.tolist() == list(map(len, encoded[f"{name}_ids"]))


def test_rows_over_the_limits_are_counted_where_they_are_dropped(tokenizer):
    _, summary = summarize([GOOD, LONG_PROMPT, LONG_RESPONSE], tokenizer, overlong="drop")
    assert summary.dropped == {"a prompt over 20 tokens": 1, "prompt and 'chosen' response over 60 tokens": 1}
    assert (summary.pairs, summary.cut_prompts, summary.cut_responses) == (1, 0, 0)


@pytest.mark.parametrize("learned_turns", ["assistant", "all"])
def test_context_is_counted(learned_turns, chat_tokenizer):
    turns = [message("assistant", "a"), message("user", "b"), message("assistant", "c")]
    row = {"prompt": [message("user", "z")], "chosen": turns, "rejected": [message("assistant", "d")]}
    options = RowOptions(max_length=200, max_prompt_length=60, learned_turns=learned_turns)
    _, summary = tokenize_rows(Dataset.from_list([row]), chat_tokenizer, options)
    context = len(chat_tokenizer("[user]\nb<|end|>[assistant]\n")["input_ids"])
    assert summary.context == (context if learned_turns == "assistant" else 0)


def test_a_row_may_have_several_pairs(tokenizer):
    row = {"prompt": "the film", "responses": [" great", " good", " bad"], "scores": [3.0, 2.0, 1.0]}
    _, summary = summarize([row, row], tokenizer, pairing="all")
    assert (summary.rows, summary.pairs) == (2, 6)


def test_one_line(tokenizer):
    _, summary = summarize([GOOD, EQUAL, LONG_RESPONSE], tokenizer)
    line = str(summary)
    assert line.startswith("2 pairs of 3 rows; dropped 1: 1 with equal responses; cut responses: 1; tokens: prompt ")
    both = str(summary_of([9], cut_prompts=1234, cut_responses=2, context=5))
    assert "1 pairs of 1 rows; cut prompts: 1,234, responses: 2; 5 response tokens are context; tokens: " in both


def test_a_table_of_lengths():
    lines = summary_of([3, 5, 1001]).table().splitlines()
    assert [line.split() for line in lines] == [
        ["tokens", "shortest", "median", "longest"],
        ["prompt", "1", "1", "1"],
        ["chosen", "2", "4", "1,000"],
        ["rejected", "2", "4", "1,000"],
    ]


def bars(histogram):
    """The bins of a histogram as (begin, end, bar, pairs)."""
    found = []
    for line in histogram.splitlines()[1:]:
        *label, count = line.partition("  <-")[0].split()
        numbers = [int(part.replace(",", "")) for part in label if part[0].isdigit()]
        found.append((numbers[0], numbers[-1], "".join(part for part in label if "█" in part), int(count)))
    return found


@pytest.mark.parametrize("lengths", [[7], [5, 5, 6], [1, 9], range(2, 18), [90, 700, 701, 1024], [5] * 500 + [1000]])
def test_every_pair_is_in_one_bin_of_the_histogram(lengths):
    lengths = np.array(lengths)
    found = bars(summary_of(lengths).histogram())
    assert sum(count for *_, count in found) == len(lengths)
    assert 1 <= len(found) <= 9
    for begin, end, bar, count in found:
        assert count == np.count_nonzero((begin <= lengths) & (lengths <= end))
        assert bool(bar) == bool(count)  # even one pair of many is seen
    assert [end + 1 for _, end, *_ in found[:-1]] == [begin for begin, *_ in found[1:]]


def test_the_longer_response_counts():
    summary = summary_of([4, 4])
    summary.rejected = np.array([3, 30])
    assert [(begin, end, count) for begin, end, _, count in bars(summary.histogram())] == [
        (1, 4, 1),
        *((place, place + 3, 0) for place in range(5, 29, 4)),
        (29, 32, 1),
    ]


def test_max_length_is_marked():
    marked = [line for line in summary_of([90, 700, 1024]).histogram(1024).splitlines() if "<-" in line]
    assert len(marked) == 1
    assert marked[0].split()[:3] == ["897", "to", "1,024"]
    assert marked[0].endswith(" 1  <- max_length, 1,024")
    assert "<-" not in summary_of([90, 700]).histogram(1024)
