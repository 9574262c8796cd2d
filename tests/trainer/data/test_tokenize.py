"""Preference data in every form: prompts and responses as tokens, and what is too long."""

import functools

import pytest
from datasets import Dataset
from tdpo import tokenize_preferences
from tdpo.data.tokenize import padding_token
from tokenizers.processors import TemplateProcessing

from helpers import token_rows
from helpers.model_families import make_tokenizer
from helpers.token_rows import CHAT, END, message, texts

tokenize = functools.partial(token_rows.tokenize, max_length=60, max_prompt_length=30)


def test_tokenization(tokenizer):
    rows = Dataset.from_list([{"prompt": "the film was great", "chosen": " good fun", "rejected": " bad" * 50}])
    row = tokenize_preferences(rows, tokenizer, max_length=12, max_prompt_length=3)[0]
    prompt = tokenizer("the film was great")["input_ids"]
    assert row["prompt_ids"] == prompt[-3:]
    assert row["chosen_ids"] == [*tokenizer(" good fun")["input_ids"], tokenizer.eos_token_id]
    assert len(row["rejected_ids"]) == 9
    assert row["rejected_ids"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "chosen": "b"}], "rejected"),
        ([{"prompt": "a", "chosen": "", "rejected": "c"}], "chosen"),
    ],
)
def test_bad_data_is_named(rows, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        tokenize_preferences(Dataset.from_list(rows), tokenizer, 20, 10)


def test_tokenizer_without_an_end():
    with pytest.raises(ValueError, match="eos_token"):
        tokenize_preferences(
            Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]), make_tokenizer(eos=None), 20, 10
        )


def test_implicit_prompt(tokenizer):
    row = tokenize([{"chosen": "the film was great", "rejected": "the film was good fun"}], tokenizer)[0]
    assert texts(row, tokenizer) == ["the film was", " great<|end|>", " good fun<|end|>"]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("good fun", "bad plot"), ("\n\nHuman: a?\n\nAssistant: b", "\n\nHuman: c?\n\nAssistant: b")],
)
def test_nothing_is_shared(chosen, rejected, tokenizer):
    row = tokenize([{"chosen": chosen, "rejected": rejected}], tokenizer)[0]
    assert texts(row, tokenizer) == ["", chosen + END, rejected + END]


def test_transcripts(tokenizer):
    start = "\n\nHuman: the film?\n\nAssistant: good\n\nHuman: really?\n\nAssistant:"
    rows = [{"chosen": start + " good fun", "rejected": start + " good plot"}]
    row = tokenize(rows, tokenizer, max_length=200, max_prompt_length=150)[0]
    assert texts(row, tokenizer) == [start, " good fun<|end|>", " good plot<|end|>"]


GOOD_CHAT = {
    "prompt": [message("user", "the film?")],
    "chosen": [message("assistant", "great")],
    "rejected": [message("assistant", "bad")],
}


@pytest.mark.parametrize("explicit", [True, False])
def test_chat_messages(chat_tokenizer, explicit):
    prompt = [message("user", "the film?")]
    chosen, rejected = [message("assistant", "great")], [message("assistant", "bad")]
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if not explicit:
        row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    row = tokenize([row], chat_tokenizer)[0]
    assert texts(row, chat_tokenizer) == ["[user]\nthe film?<|end|>[assistant]\n", "great<|end|>", "bad<|end|>"]


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        (" good fun", " good fun<|end|>"),
        (" good<|end|> fun", " good<|end|> fun<|end|>"),  # an end token near the end does not end the text
        (" good fun<|end|>", " good fun<|end|>"),
        (" good fun<|end|>\n", " good fun<|end|>\n<|end|>"),
    ],
)
def test_the_end_of_plain_responses(text, closed, tokenizer):
    row = tokenize([{"prompt": "the film", "chosen": text, "rejected": " bad"}], tokenizer)[0]
    assert texts(row, tokenizer)[1] == closed


@pytest.mark.parametrize(
    ("closing", "closed"),
    [
        ("<|end|>", "great<|end|>"),
        ("<|end|>\n", "great<|end|>\n"),
        ("<|end|>\n \n", "great<|end|>\n \n"),
        ("\n", "great\n<|end|>"),
        ("", "great<|end|>"),
        ("<|end|>[over]", "great<|end|>[over]<|end|>"),
    ],
)
def test_what_a_template_closes_is_not_closed_twice(closing, closed):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT.replace("<|end|>", closing)
    row = {"chosen": [message("assistant", "great")], "rejected": [message("assistant", "bad")]}
    row = tokenize([{"prompt": [message("user", "the film?")], **row}], tokenizer)[0]
    assert texts(row, tokenizer)[1] == closed


