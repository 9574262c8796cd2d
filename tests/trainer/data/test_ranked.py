"""Pairs of several scored or ranked responses."""

import json

import pytest
from tdpo.data.ranked import pairs_of

from helpers.token_rows import message, texts, tokenize

RESPONSES = ["a", "b", "c", "d"]
SCORES = [2, 4, 1, 3]  # b, d, a, c


def said(row, pairing, limit=None):
    return [pair["chosen"] + pair["rejected"] for pair in pairs_of(row, pairing, limit)]


@pytest.mark.parametrize(
    ("pairing", "limit", "expected"),
    [
        ("best_worst", None, ["bc"]),
        ("best_others", None, ["bd", "ba", "bc"]),
        ("best_others", 2, ["bc", "ba"]),
        ("adjacent", None, ["bd", "da", "ac"]),
        ("all", None, ["bd", "ba", "bc", "da", "dc", "ac"]),
        ("all", 3, ["bc", "ba", "dc"]),
        ("all", 9, ["bc", "ba", "dc", "bd", "da", "ac"]),
    ],
)
@pytest.mark.parametrize("form", ["scores", "ranks", "entries with scores", "entries with ranks", "JSON", "strings"])
def test_rules_and_counts(form, pairing, limit, expected):
    row = {"prompt": "p", "responses": RESPONSES, "scores": SCORES}
    ranks = [3, 1, 4, 2]
    if form == "ranks":
        row = {"responses": RESPONSES, "ranks": ranks}
    elif form == "entries with scores":
        row = {"responses": [{"response": a, "overall_score": b, "model": "m"} for a, b in zip(RESPONSES, SCORES)]}
    elif form == "entries with ranks":
        row = {"responses": [{"answer": a, "rank": b} for a, b in zip(RESPONSES, ranks)]}
    elif form == "JSON":
        row = {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
    elif form == "strings":
        row["scores"] = list(map(str, SCORES))
    assert said(row, pairing, limit) == expected


@pytest.mark.parametrize(
    ("scores", "pairing", "expected"),
    [
        ([5, 5, 3, 3], "best_worst", ["ad"]),
        ([5, 5, 3, 3], "adjacent", ["bc"]),
        ([5, 5, 3, 3], "all", ["ac", "ad", "bc", "bd"]),
        ([5, 5, 3, 3], "best_others", ["ac", "ad"]),
        ([1, 1, 1, 1], "all", []),
    ],
)
def test_equal_scores_make_no_pair(scores, pairing, expected):
    assert said({"responses": RESPONSES, "scores": scores}, pairing) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"responses": ["a", "b"]}, "neither scores nor ranks"),
        ({"responses": ["a", "b"], "scores": [1, 2], "ranks": [1, 2]}, "both scores and ranks"),
        ({"responses": ["a", "b"], "scores": [1]}, "'responses' has 2 entries, 'scores' has 1"),
        ({"responses": ["a", "b"], "scores": [1, None]}, "'scores' holds None; it must hold finite numbers"),
        ({"responses": ["a", "b"], "scores": [1, float("nan")]}, "'scores' holds nan"),
        ({"responses": ["a", "b"], "ranks": ["first", 2]}, "'ranks' holds 'first'"),
        ({"responses": "a", "scores": [1]}, "'responses' is a text, but no list as JSON"),
        ({"responses": 5, "scores": [1]}, "'responses' is 5; it must be a list"),
        ({"responses": [{"said": "a", "score": 1}]}, "exactly one of response, answer"),
    ],
)
def test_what_cannot_be_ranked_is_named(row, reason):
    with pytest.raises(ValueError, match=reason):
        pairs_of(row, "all", None)


@pytest.mark.parametrize("messages", [False, True])
def test_rows_become_several_pairs(messages, chat_tokenizer, caplog):
    responses = [[message("assistant", text)] if messages else text for text in ("good fun", "bad", "awful")]
    prompt = [message("user", "the film?")] if messages else "the film?"
    rows = [
        {"prompt": prompt, "responses": responses, "scores": [1.0, 1.0, 1.0]},
        {"prompt": prompt, "responses": responses, "scores": [3.0, 2.0, 1.0]},
        {"prompt": prompt, "responses": ["", "b", "c"] if not messages else responses, "scores": [0.0, 5.0, 6.0]},
    ]
    with caplog.at_level("WARNING"):
        kept = tokenize(rows, chat_tokenizer, pairing="all")
    assert kept["dataset_row"][:3] == [1, 1, 1]
    assert kept["token_row"] == list(range(len(kept)))
    assert [texts(row, chat_tokenizer)[1:] for row in kept.to_list()[:3]] == [
        ["good fun<|end|>", "bad<|end|>"],
        ["good fun<|end|>", "awful<|end|>"],
        ["bad<|end|>", "awful<|end|>"],
    ]
    assert "1 with no response that is better than another" in caplog.text
    if not messages:
        assert "2 with an empty 'rejected' response" in caplog.text
