"""The columns of tokenized preferences, and conversations that end where their prompt does."""

import pytest
from datasets import Dataset
from model_families import make_tokenizer
from tdpo import tokenize_preferences

END = 0
CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def tokenize(rows, **limits):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    limits = {"max_length": 90, "max_prompt_length": 60, **limits}
    return tokenizer, tokenize_preferences(Dataset.from_list(rows), tokenizer, **limits)


def ids(prompt, chosen, rejected):
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


@pytest.mark.parametrize(("chosen", "rejected"), [([5, 6, 7, END], [8, END]), ([5, END], [6, 7, 8, 9, END])])
def test_the_length_is_that_of_the_prompt_and_the_longer_response(chosen, rejected):
    _, tokens = tokenize([ids([1, 2, 3], chosen, rejected)])
    assert tokens["length"] == [3 + max(len(chosen), len(rejected))]
    _, cut = tokenize([ids([1, 2, 3], chosen, rejected)], max_length=5, max_prompt_length=2)
    assert cut["length"] == [2 + min(3, max(len(chosen), len(rejected)))]


def test_rows_that_are_left_know_where_they_stood_and_stand():
    _, tokens = tokenize([ids([1], [2], [2]), ids([1], [2], [3]), ids([1], [4], []), ids([1], [5], [6])])
    assert tokens["index"] == [1, 3]
    assert tokens["position"] == [0, 1]
    assert set(tokens.column_names) == {"prompt_ids", "chosen_ids", "rejected_ids", "index", "length", "position"}


def message(role, content):
    return {"role": role, "content": content}


ASKED, GREAT, BAD = message("user", "the film?"), message("assistant", "great"), message("assistant", "bad")
WHY = message("user", "really?")


@pytest.mark.parametrize(("longer", "shorter"), [("chosen", "rejected"), ("rejected", "chosen")])
@pytest.mark.parametrize("prompt", [None, [ASKED, GREAT]])
def test_a_conversation_that_is_its_prompt_keeps_a_response(longer, shorter, prompt):
    """Where one conversation ends with the last message of the other's beginning, that message is its response."""
    row = {longer: [ASKED, GREAT, WHY, BAD], shorter: [ASKED, GREAT]}
    tokenizer, tokens = tokenize([row if prompt is None else {**row, "prompt": prompt}])
    texts = {name: tokenizer.decode(tokens[0][f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")}
    assert texts == {
        "prompt": "[user] the film?<|end|>[assistant] ",
        shorter: "great<|end|>",
        longer: "great<|end|>[user] really?<|end|>[assistant] bad<|end|>",
    }


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("other", [message("system", "the film?"), message("user", "the film!")])
def test_a_prompt_that_one_response_does_not_repeat_is_left_in_both(side, other):
    """What is cut from one response alone would be lost; the repeated prompt is refused by the template instead."""
    row = {"prompt": [ASKED], "chosen": [ASKED, GREAT], "rejected": [ASKED, BAD]}
    row[side] = [other, row[side][1]]
    with pytest.raises(ValueError, match=r"row 0 .*renders the prompt differently"):
        tokenize([row])