@pytest.mark.parametrize("limit", range(14, 22))
def test_a_response_that_is_cut_is_closed_once(limit):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT.replace("<|end|>", "<|end|>\n\n\n")
    row = {"chosen": [message("assistant", "great fun")], "rejected": [message("assistant", "bad plot" * 9)]}
    row = tokenize([{"prompt": [message("user", "a")], **row}], tokenizer, max_length=limit, max_prompt_length=9)[0]
    for side in ("chosen", "rejected"):
        assert row[f"{side}_ids"].count(tokenizer.eos_token_id) == 1
        assert len(row["prompt_ids"]) + len(row[f"{side}_ids"]) <= limit


def with_special_tokens(before="", behind=""):
    """A tokenizer that puts special tokens around every text, as Llama's and T5's do."""
    tokenizer = make_tokenizer()
    names = [name for name in (before, behind) if name and name != END]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    template = " ".join(part for part in (before, "$A", behind) if part)
    pairs = [(name, tokenizer.convert_tokens_to_ids(name)) for name in (before, behind) if name]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=pairs)
    return tokenizer


def test_tokenizers_that_open_and_close_texts(chat_tokenizer):
    tokenizer = with_special_tokens("<s>", END)
    assert tokenizer.decode(tokenizer("good")["input_ids"]) == "<s>good<|end|>"
    row = tokenize([{"prompt": "the film", "chosen": " great", "rejected": " bad"}], tokenizer)[0]
    assert texts(row, tokenizer) == ["<s>the film", " great<|end|>", " bad<|end|>"]
    tokenizer.chat_template = "<s>" + CHAT
    row = {"chosen": [message("assistant", "great")], "rejected": [message("assistant", "bad")]}
    row = tokenize([{"prompt": [message("user", "film?")], **row}], tokenizer)[0]
    assert texts(row, tokenizer) == ["<s>[user]\nfilm?<|end|>[assistant]\n", "great<|end|>", "bad<|end|>"]


def test_a_prompt_may_end_within_the_answer(chat_tokenizer):
    prompt = [message("user", "film?"), message("assistant", "it was")]
    responses = {"chosen": [message("assistant", "great")], "rejected": [message("assistant", "bad")]}
    row = tokenize([{"prompt": prompt, **responses}], chat_tokenizer)[0]
    opened = "[user]\nfilm?<|end|>[assistant]\nit was"  # the message is left open; what follows it is the response's
    assert texts(row, chat_tokenizer) == [opened, *(f"<|end|>[assistant]\n{end}<|end|>" for end in ("great", "bad"))]


def test_one_text_begins_with_the_other(tokenizer):
    row = tokenize([{"chosen": "the film was great fun", "rejected": "the film was great"}], tokenizer)[0]
    assert texts(row, tokenizer) == ["the film was great", " fun<|end|>", "<|end|>"]


def test_templates_that_render_a_prompt_differently():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }} messages " + CHAT
    with pytest.raises(ValueError, match=r"row 0 .*renders the prompt differently"):
        tokenize([GOOD_CHAT], tokenizer)


def test_padding_token(tokenizer):
    assert padding_token(tokenizer) == tokenizer.eos_token_id
    own = with_special_tokens("<pad>")
    own.pad_token = "<pad>"
    assert padding_token(own) == own.convert_tokens_to_ids("<pad>") != own.eos_token_id


def test_tools_reach_the_template(chat_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if tools %}<{{ tools | length }} tools>{% endif %}" + CHAT
    row = {
        "prompt": [message("user", "a")],
        "chosen": [message("assistant", "b")],
        "rejected": [message("assistant", "c")],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    }
    assert texts(tokenize([row], tokenizer)[0], tokenizer)[0].startswith("<1 tools>")


def test_chat_messages_need_a_template(tokenizer):
    row = {"chosen": [message("assistant", "a")], "rejected": [message("assistant", "b")]}
    with pytest.raises(ValueError, match="chat template"):
        tokenize([row], tokenizer)


