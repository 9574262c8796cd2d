"""Every example of docs/data.md gives the prompt and the responses that stand below it."""

import json
import re
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from tdpo import tokenize_preferences

from helpers.model_families import make_tokenizer

PAGE = (Path(__file__).parents[3] / "docs/data.md").read_text()
BLOCK = re.compile(
    r"(?:```yaml\n(?P<options>.*?)```\n)?```json\n(?P<rows>.*?)```\n(?:```\n(?P<shown>.*?)```)?", re.DOTALL
)
EXAMPLES = [match.groupdict() for match in BLOCK.finditer(PAGE)]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def chatml():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.chat_template = CHATML
    return tokenizer


def shown_lines(pair, tokenizer):
    """A pair as the page shows it: turns that are context in brackets, new lines as a backslash and an n."""
    texts = [("prompt", tokenizer.decode(pair["prompt_ids"]))]
    for side in ("chosen", "rejected"):
        text, learned = "", True
        for token, now in zip(pair[f"{side}_ids"], pair[f"{side}_mask"]):
            if now != learned:
                text += "]" if now else "["
            text, learned = text + tokenizer.decode([token]), now
        texts.append((side, text))
    return [f"{name:<10s}{text}".replace("\n", "\\n") for name, text in texts]


def test_the_page_has_the_forms():
    assert len(EXAMPLES) == PAGE.count("```json") == 15


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["rows"][:60])
def test_examples(example, chatml):
    options = yaml.safe_load(example["options"]) if example["options"] else {}
    for line in example["rows"].splitlines():
        kept = tokenize_preferences(Dataset.from_list([json.loads(line)]), chatml, 500, 250, **options)
        if example["shown"] is None:  # token ids
            assert kept[0]["prompt_ids"] == json.loads(line)["prompt_ids"]
            continue
        lines = [text for pair in kept.to_list() for text in shown_lines(pair, chatml)]
        assert lines == example["shown"].splitlines()
