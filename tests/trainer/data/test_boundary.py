"""The tokens are the conversation's: prompt and response are tokenized together, for every tokenizer and template."""

import pytest
from datasets import Dataset
from tdpo import tokenize_preferences

from helpers.chat_tokenizers import TEMPLATES, TOKENIZERS, byte_level
from helpers.model_families import make_tokenizer

CHOSEN, REJECTED = "yes, good fun", "<think>\nboring\n</think>\n\nno"
MESSAGES = [{"role": "user", "content": "what is it?"}]


def tokenized(row, tokenizer, **limits):
    limits = {"max_length": 400, "max_prompt_length": 200, **limits}
    return tokenize_preferences(Dataset.from_list([row]), tokenizer, **limits)[0]


def check_whole(row, tokenizer, wholes, closed=True):
    """The row's tokens are those of the wholes, and an end token behind those that are not closed."""
    for side, whole in wholes.items():
        ids = row["prompt_ids"] + row[f"{side}_ids"]
        assert ids == (whole if closed else [*whole, tokenizer.eos_token_id])


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_messages(name, template, begins):
    tokenizer = TOKENIZERS[name](begins)
    tokenizer.chat_template = TEMPLATES[template]
    answers = {"chosen": CHOSEN, "rejected": REJECTED}
    responses = {side: [{"role": "assistant", "content": text}] for side, text in answers.items()}
    row = tokenized({"prompt": MESSAGES, **responses}, tokenizer)
    wholes = {
        side: tokenizer.apply_chat_template([*MESSAGES, *response], tokenize=True, return_dict=False)
        for side, response in responses.items()
    }
    check_whole(row, tokenizer, wholes, closed=template != "plain words")
    # The response is learned from its first word on, and nothing of the question is.
    asked = tokenizer.decode(row["prompt_ids"]).replace(" ", "")
    assert "whatisit?" in asked
    for side, answer in answers.items():
        decoded = tokenizer.decode(row[f"{side}_ids"]).replace(" ", "")
        assert "whatisit?" not in decoded
        assert answer.split("\n")[-1].replace(" ", "") in decoded


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("question:", "yes", "no"),
        ("question: ", "yes", "no"),
        ("question:", " yes", " no"),
        ("the film was gr", "eat", "im"),  # within a word
        ("the film was", "", " bad"),
        ("", "good fun", "boring"),
    ],
)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts(name, prompt, chosen, rejected, begins):
    tokenizer = TOKENIZERS[name](begins)
    if not chosen:
        chosen = " good"
    row = tokenized({"prompt": prompt, "chosen": chosen, "rejected": rejected}, tokenizer)
    check_whole(row, tokenizer, {"chosen": tokenizer(prompt + chosen)["input_ids"]}, closed=False)
    check_whole(row, tokenizer, {"rejected": tokenizer(prompt + rejected)["input_ids"]}, closed=False)
    assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == tokenizer.eos_token_id


def test_a_token_that_spans_the_boundary_is_the_responses():
    tokenizer = make_tokenizer()
    row = tokenized({"prompt": "the film was ", "chosen": "great", "rejected": "bad"}, tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "the film was"
    assert tokenizer.decode(row["chosen_ids"]) == " great<|end|>"
    assert tokenizer.decode(row["rejected_ids"]) == " bad<|end|>"


def test_a_slow_tokenizer_splits_where_the_tokens_differ(monkeypatch):
    fast = make_tokenizer()
    row = {"prompt": "the film was ", "chosen": "great", "rejected": "bad"}
    expected = tokenized(row, fast)
    slow = make_tokenizer()
    monkeypatch.setattr(type(slow), "is_fast", False)
    assert tokenized(row, slow) == expected


@pytest.mark.parametrize("begins", [False, True])
def test_a_cut_prompt_keeps_its_beginning_token(begins):
    tokenizer = byte_level(begins)
    row = {"prompt": "the film was great and the acting superb", "chosen": " yes", "rejected": " no"}
    whole, cut = (tokenized(row, tokenizer, max_prompt_length=length)["prompt_ids"] for length in (200, 4))
    assert len(whole) > 6
    assert cut == ([whole[0], *whole[-3:]] if begins else whole[-4:])