def test_dropped_rows_are_reported(tokenizer, caplog):
    good = {"prompt": "the film", "chosen": " great", "rejected": " bad"}
    rows = [
        good,
        {**good, "chosen": ""},
        {**good, "rejected": " great"},
        {**good, "prompt": "the film was" * 20},
        {**good, "chosen": " great" * 60},
    ]
    with caplog.at_level("WARNING"):
        kept = tokenize(rows, tokenizer, overlong="drop")
    assert kept["dataset_row"] == [0]
    for reason in ("dropped 4 of 5", "an empty 'chosen'", "equal responses", "a prompt over 30", "over 60 tokens"):
        assert reason in caplog.text
    assert len(tokenize(rows, tokenizer)) == 3  # truncated rows stay
    assert all(len(row["prompt_ids"]) + len(row["chosen_ids"]) <= 60 for row in tokenize(rows, tokenizer))


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_a_row_that_just_fits(overlong, tokenizer):
    row = {"prompt": "the film", "chosen": " great fun", "rejected": " bad"}
    whole = tokenize([row], tokenizer)[0]
    prompt, chosen = len(whole["prompt_ids"]), len(whole["chosen_ids"])
    limits = {"max_length": prompt + chosen, "max_prompt_length": prompt, "overlong": overlong}
    assert tokenize([row], tokenizer, **limits)[0] == whole
    limits["max_length"] -= 1
    if overlong == "drop":
        with pytest.raises(ValueError, match="no row of the dataset is left"):
            tokenize([row], tokenizer, **limits)
    else:
        assert tokenize([row], tokenizer, **limits)[0]["chosen_ids"] == [*whole["chosen_ids"][:-2], 0]


def test_many_dropped_rows_before_the_first_good_one(tokenizer):
    good = {"prompt": "the film", "chosen": " great", "rejected": " bad"}
    rows = [{**good, "chosen": " great" * 60}] * 1500 + [good]  # over a thousand: what datasets infers types from
    assert tokenize(rows, tokenizer, overlong="drop")["dataset_row"] == [1500]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": [{"role": None, "content": "the film?"}]}, "a message of 'prompt' has no 'role'"),
        ({"chosen": [{"role": "assistant", "content": None}]}, "a message of 'chosen' has no 'content'"),
        ({"rejected": [message("nobody", "bad")]}, "no such role"),
    ],
)
def test_malformed_chat_rows_are_named(change, reason):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
        + CHAT
    )
    with pytest.raises(ValueError, match=f"row 2 of the dataset: .*{reason}"):
        tokenize([GOOD_CHAT, GOOD_CHAT, {**GOOD_CHAT, **change}], tokenizer)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": 3, "rejected": 4}, "'chosen' is 3; it must be a text or a list"),
        ({"prompt": "a", "chosen": ["b"], "rejected": ["c"]}, r"'chosen' is \['b'\]; it must be"),
        ({"prompt": "a", "chosen": [{"content": "b"}], "rejected": [{"content": "c"}]}, "of 'chosen' has no 'role'"),
        ({"prompt": "a", "chosen": [message("assistant", "b")], "rejected": "c"}, "both be texts or both lists"),
        ({"prompt": 5, "chosen": "b", "rejected": "c"}, "'prompt' is 5; it must be"),
    ],
)
def test_malformed_rows_are_named(row, reason, chat_tokenizer):
    with pytest.raises(ValueError, match=f"row 0 of the dataset: .*{reason}"):
        tokenize([row], chat_tokenizer)


def test_a_tool_call_needs_no_text(chat_tokenizer):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "search"}]}
    row = {**GOOD_CHAT, "prompt": [message("user", "the film?"), call, message("tool", "four stars")]}
    row = tokenize([row], chat_tokenizer, max_length=150, max_prompt_length=100)[0]
    assert "[assistant]\n<|end|>[tool]\nfour stars" in texts(row, chat_tokenizer)[0]


def test_a_list_is_no_dataset(tokenizer):
    with pytest.raises(TypeError, match="the dataset is list"):
        tokenize_preferences([{"chosen": "a", "rejected": "b"}], tokenizer, 20, 10)


def test_an_empty_dataset_is_called_that(tokenizer):
    with pytest.raises(ValueError, match="the dataset is empty"):
        tokenize_preferences(Dataset.from_dict({"chosen": [], "rejected": []}), tokenizer, 20, 10)
