"""What will be trained on, as text: the tokens, where a response begins, and what has no loss."""

import re

import pytest
from datasets import Dataset
from tdpo.data.collator import Sequence
from tdpo.data.show import View, data_text, legend_text, pair_text, summary_text, token_text
from tdpo.data.tokenize import tokenize_rows
from tdpo.options import RowOptions
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers.token_rows import message

PLAIN = View(rows=3, tokens=60)
OPTIONS = RowOptions(max_length=300, max_prompt_length=100)
TURNS = [message("assistant", "a"), message("user", "b"), message("assistant", "c")]
CHAT_ROW = {"prompt": [message("user", "z")], "chosen": TURNS, "rejected": [message("assistant", "d")]}
ROW = {"prompt": "the film", "chosen": " great fun", "rejected": " bad"}


def tokens(row, tokenizer, options=OPTIONS):
    return tokenize_rows(Dataset.from_list([row]), tokenizer, options)[0][0]


def parts(text):
    """The parts of a pair that is shown, each as its name and its tokens."""
    found = []
    for line in text.splitlines()[1:]:
        name, shown = line.split(" │ ")
        if name.strip() or "left out" in shown:
            found.append((name.strip(), []))
        found[-1][1].extend(shown.split(" "))
    return found


def ids_of(shown, tokenizer):
    """Token ids from what is shown of them, by what `token_text` shows of every token."""
    by_text = {token_text(token, tokenizer): token for token in range(len(tokenizer))}
    return [by_text[text] for text in shown]


def test_every_token_is_in_its_part(chat_tokenizer):
    """In order, and what has a loss is what the collator gives the loss."""
    row = tokens(CHAT_ROW, chat_tokenizer)
    shown = parts(pair_text(row, chat_tokenizer, View(rows=1, tokens=1000)))
    assert [name for name, _ in shown] == ["prompt", "chosen", "context", "chosen", "rejected"]
    assert ids_of(shown[0][1], chat_tokenizer) == row["prompt_ids"]
    response = [text for _, texts in shown[1:4] for text in texts]
    assert ids_of(response, chat_tokenizer) == row["chosen_ids"]
    learned = [place in Sequence.of(row, "chosen").learned for place in range(len(row["prompt_ids"]), 1000)]
    assert [name == "chosen" for name, texts in shown[1:4] for _ in texts] == learned[: len(response)]
    assert ids_of(shown[4][1], chat_tokenizer) == row["rejected_ids"]


