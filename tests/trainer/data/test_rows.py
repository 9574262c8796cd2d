"""Columns that accompany chat messages, whole conversations beside a prompt, and rows that are no preferences."""

import json

import pytest
from datasets import Dataset
from tdpo import load_preferences
from tdpo.data.tokenize import tokens_digest

from helpers.model_families import make_tokenizer
from helpers.token_rows import CHAT, message, texts, tokenize

ASKED, GREAT, BAD = message("user", "the film?"), message("assistant", "great"), message("assistant", "bad")
WHY = message("user", "really?")
ROW = {"prompt": [ASKED], "chosen": [GREAT], "rejected": [BAD]}
PROMPT = "[user]\nthe film?<|end|>[assistant]\n"


def whole_conversations(role):
    """A prompt's text beside conversations that another message begins."""
    first = message(role, "be brief")
    return {"prompt": "the film?", "chosen": [first, ASKED, GREAT], "rejected": [first, ASKED, BAD]}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (
            {"prompt": "the film?", "chosen": [ASKED, GREAT], "rejected": [ASKED, BAD]},
            PROMPT,
        ),  # UltraFeedback binarized
        ({"prompt": " the film?\n", "chosen": [GREAT], "rejected": [BAD]}, "[user]\n the film?\n<|end|>[assistant]\n"),
        ({"prompt": " the film?\n", "chosen": [ASKED, GREAT], "rejected": [ASKED, BAD]}, PROMPT),
        (whole_conversations("system"), "[system]\nbe brief<|end|>" + PROMPT),
        (whole_conversations("developer"), "[developer]\nbe brief<|end|>" + PROMPT),
        ({"prompt": [ASKED], "chosen": [ASKED, GREAT], "rejected": [ASKED, BAD]}, PROMPT),
        ({**ROW, "system": "be brief"}, "[system]\nbe brief<|end|>" + PROMPT),
        ({**ROW, "system": ""}, PROMPT),
        ({**ROW, "tools": json.dumps([{"name": "search"}])}, "<search>" + PROMPT),
        ({**ROW, "tools": [{"name": "search"}]}, "<search>" + PROMPT),
        ({**ROW, "tools": " "}, PROMPT),
        ({**ROW, "chat_template_kwargs": {"loud": True}}, "!" + PROMPT),
    ],
)
def test_forms(row, prompt, chat_tokenizer):
    row = tokenize([row], chat_tokenizer)[0]
    assert texts(row, chat_tokenizer) == [prompt, "great<|end|>", "bad<|end|>"]
    assert row["length"] == len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


@pytest.mark.parametrize(("longer", "shorter"), [("chosen", "rejected"), ("rejected", "chosen")])
@pytest.mark.parametrize("prompt", [None, [ASKED, GREAT]])
def test_a_conversation_that_is_its_prompt_keeps_a_response(longer, shorter, prompt, chat_tokenizer):
    """Where one conversation ends with the last message of the other's beginning, that message is its response."""
    row = {longer: [ASKED, GREAT, WHY, BAD], shorter: [ASKED, GREAT]}
    tokens = tokenize([row if prompt is None else {**row, "prompt": prompt}], chat_tokenizer)
    assert dict(zip(("prompt", "chosen", "rejected"), texts(tokens[0], chat_tokenizer))) == {
        "prompt": PROMPT,
        shorter: "great<|end|>",
        longer: "great<|end|>[user]\nreally?<|end|>[assistant]\nbad<|end|>",
    }


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("other", [message("system", "the film?"), message("user", "the film!")])
def test_a_prompt_that_one_response_does_not_repeat_is_left_in_both(side, other, chat_tokenizer):
    """What is cut from one response alone would be lost; the repeated prompt is refused by the template instead."""
    row = {"prompt": [ASKED], "chosen": [ASKED, GREAT], "rejected": [ASKED, BAD]}
    row[side] = [other, row[side][1]]
    with pytest.raises(ValueError, match=r"row 0 .*renders the prompt differently"):
        tokenize([row], chat_tokenizer)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a film?", "chosen": [ASKED, GREAT], "rejected": [ASKED, BAD]}, "don't share the 'prompt'"),
        ({**ROW, "prompt": [message("system", "a"), ASKED], "system": "be brief"}, "a system message of its own"),
        ({**ROW, "system": 5}, "'system' is 5; it must be a text"),
        (
            {"prompt": "a", "chosen": " b", "rejected": " c", "system": "d"},
            "'system' is given, but this row holds texts",
        ),
        ({**ROW, "tools": "[{"}, "'tools' is no valid JSON"),
        ({**ROW, "tools": '"search"'}, "'tools' is 'search'; it must be a list"),
        (
            {**ROW, "chosen": [message("assistant", 5)], "rejected": [message("assistant", 6)]},
            "of 'chosen' is 5; it must",
        ),
        ({**ROW, "prompt": [{"role": 1, "content": "a"}]}, "the 'role' of a message of 'prompt' is 1"),
        ({"prompt": [ASKED], "chosen": "a", "rejected": [BAD]}, "must both be texts or both lists"),
        ({"prompt": "a", "chosen": 0, "rejected": 1}, "'chosen' is 0; it must be"),
        ({**ROW, "prompt": [message("user", ["the film?"])]}, "the 'content' of a message of 'prompt' is"),
        (
            {**ROW, "prompt": [message("user", [{"type": "image", "text": None}, {"type": "text", "text": "b"}])]},
            "holds content of type 'image'; only text",
        ),
    ],
)
def test_malformed_rows_are_named(row, reason, chat_tokenizer):
    with pytest.raises(ValueError, match="row 0 of the dataset: .*" + reason):
        tokenize([row], chat_tokenizer)


