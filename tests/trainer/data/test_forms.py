"""Rows in the forms that data sets have, under whatever names."""

import json

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from tdpo import tokenize_preferences
from tdpo.data.forms import column_mapping

from helpers.model_families import make_tokenizer
from helpers.token_rows import END, message, texts, tokenize

ASKED, GREAT, BAD = message("user", "the film?"), message("assistant", "great"), message("assistant", "bad")
ROW = {"prompt": [ASKED], "chosen": [GREAT], "rejected": [BAD]}
TEXTS = {"prompt": "the film?", "chosen": " great", "rejected": " bad"}


def shared(speaker, text):
    return {"from": speaker, "value": text}


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [shared("human", "the film?")], "chosen": shared("gpt", "great"), "rejected": BAD},
        {"conversations": [shared("user", "the film?")], "chosen": [shared("gpt", "great")], "rejected": [BAD]},
        {"prompt": [shared("human", "the film?")], "chosen": "great", "rejected": "bad"},
        {"prompt": [ASKED], "chosen": "great", "rejected": "bad"},
        {"prompt": ASKED, "chosen": GREAT, "rejected": BAD},
        {name: json.dumps(messages) for name, messages in ROW.items()},
        {name: json.dumps(messages, indent=1) for name, messages in ROW.items()},
        {"chosen": json.dumps([ASKED, GREAT]), "rejected": json.dumps([ASKED, BAD])},
        {"chosen": [shared("human", "the film?"), shared("gpt", "great")], "rejected": [ASKED, BAD]},
        {"chosen": [{**ASKED, "id": 1}, GREAT], "rejected": [{**ASKED, "id": 2}, BAD]},
        {**ROW, "chosen": json.dumps(GREAT), "rejected": json.dumps(shared("gpt", "bad"))},
        {**ROW, "chosen": json.dumps([{"id": 5, **GREAT}]), "rejected": json.dumps([BAD], indent=20)},
        {**ROW, "prompt": [{**shared("human", "the film?"), "role": None, "content": None}]},
        {**ROW, "chat_template_kwargs": '{"loud": false}', "tools": "[]"},
        {"prompt": "the film?", "chosen": [GREAT], "rejected": [BAD], "source": "a review", "score": 5},
        {**ROW, "images": [], "image": None},
    ],
)  # fmt: skip
def test_messages(row, chat_tokenizer):
    kept = tokenize([row], chat_tokenizer)[0]
    assert texts(kept, chat_tokenizer) == ["[user]\nthe film?<|end|>[assistant]\n", "great<|end|>", "bad<|end|>"]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "the film?", "input": "", **TEXTS, "prompt": None}, "the film?"),
        (
            {"instruction": "Sum up.", "input": "the film", "chosen": " great", "rejected": " bad"},
            "Sum up.\n\nthe film",
        ),
        ({"instruction": "Sum up.", "history": [], "system": "", "chosen": " great", "rejected": " bad"}, "Sum up."),
    ],
)
def test_instructions(row, prompt, tokenizer):
    kept = tokenize([row], tokenizer)[0]
    assert texts(kept, tokenizer) == [prompt, " great" + END, " bad" + END]


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "question", "chosen": "best", "rejected": "worst"},
        "prompt=question,chosen=best,rejected=worst",
        " prompt = question, chosen=best ,rejected=worst",
        '{"prompt": "question", "chosen": "best", "rejected": "worst"}',
    ],
)
def test_columns_under_other_names(columns, tokenizer):
    row = {"question": "the film?", "best": " great", "worst": " bad", "prompt": "no", "chosen": "no", "rejected": "no"}
    for given in (row, {name: row[name] for name in ("question", "best", "worst")}):
        kept = tokenize([given], tokenizer, columns=column_mapping(columns))[0]
        assert texts(kept, tokenizer) == ["the film?", " great" + END, " bad" + END]
    with pytest.raises(ValueError, match="takes 'prompt' from 'question', which the dataset lacks; it has prompt"):
        tokenize([TEXTS], tokenizer, columns=column_mapping(columns))


