"""A response of several turns is learned on the assistant's turns alone."""

import re
from pathlib import Path

import pytest
import torch
import trl
from tdpo.data.collator import PreferenceCollator, Sequence
from tdpo.data.conversation import ConversationTokenizer

from helpers.chat_tokenizers import TEMPLATES, TOKENIZERS, byte_level
from helpers.model_families import make_tokenizer
from helpers.token_rows import CHAT, END, message, tokenize

QUESTION = message("user", "what is it?")
ANSWERS = ["yes, good fun", "great acting", "the plot"]
CHOSEN = [message("assistant", ANSWERS[0]), message("user", "why the end?"), message("assistant", ANSWERS[1])]
CHOSEN += [message("user", "really so bad?"), message("assistant", ANSWERS[2])]
REJECTED = [message("assistant", "boring")]
ROW = {"prompt": [QUESTION], "chosen": CHOSEN, "rejected": REJECTED}
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encoded(row, tokenizer, **options):
    return tokenize([row], tokenizer, **{"max_length": 600, "max_prompt_length": 200, **options})[0]


def runs(row, side):
    """The stretches of a response's tokens that are learned."""
    found, inside = [], False
    for token, learned in zip(row[f"{side}_ids"], row[f"{side}_mask"]):
        if learned and not inside:
            found.append([])
        if learned:
            found[-1].append(token)
        inside = learned
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_turns_of_the_assistant_alone_are_learned(template, name):
    tokenizer = TOKENIZERS[name](template.startswith("plain"))
    tokenizer.chat_template = TEMPLATES[template]
    row = encoded(ROW, tokenizer)
    said = [tokenizer.decode(run).replace(" ", "") for run in runs(row, "chosen")]
    assert len(said) == len(ANSWERS)
    for text, answer in zip(said, ANSWERS):
        assert answer.replace(" ", "") in text
        assert "why" not in text
        assert "really" not in text
    whole = tokenizer.apply_chat_template([QUESTION, *CHOSEN], tokenize=True, return_dict=False)
    assert (row["prompt_ids"] + row["chosen_ids"])[: len(whole)] == whole  # context stays in the input
    assert all(row["rejected_mask"])


def test_marks_of_the_template_decide():
    tokenizer = byte_level(False)
    tokenizer.chat_template = MARKED
    tokenizer.eos_token = "<|im_end|>"
    row = encoded(ROW, tokenizer)
    marked = tokenizer.apply_chat_template(
        [QUESTION, *CHOSEN], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    kept = len(row["prompt_ids"] + row["chosen_ids"])
    assert row["prompt_ids"] + row["chosen_ids"] == marked["input_ids"][:kept]
    assert [0] * len(row["prompt_ids"]) + list(map(int, row["chosen_mask"])) == marked["assistant_masks"][:kept]
    assert not any(marked["assistant_masks"][kept:])
    tokenizer.chat_template = TEMPLATES["ChatML"]  # the same without marks
    assert encoded(ROW, tokenizer)["chosen_mask"] == [*row["chosen_mask"], True]  # and the white space at the end


@pytest.mark.parametrize(
    "marked", [MARKED, MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")]
)
def test_the_end_of_a_turn_is_learned_though_marks_leave_it_out(marked):
    tokenizer = byte_level(False)  # its own end token is another
    tokenizer.chat_template = marked
    row = encoded(ROW, tokenizer)
    assert [tokenizer.decode(run) for run in runs(row, "chosen")] == [f"{answer}<|im_end|>" for answer in ANSWERS]
    assert tokenizer.eos_token_id not in row["chosen_ids"] + row["rejected_ids"]


@pytest.mark.parametrize("inside", [True, False])
def test_what_opens_the_next_turn_is_not_learned(inside):
    """In the manner of Llama 3, where a token opens the next turn right behind the one that ends the last."""
    end = "<|eot_id|>{% endgeneration %}" if inside else "{% endgeneration %}<|eot_id|>"
    tokenizer = byte_level(False)
    tokenizer.chat_template = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}" + end + "{% else %}{{ m.content }}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
    )
    row = encoded(ROW, tokenizer)
    assert [tokenizer.decode(run) for run in runs(row, "chosen")] == [f"{answer}<|eot_id|>" for answer in ANSWERS]