@pytest.mark.parametrize("kind", ["image", "image_url", "video", "audio", "input_audio"])
def test_media_are_refused(kind, chat_tokenizer):
    parts = [{"type": "text", "text": "the film?"}, {"type": kind, "text": None}]
    with pytest.raises(ValueError, match=f"a message of 'prompt' holds content of type '{kind}'; only text"):
        tokenize([{**ROW, "prompt": [message("user", parts)]}], chat_tokenizer)


def test_texts_in_parts_reach_the_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT.replace("{{ m.content }}", "{{ m.content if m.content is string else 'parts' }}")
    row = {**ROW, "prompt": [message("user", [{"type": "text", "text": "the film?"}])]}
    assert texts(tokenize([row], tokenizer)[0], tokenizer)[0] == "[user]\nparts<|end|>[assistant]\n"


def test_templates_that_trim_the_space_before_a_response():
    tokenizer = make_tokenizer()
    answer = "{% if m.role == 'assistant' %}[assistant]{% else %}[{{ m.role }}]\n{% endif %}"
    tokenizer.chat_template = CHAT.replace("[{{ m.role }}]\n", answer)
    assert texts(tokenize([ROW], tokenizer)[0], tokenizer) == [PROMPT.rstrip(), "great<|end|>", "bad<|end|>"]


def test_null_responses_are_dropped_and_null_messages_named(chat_tokenizer, caplog):
    with caplog.at_level("WARNING"):
        kept = tokenize([ROW, {**ROW, "chosen": None}], chat_tokenizer)
    assert kept["dataset_row"] == [0]
    assert "1 with an empty 'chosen' response" in caplog.text
    with pytest.raises(ValueError, match="row 1 of the dataset: 'rejected' is "):
        tokenize([ROW, {**ROW, "rejected": [None]}], chat_tokenizer)


def test_responses_that_truncation_makes_equal_are_called_that(tokenizer, caplog):
    rows = [
        {"prompt": "the film", "chosen": " good" * 30 + " fun", "rejected": " good" * 30 + " end"},
        {"prompt": "the film", "chosen": " good", "rejected": " good"},
        {"prompt": "the film", "chosen": " good", "rejected": " bad"},
    ]
    with caplog.at_level("WARNING"):
        assert tokenize(rows, tokenizer, max_length=20, max_prompt_length=10)["dataset_row"] == [2]
    assert "1 with equal responses" in caplog.text
    assert "1 with responses that are equal once cut to max_length, 20 tokens" in caplog.text