def test_names_of_other_forms_are_mapped_too(tokenizer):
    row = {"query": "Sum up.", "context": "the film", "answers": [" bad", " great"], "votes": [1, 9]}
    columns = {"instruction": "query", "input": "context", "responses": "answers", "scores": "votes"}
    kept = tokenize([row], tokenizer, columns=columns)[0]
    assert texts(kept, tokenizer) == ["Sum up.\n\nthe film", " great" + END, " bad" + END]
    row = {"p": [5, 6], "c": [7], "r": [8], "w": [0.5], "v": [1.0]}
    columns = {"prompt_ids": "p", "chosen_ids": "c", "rejected_ids": "r", "chosen_weight": "w", "rejected_weight": "v"}
    kept = tokenize([row], tokenizer, columns=columns, token_columns=("weight",))[0]
    assert (kept["prompt_ids"], kept["chosen_weight"], kept["rejected_weight"]) == ([5, 6], [0.5], [1.0])


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"promt": "question"}, "columns maps 'promt', which no row reads"),
        ({"prompt": "question", "rejected": "chosen"}, "takes 'rejected' from 'chosen', which is a column of its own"),
        ({"prompt": "questions"}, "columns takes 'prompt' from 'questions', which the dataset lacks; it has question,"),
    ],
)
def test_mappings_of_nothing_are_refused(columns, error, tokenizer):
    row = {"question": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(ValueError, match=error):
        tokenize([row], tokenizer, columns=columns)


@pytest.mark.parametrize("columns", ["question", "prompt=a,b", '{"prompt": ', ["prompt"], {"prompt": 5}, 5])
def test_what_is_no_mapping_is_refused(columns):
    with pytest.raises((TypeError, ValueError), match="columns is "):
        column_mapping(columns)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "the film?", "chosen": " great", "rejected": " bad"},
        {"question": "the film?", "chosen": "it is great", "rejected": "it is bad"},  # no prompt, though both begin so
        {"question": "the film?", "chosen": [GREAT], "rejected": [BAD]},
        {"messages": [ASKED], "chosen": [GREAT], "rejected": [BAD]},
        {"prompt": None, "question": "the film?", "chosen": " great", "rejected": " bad"},
    ],
)
def test_texts_that_stand_unused_are_named(row, chat_tokenizer):
    (name,) = row.keys() & {"question", "messages"}
    expected = f"row 0 .* its texts '{name}' stand unused: .*columns={{'prompt': '{name}'}}"
    with pytest.raises(ValueError, match=expected):
        tokenize([row], chat_tokenizer)
    if isinstance(row["chosen"], str):
        kept = tokenize([row], chat_tokenizer, columns={"prompt": None})[0]  # as said to have none
        assert texts(kept, chat_tokenizer)[0] in ("", "it is")
    kept = tokenize([row], chat_tokenizer, columns={"prompt": name})[0]
    assert "the film?" in texts(kept, chat_tokenizer)[0]


def test_conversations_need_no_other_prompt(chat_tokenizer):
    chats = {"chosen": [ASKED, GREAT], "rejected": [ASKED, BAD], "source": "a review"}
    transcripts = {side: f"\n\nHuman: a?\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    assert len(tokenize([chats], chat_tokenizer)) == len(tokenize([{**transcripts, "id": "x"}], chat_tokenizer)) == 1


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({**TEXTS, "instruction": "a"}, "'prompt' and 'instruction' hold a prompt; .*columns={'prompt': 'prompt'}"),
        ({"instruction": "a", "history": [["b", "c"]], "chosen": "d", "rejected": "e"}, "'history' is given"),
        (
            {"instruction": "a", "input": 5, "chosen": "d", "rejected": "e"},
            "'instruction' is 'a', 'input' 5: not texts",
        ),
        ({**ROW, "prompt": [shared("bing", "a")]}, "a message of 'prompt' is from 'bing'; known are human"),
        ({**ROW, "chosen": '[{"role": "assistant", "content": "great"'}, "'chosen' begins like chat messages as JSON"),
        ({**ROW, "chosen": str([GREAT])}, "'chosen' begins like chat messages as JSON"),
        ({**ROW, "chosen": str(GREAT)}, "'chosen' begins like chat messages as JSON"),
        ({**TEXTS, "tools": [{"name": "a"}]}, "'tools' is given, but this row holds texts"),
        (
            {**TEXTS, "chat_template_kwargs": {"loud": True}},
            "'chat_template_kwargs' is given, but this row holds texts",
        ),
        ({**ROW, "chat_template_kwargs": "["}, "'chat_template_kwargs' is no valid JSON"),
        ({**ROW, "chat_template_kwargs": "[1]"}, "'chat_template_kwargs' is .*; it must be a mapping"),
        (
            {**ROW, "chat_template_kwargs": {"add_generation_prompt": True}},
            ".* has 'add_generation_prompt'",
        ),
        ({**TEXTS, "history": [["a", "b"]]}, "'history' is given, which no row reads"),
        ({"prompt": "a", "chosen": "b", "responses": None}, "it has no 'rejected', and no 'responses'"),
        ({"prompt": None, "chosen": [GREAT], "rejected": [BAD]}, "it has no prompt: messages of a response need some"),
        ({**ROW, "prompt": [message("user", [{"type": "file", "text": "a"}])]}, ".* content of type 'file'; only text"),
        ({**ROW, "images": ["a.png"]}, "'images' holds media; only text"),
        ({**ROW, "video": "a.mp4"}, "'video' holds media; only text"),
    ],
)
def test_contradictions_are_named(row, error, chat_tokenizer):
    with pytest.raises(ValueError, match="row 0 of the dataset: " + error):
        tokenize([row], chat_tokenizer)