def test_roles_that_are_not_known_are_named(chat_tokenizer):
    answers = [message("assistant", "a"), message("user", "b"), message("bot", "c")]
    with pytest.raises(ValueError, match=r"turn 3 of a response has the role 'bot'.*learned_turns='all'"):
        encoded({**ROW, "chosen": answers}, chat_tokenizer)
    assert all(encoded({**ROW, "chosen": answers}, chat_tokenizer, learned_turns="all")["chosen_mask"])


def test_conversations_that_part_at_a_turn_of_the_user(chat_tokenizer):
    begin = [QUESTION, message("assistant", "good")]
    chosen, rejected = ([*begin, message("user", turn), message("assistant", turn * 2)] for turn in ("so", "why"))
    row = encoded({"chosen": chosen, "rejected": rejected}, chat_tokenizer)
    assert chat_tokenizer.decode(row["prompt_ids"]) == f"[user]\nwhat is it?{END}[assistant]\ngood{END}"
    assert [chat_tokenizer.decode(run) for run in runs(row, "chosen")] == ["soso" + END]
    assert [chat_tokenizer.decode(run) for run in runs(row, "rejected")] == ["whywhy" + END]


def test_tools_and_consecutive_turns(chat_tokenizer):
    chosen = [message("assistant", "look"), message("tool", "5"), message("assistant", "five")]
    row = encoded({**ROW, "chosen": chosen}, chat_tokenizer)
    assert [chat_tokenizer.decode(run) for run in runs(row, "chosen")] == ["look" + END, "five" + END]
    twice = [message("assistant", "one"), message("assistant", "two")]
    row = encoded({**ROW, "chosen": twice}, chat_tokenizer)
    assert [chat_tokenizer.decode(run) for run in runs(row, "chosen")] == ["one" + END, "two" + END]


@pytest.mark.parametrize("turns", [[], [message("user", "bye")], [message("tool", "5"), message("user", "bye")]])
def test_context_at_the_end_is_left_out(turns, chat_tokenizer):
    row = encoded({**ROW, "chosen": [*CHOSEN[:3], *turns]}, chat_tokenizer)
    assert chat_tokenizer.decode(row["chosen_ids"]).endswith(f"[assistant]\ngreat acting{END}")
    assert [chat_tokenizer.decode(run) for run in runs(row, "chosen")] == [ANSWERS[0] + END, ANSWERS[1] + END]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_cut_within_a_leading_turn_of_a_tool_drops_the_row(side, chat_tokenizer, caplog):
    """Nothing of the assistant is left: an end token alone would teach the model to say nothing."""
    long = [message("tool", "the film was great " * 9), message("assistant", "so")]
    row = {**ROW, "chosen": REJECTED, "rejected": [message("assistant", "bad")], side: long}
    with caplog.at_level("WARNING"):
        kept = tokenize([row, ROW], chat_tokenizer, max_length=60, max_prompt_length=40)
    assert kept["dataset_row"] == [1]
    assert f"1 with a '{side}' response without a turn of the assistant to learn" in caplog.text


def test_a_response_without_a_turn_of_the_assistant_is_dropped(chat_tokenizer, caplog):
    silent = {**ROW, "chosen": [message("tool", "5"), message("user", "bye")]}
    with caplog.at_level("WARNING"):
        kept = tokenize([silent, ROW], chat_tokenizer)
    assert kept["dataset_row"] == [1]
    assert "1 with a 'chosen' response without a turn of the assistant to learn" in caplog.text