def test_processes_share_the_work(chat_tokenizer, monkeypatch):
    processes, map_rows = [], Dataset.map

    def recorded(dataset, *arguments, **options):
        processes.append(options.get("num_proc"))
        return map_rows(dataset, *arguments, **options)

    monkeypatch.setattr(Dataset, "map", recorded)
    rows = [{**ROW, "prompt": [message("user", "the film" * (i % 3))]} for i in range(8)]
    alone = tokenize(rows, chat_tokenizer)
    assert tokenize(rows, chat_tokenizer, num_proc=2).to_list() == alone.to_list()
    assert processes == [None, 2]
    with pytest.raises(ValueError, match=r"row 7 of the dataset: .*'tools'"):
        tokenize([*({**row, "tools": ""} for row in rows[:7]), {**ROW, "tools": "["}], chat_tokenizer, num_proc=2)


def test_the_digest_of_tokens(chat_tokenizer):
    rows = [{**ROW, "prompt": [message("user", "the film" * (i % 3))]} for i in range(8)]
    dataset = tokenize(rows, chat_tokenizer)
    assert tokens_digest(dataset.select([0, 2, 1, 3])) != tokens_digest(dataset.select(range(4)))
    assert tokens_digest(dataset.select([5, 6]).flatten_indices()) == tokens_digest(dataset.select([5, 6]))

    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):  # as many tokens, one of them another
        changed = dataset.map(lambda row, name=name: {name: [*row[name][:-1], row[name][-1] + 1]})
        assert tokens_digest(changed) != tokens_digest(dataset), name

    def moved(row):  # the same tokens, of which the prompt has one more
        prompt, chosen = row["prompt_ids"], row["chosen_ids"]
        return {"prompt_ids": [*prompt, chosen[0]], "chosen_ids": chosen[1:]}

    assert tokens_digest(dataset.map(moved)) != tokens_digest(dataset)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", '{"chosen": "a", "rejected": "b"}\n{"chosen": "a", "rejected"\n', "line 2, column 27"),
        ("a.json", '[{"chosen": "a",\n "rejected": b}]', "line 2, column 14"),
        ("a.jsonl", " \n", "the file is empty"),
        ("a.json", "", "the file is empty"),
    ],
)
def test_malformed_json_is_located(name, content, reason, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}.* could not be loaded: {reason}") as caught:
        load_preferences(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("nothing", [{"content": ""}, {"content": None, "name": None, "tool_calls": []}])
def test_messages_that_say_nothing_are_dropped(nothing, implicit, chat_tokenizer, caplog):
    silent = {"role": "assistant", **nothing}
    asked = [ASKED] if implicit else []
    rows = [
        {"prompt": None if implicit else [ASKED], "chosen": [*asked, answer], "rejected": [*asked, BAD]}
        for answer in (GREAT, silent)
    ]
    with caplog.at_level("WARNING"):
        kept = tokenize(rows, chat_tokenizer)
    assert kept["dataset_row"] == [0]
    assert "1 with an empty 'chosen' response" in caplog.text


def test_a_response_that_nothing_predicts_is_dropped(tokenizer, caplog):
    rows = [{"prompt_ids": prompt, "chosen_ids": [5], "rejected_ids": [6, 7]} for prompt in ([1], [])]
    with caplog.at_level("WARNING"):
        kept = tokenize(rows, tokenizer)
    assert kept["dataset_row"] == [0]
    assert "1 with a response of one token without a prompt, which nothing predicts" in caplog.text


def test_nulls_of_a_table_reach_no_template():
    """Columns of a table have one type: rows get nulls for what only others have, in messages, calls and tools."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson if tools }}{% for m in messages %}{{ m | tojson }} {% endfor %}"
    call = {"type": "function", "function": {"name": "stars", "arguments": {"film": "it"}}}
    tools = [{"type": "function", "function": {"name": "stars", "parameters": {"type": "object"}}}]
    asked = {"role": "user", "content": "the film?"}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    other = {**called, "tool_calls": [{"function": {"name": "year", "arguments": {"year": 1}}, "id": "a"}]}
    rows = [
        {"prompt": [asked], "chosen": [called], "rejected": [BAD], "tools": tools},
        {"prompt": [{**asked, "name": "me"}], "chosen": [other], "rejected": [BAD], "tools": []},
    ]
    row = tokenize(rows, tokenizer, max_length=2000, max_prompt_length=1000)[0]
    text = tokenizer.decode(row["prompt_ids"] + row["chosen_ids"])
    assert "null" not in text.replace('"content": null', "")
    assert '"arguments": {"film": "it"}' in text