def test_an_instruction_that_is_mapped_would_lose_its_input(tokenizer):
    row = {"instruction": "Sum up.", "input": "the film", "chosen": " a", "rejected": " b"}
    with pytest.raises(ValueError, match="so 'input' would be lost"):
        tokenize([row], tokenizer, columns={"prompt": "instruction"})


@pytest.mark.parametrize(
    "text",
    ['[{"role": "engineer", "content": "Ann"}]', '{"name": "Ann"}', "[1, 2]", "{not JSON", '["a", {"role": "user"}]'],
)
def test_texts_that_are_no_messages_stay_texts(text, tokenizer):
    row = {"prompt": "List the staff: ", "chosen": text, "rejected": " nobody"}
    assert texts(tokenize([row], tokenizer)[0], tokenizer)[1] == text + END


def test_what_a_template_runs_into_names_the_row(tokenizer):
    failing = make_tokenizer()
    failing.chat_template = "{{ messages[0].content + 5 }}"
    with pytest.raises(
        ValueError, match="row 0 of the dataset: the tokenizer's chat template can't render its messages"
    ):
        tokenize([ROW], failing)


def test_rows_of_token_ids_have_one_pair(tokenizer):
    row = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7], "responses": ["a", "b"], "scores": [1, 2]}
    assert len(tokenize([row], tokenizer, pairing="all")) == 1


def test_the_advice_about_two_prompts_works(tokenizer):
    row = {**TEXTS, "instruction": "a"}
    assert texts(tokenize([row], tokenizer, columns={"prompt": "prompt"})[0], tokenizer)[0] == "the film?"
    assert texts(tokenize([row], tokenizer, columns={"prompt": "instruction"})[0], tokenizer)[0] == "a"


def test_columns_of_images_are_refused(tokenizer):
    features = Features({**{name: Value("string") for name in TEXTS}, "photo": Image()})
    dataset = Dataset.from_list([{**TEXTS, "photo": None}], features=features)
    with pytest.raises(ValueError, match="the column 'photo' holds media"):
        tokenize_preferences(dataset, tokenizer, 100, 50)


@pytest.mark.parametrize("form", ["texts", "messages", "ids", "ranked"])
@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow", "pandas", "python", "columns"])
def test_formats_change_nothing(kind, form, chat_tokenizer):
    rows = {
        "texts": [TEXTS] * 2,
        "messages": [ROW] * 2,
        "ids": [{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}] * 2,
        "ranked": [{"prompt": "the film?", "responses": [" a", " b", " c"], "scores": [1.0, 2.0, 3.0]}] * 2,
    }[form]
    dataset = Dataset.from_list(rows)
    expected = tokenize_preferences(dataset, chat_tokenizer, 100, 50).to_list()
    formatted = dataset.with_format("torch", columns=["prompt"] if "prompt" in rows[0] else ["prompt_ids"])
    if kind != "columns":
        formatted = dataset.with_format(kind)
    kept = tokenize_preferences(formatted, chat_tokenizer, 100, 50)
    assert kept.to_list() == expected
    assert isinstance(kept[0]["prompt_ids"], list)


def test_a_transform_is_what_the_rows_are(tokenizer):
    dataset = Dataset.from_dict({"number": np.arange(3)})
    made = dataset.with_transform(lambda rows: {name: [text] * len(rows["number"]) for name, text in TEXTS.items()})
    kept = tokenize_preferences(made, tokenizer, 100, 50)
    assert [texts(row, tokenizer) for row in kept.to_list()] == [["the film?", " great" + END, " bad" + END]] * 3