def test_transcripts():
    tokenizer = make_tokenizer()
    start = "\n\nHuman: the film?\n\nAssistant:"
    chosen = " good\n\nHuman: really?\n\nAssistant: great\n\nHuman: so?\n\nAssistant: fun"
    row = encoded({"chosen": start + chosen, "rejected": start + " bad"}, tokenizer)
    assert tokenizer.decode(row["chosen_ids"]) == chosen + END
    assert [tokenizer.decode(run) for run in runs(row, "chosen")] == [" good", " great", " fun" + END]
    row = encoded({"chosen": start + " good\n\nHuman: bye", "rejected": start + " bad"}, tokenizer)
    assert tokenizer.decode(row["chosen_ids"]) == " good" + END
    row = encoded({"prompt": "a transcript:", "chosen": chosen, "rejected": " bad"}, tokenizer)
    assert all(row["chosen_mask"])  # no transcript, but a text


@pytest.mark.parametrize("start", ["Human: the film?", "\nHuman: the film?", "\n\nHuman: the film?"])
@pytest.mark.parametrize("prompt", ["none", "the question", "the transcript"])
def test_other_forms_of_transcripts(prompt, start):
    tokenizer = make_tokenizer()
    begin = start + "\n\nAssistant:"
    row = {"chosen": " good\n\nHuman: really?\n\nAssistant: great", "rejected": " bad"}
    if prompt == "the transcript":
        row = {"prompt": begin, **row}
    else:
        row = {side: begin + text for side, text in row.items()}
        row |= {} if prompt == "none" else {"prompt": "the film?"}
    row = encoded(row, tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == begin
    assert [tokenizer.decode(run) for run in runs(row, "chosen")] == [" good", " great" + END]


def test_transcripts_that_share_nothing_or_say_nothing(caplog):
    tokenizer = make_tokenizer()
    texts = {side: f"\n\nHuman: {side}?\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    row = encoded(texts, tokenizer)
    assert row["prompt_ids"] == []
    assert [tokenizer.decode(run) for run in runs(row, "chosen")] == [" chosen" + END]
    with pytest.raises(ValueError, match="whole transcripts, which don't hold the 'prompt'"):
        encoded({"prompt": "the film?", **texts}, tokenizer)
    begin = "\n\nHuman: a?\n\nAssistant:"
    with pytest.raises(ValueError, match="1 with an empty 'chosen' response"):
        encoded({"chosen": begin + " ", "rejected": begin + " b"}, tokenizer)


@pytest.mark.parametrize("transcript", [False, True])
def test_all_turns_are_learned_on_request(transcript, chat_tokenizer):
    row = ROW
    if transcript:
        row = {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b\n\nHuman: c\n\nAssistant: d", "rejected": " e"}
    some, everything = (encoded(row, chat_tokenizer, learned_turns=turns) for turns in ("assistant", "all"))
    assert all(everything["chosen_mask"])
    assert not all(some["chosen_mask"])
    assert everything["chosen_ids"] == some["chosen_ids"]


def test_templates_that_do_not_tell_turns_apart_name_the_option():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT.replace(
        "{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else m.content | upper }}"
    )
    row = {**ROW, "prompt": [], "chosen": [QUESTION, *CHOSEN[:1]], "rejected": [QUESTION, *REJECTED]}
    encoded(row | {"prompt": None}, tokenizer)
    with pytest.raises(ValueError, match=r"row 0 .*renders turn 1 .*learned_turns='all'"):
        encoded({"prompt": [message("user", "A")], "chosen": CHOSEN, "rejected": REJECTED}, tokenizer)


@pytest.mark.parametrize("limit", range(20, 120, 3))
def test_cut_responses_end_with_a_turn_of_the_assistant(limit, chat_tokenizer):
    row = encoded(ROW, chat_tokenizer, max_length=limit, max_prompt_length=12)
    ids, mask = row["chosen_ids"], row["chosen_mask"]
    assert len(row["prompt_ids"]) + len(ids) <= limit
    assert mask[-1]
    assert ids[-1] == chat_tokenizer.eos_token_id
    assert ids[-2] != chat_tokenizer.eos_token_id
    assert chat_tokenizer.decode(ids).count("[user]") < 2 or limit > 60


def test_slow_tokenizers_learn_the_same(monkeypatch, chat_tokenizer):
    expected = encoded(ROW, chat_tokenizer)
    monkeypatch.setattr(type(chat_tokenizer), "is_fast", False)
    assert encoded(ROW, chat_tokenizer) == expected


@pytest.mark.parametrize("shared_prompts", [False, True])
@pytest.mark.parametrize("padding_free", [False, True])
def test_batches_hold_what_is_learned(padding_free, shared_prompts, chat_tokenizer):
    rows = tokenize([ROW, {**ROW, "chosen": REJECTED, "rejected": CHOSEN}], chat_tokenizer, max_length=600).to_list()
    collate = PreferenceCollator(0, padding_free=padding_free, shared_prompts=shared_prompts)
    batch = collate(rows)
    sequences = [Sequence.of(row, side) for side in ("chosen", "rejected") for row in rows]
    targets = [sequence.ids[place] for sequence in sequences for place in sequence.learned]
    assert batch["targets"].tolist() == targets
    assert batch["cu_seqlens"].diff().tolist() == [len(sequence.learned) for sequence in sequences]
    # Every row of the input is the token before its target.
    before = [sequence.ids[place - 1] for sequence in sequences for place in sequence.learned]
    assert batch["input_ids"].flatten()[batch["rows"]].tolist() == before
    assert torch.tensor(before).numel() < sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)


def test_rows_of_token_ids_may_have_masks(tokenizer):
    row = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9, 10], "rejected_ids": [11, 12]}
    (kept,) = tokenize([{**row, "chosen_mask": [1, 0, 0, 1], "rejected_mask": [True, False]}], tokenizer)
    assert kept["chosen_mask"] == [True, False, False, True]
    assert kept["rejected_mask"] == [True, False]
    assert Sequence.of(kept, "chosen").learned == [2, 5]
    with pytest.raises(ValueError, match="'chosen_mask' has 2 numbers for 4 tokens"):
        tokenize([{**row, "chosen_mask": [1, 0], "rejected_mask": [1, 1]}], tokenizer)


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "llama3_1"])
def test_calls_of_tools(name):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.chat_template = (TEMPLATES_OF_TRL / f"{name}.jinja").read_text()
    call = {"type": "function", "function": {"name": "look", "arguments": {"film": "it"}}}
    calls = {"role": "assistant", "content": "", "tool_calls": [call]}
    row = {**ROW, "chosen": [calls, message("tool", "5 stars"), message("assistant", "five")]}
    row = encoded(row, tokenizer, max_length=1200, max_prompt_length=600)
    called, said = (tokenizer.decode(run) for run in runs(row, "chosen"))
    assert '"name": "look"' in called
    assert "five" in said
    assert "5 stars" not in called + said


