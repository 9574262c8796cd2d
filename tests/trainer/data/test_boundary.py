"""The tokens are the conversation's: prompt and response are tokenized together, for every tokenizer and template."""

import pytest
from datasets import Dataset
from tdpo import tokenize_preferences
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from helpers.model_families import make_tokenizer

TEXTS = [
    "the film was great and the acting superb",
    "a bad movie with an awful plot",
    "good fun, boring end",
    "question: what is it? answer: yes",
    "system user assistant human think tool",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>"]
SPECIAL += ["<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<think>", "</think>"]
SPECIAL += ["<User>", "<Assistant>"]


def wrapped(tokenizer, begins):
    """A tokenizer of transformers, which may begin texts with `<s>`."""
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def byte_level(begins):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return wrapped(tokenizer, begins)


def sentencepiece(prepend):
    """BPE in the manner of SentencePiece: `always` with its dummy prefix, `first` or `never`."""

    def make(begins):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
        special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(TEXTS, trainer)
        return wrapped(tokenizer, begins)

    return make


def unigram(begins):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return wrapped(tokenizer, begins)


def wordpiece(begins):
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return wrapped(tokenizer, begins)


TOKENIZERS = {
    "byte-level": byte_level,
    "SentencePiece": sentencepiece("always"),
    "SentencePiece, dummy prefix at the start": sentencepiece("first"),
    "SentencePiece without dummy prefix": sentencepiece("never"),
    "Unigram": unigram,
    "WordPiece": wordpiece,
}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "Qwen 3 without thinking": CHATML.replace(
        "assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}"
    ),
    "Zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "Zephyr, no new line asked for": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "Llama 2": (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
    ),
    "Mistral": (
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    ),
    "Llama 3": (
        "<s>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "Gemma": (
        "<s>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "R1": (
        "<s>{% for m in messages %}{% if m.role == 'user' %}<User>{{ m.content }}"
        "{% else %}<Assistant>{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<Assistant><think>\n{% endif %}"
    ),
    "plain words": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
}
CHOSEN, REJECTED = "yes, good fun", "<think>\nboring\n</think>\n\nno"
MESSAGES = [{"role": "user", "content": "what is it?"}]


def tokenized(row, tokenizer, **limits):
    limits = {"max_length": 400, "max_prompt_length": 200, **limits}
    return tokenize_preferences(Dataset.from_list([row]), tokenizer, **limits)[0]


def check_whole(row, tokenizer, wholes):
    """The row's tokens are those of the wholes, but for an end token; both prompts are what both begin with."""
    for side, whole in wholes.items():
        ids = row["prompt_ids"] + row[f"{side}_ids"]
        assert ids[: len(whole)] == whole
        assert ids[len(whole) :] in ([], [tokenizer.eos_token_id])


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
    check_whole(row, tokenizer, wholes)
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
    check_whole(row, tokenizer, {"chosen": tokenizer(prompt + chosen)["input_ids"]})
    check_whole(row, tokenizer, {"rejected": tokenizer(prompt + rejected)["input_ids"]})
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