def test_the_head_of_a_pair_counts(chat_tokenizer):
    row = tokens(CHAT_ROW, chat_tokenizer)
    sizes = {name: len(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")}
    context = row["chosen_mask"].count(False)
    head = pair_text({**row, "dataset_row": 7}, chat_tokenizer, PLAIN).splitlines()[0]
    assert head == (
        f"row 7: prompt {sizes['prompt']} tokens, chosen {sizes['chosen']} ({context} of them context), "
        f"rejected {sizes['rejected']}"
    )


@pytest.mark.parametrize("limit", [2, 3, 4, 9])
def test_long_parts_lose_their_middle(limit, tokenizer):
    """The boundary and the end token stay, and the tokens are accounted for."""
    row = tokens({"prompt": "xyz" * 9, "chosen": "qw" * 20, "rejected": " bad"}, tokenizer)
    shown = parts(pair_text(row, tokenizer, View(rows=1, tokens=limit)))
    for name in ("prompt", "chosen"):
        ids = row[f"{name}_ids"]
        place = [part for part, _ in shown].index(name)
        (_, head), (gap, said), (_, end) = shown[place : place + 3]
        assert gap == ""
        assert said == ["…", str(len(ids) - limit), "tokens", "left", "out", "…"]
        assert len(head) - len(end) == limit % 2
        assert ids_of(head + end, tokenizer) == ids[: len(head)] + ids[len(ids) - len(end) :]
    assert "<|end|>" in shown[place + 2][1]


def test_nothing_is_left_out_where_all_fits(tokenizer):
    row = tokens({"prompt": "xyz", "chosen": "qwerty", "rejected": "q"}, tokenizer)
    longest = max(len(row["prompt_ids"]), len(row["chosen_ids"]))
    assert "left out" not in pair_text(row, tokenizer, View(rows=1, tokens=longest))
    assert "1 token left out" in pair_text(row, tokenizer, View(rows=1, tokens=longest - 1))


@pytest.mark.parametrize("width", [40, 60, 100])
def test_lines_fit_the_width_and_have_a_margin(width, tokenizer):
    row = tokens({"prompt": "日本語 the film" * 5, "chosen": " great" * 20, "rejected": " bad" * 20}, tokenizer)
    lines = pair_text(row, tokenizer, View(rows=1, tokens=60, width=width)).splitlines()[1:]
    assert all(len(line) <= width for line in lines)
    assert all(line.index("│") == 11 for line in lines)
    assert max(map(len, lines)) > width - 12


def test_a_prompt_without_tokens(tokenizer):
    """The first token of a response has no loss then, as in training."""
    row = tokens({"prompt": "", "chosen": "great", "rejected": "bad"}, tokenizer)
    assert not row["prompt_ids"]
    shown = parts(pair_text(row, tokenizer, PLAIN))
    assert [name for name, _ in shown] == ["prompt", "context", "chosen", "context", "rejected"]
    assert "no tokens" in " ".join(shown[0][1])
    assert len(shown[1][1]) == len(shown[3][1]) == 1


def test_colours_add_nothing_but_colours(chat_tokenizer):
    row = tokens(CHAT_ROW, chat_tokenizer)
    plain = pair_text(row, chat_tokenizer, PLAIN)
    coloured = pair_text(row, chat_tokenizer, View(rows=3, tokens=60, colours=True))
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    codes = {}
    for line in coloured.splitlines()[1:]:
        codes.setdefault(line.split()[0], []).extend(re.findall(r"\x1b\[([1-9][0-9;]*)m", line))
    assert set(codes["prompt"]) == {"2"}
    assert set(codes["context"]) == {"2;3"}
    for side in ("chosen", "rejected"):  # one token is told from the next
        assert len(set(codes[side])) == 2
    assert not set(codes["chosen"]) & set(codes["rejected"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" ", "·"),
        ("\n", "\\n"),
        ("\t", "\\t"),
        ("\x1b", "\\x1b"),  # or it would colour the terminal
        ("\\", "\\\\"),
        ("<|end|>", "<|end|>"),
    ],
)
def test_what_can_not_be_seen_is_escaped(text, shown, tokenizer):
    (token,) = tokenizer(text)["input_ids"]
    assert token_text(token, tokenizer) == shown


@pytest.mark.parametrize("text", ["é", "日本", "🤷", "\xa0", "·", "\N{REPLACEMENT CHARACTER}"])
def test_bytes_of_characters_are_shown_as_such(text, tokenizer):
    ids = tokenizer(text)["input_ids"]  # the tokenizer has a token for every byte, and none for these
    assert [token_text(token, tokenizer) for token in ids] == [f"\\x{byte:02x}" for byte in text.encode()]


def byte_level(name):
    """A byte-level tokenizer with one token, spelled in the alphabet of such tokenizers."""
    tokenizer = Tokenizer(models.WordLevel({name: 0}))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("日本", "日本"),
        (" 日", "·日"),
        ("a·b", "a\\xb7b"),
        ("\u202e", "\\u202e"),  # or the rest of the line would run from right to left
        ("\N{COMBINING ACUTE ACCENT}", "◌\N{COMBINING ACUTE ACCENT}"),  # or it would be of the blank before it
    ],
)
def test_whole_characters_in_a_token(text, shown):
    ((name, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert token_text(0, byte_level(name)) == shown


def test_a_character_begun_in_a_token():
    assert token_text(0, byte_level("Ġaæķ")) == "·a\\xe6\\x95"


def test_wide_characters_take_two_columns():
    row = {"prompt_ids": [0] * 50, "chosen_ids": [0], "rejected_ids": [0], "dataset_row": 0}
    lines = pair_text(row, byte_level("æĹ¥"), View(rows=1, tokens=60, width=44)).splitlines()
    assert lines[1] == "  prompt   │ " + " ".join(["日"] * 10)  # 29 columns beside the margin's 13; eleven take 32


def test_ids_without_a_token_are_shown_by_number(tokenizer):
    assert token_text(len(tokenizer) + 3, tokenizer) == f"<token {len(tokenizer) + 3}>"


@pytest.fixture(scope="module")
def sentencepiece():
    """A tokenizer in the manner of Llama 2: spaces are ▁, characters that it lacks are bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["the film was great"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def test_spaces_and_bytes_of_sentencepiece(sentencepiece):
    ids = sentencepiece("the film é\n")["input_ids"]
    shown = [token_text(token, sentencepiece) for token in ids]
    assert "".join(shown) == "·the·film·\\xc3\\xa9\\n"
    assert "\\xc3" in shown


def test_summary(tokenizer):
    rows = [ROW, ROW, {**ROW, "chosen": ""}, {**ROW, "rejected": " great fun"}, {**ROW, "prompt": "z" * 2000}]
    options = RowOptions(max_length=1200, max_prompt_length=1100)
    _, summary = tokenize_rows(Dataset.from_list(rows), tokenizer, options)
    counts, table, histogram = summary_text(summary, options).split("\n\n")
    assert [line.split(maxsplit=1) for line in counts.splitlines()[:2]] == [["rows", "5"], ["pairs", "3"]]
    assert "  dropped        1 with an empty 'chosen' response\n                 1 with equal responses\n" in counts
    assert "  prompts cut    1 (max_prompt_length 1,100)\n  responses cut  in 0 pairs (max_length 1,200)\n" in counts
    assert counts.endswith(f"  context        0 of {summary.chosen.sum() + summary.rejected.sum()} response tokens")
    assert table == summary.table()
    assert histogram == summary.histogram(1200)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (0, []),
        (1, ["The first pair of 2, token by token:"]),
        (2, ["The first 2 pairs of 2, token by token:"]),
        (5, ["The first 2 pairs of 2, token by token:"]),
    ],
)
def test_the_first_pairs_are_shown(rows, said, tokenizer):
    dataset, summary = tokenize_rows(Dataset.from_list([{**ROW, "chosen": ""}, ROW, ROW]), tokenizer, OPTIONS)
    view = View(rows=rows, tokens=60)
    text = data_text("train data: pairs.jsonl", dataset, summary, tokenizer, OPTIONS, view)
    assert text.startswith("train data: pairs.jsonl\n\n  rows           3\n")
    assert re.findall(r"^row (\d+): ", text, re.MULTILINE) == ["1", "2"][:rows]
    assert [line for line in text.splitlines() if "token by token" in line] == said


def test_the_legend_explains_every_mark():
    legend = legend_text(View(rows=1, tokens=60, width=50))
    assert all(len(line) <= 50 for line in legend.splitlines())
    for mark in ("·", "\\n", "\\xe6", "prompt", "chosen", "rejected", "context"):
        assert mark in legend


@pytest.mark.parametrize(
    ("rows", "count", "said"),
    [(-1, 60, "show_rows is -1; it must be at least 0"), (3, 1, "show_tokens is 1; it must be at least 2")],
)
def test_views_that_show_too_little_are_refused(rows, count, said):
    with pytest.raises(ValueError, match=said):
        View(rows=rows, tokens=count)