TEMPLATES_OF_TRL = Path(trl.__file__).parent / "chat_templates"
NO_SINGLE_WAY = {"gptoss", "phi3", "phi3_5"}  # they end the last turn unlike the others
WITH_IMAGES = ("_vl", "vlm", "llava", "idefics")


@pytest.mark.parametrize(
    "name",
    [
        path.stem
        for path in sorted(TEMPLATES_OF_TRL.glob("*.jinja"))
        if not any(part in path.stem for part in WITH_IMAGES)
    ],
)
def test_templates_of_many_models(name):
    """TRL has the templates of many models, and of most a second form with marks."""
    tokenizer = make_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.chat_template = (TEMPLATES_OF_TRL / f"{name}.jinja").read_text()
    if name in NO_SINGLE_WAY:
        with pytest.raises(ValueError, match="learned_turns='all'"):
            ConversationTokenizer(tokenizer, "assistant").conversations(ROW)
        return
    chosen, _ = ConversationTokenizer(tokenizer, "assistant").conversations(ROW)
    place, said = chosen.response, []
    for begin, end in [*chosen.context, (len(chosen.text), 0)]:
        said.append(chosen.text[place:begin])
        place = end
    assert len(said) == len(ANSWERS)
    for turn, answer in zip(said, ANSWERS):
        assert re.sub(r"<[^<>]*>|\n|to=user|assistant|final| ", "", turn) == answer.replace(" ", "")
        assert not re.search(r"<\|(im_start|start_header_id|turn)[|>]", turn[1:]), turn
