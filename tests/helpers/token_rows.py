"""Preference rows of texts and chat messages, a template for them, and what becomes of them as tokens."""

from datasets import Dataset
from tdpo import tokenize_preferences

END = "<|end|>"
CHAT = (
    "{% if tools %}<{{ tools[0].name }}>{% endif %}{% if loud %}!{% endif %}"
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def message(role, content):
    return {"role": role, "content": content}


def tokenize(rows, tokenizer, **options):
    limits = {"max_length": 150, "max_prompt_length": 100, **options}
    return tokenize_preferences(Dataset.from_list(rows), tokenizer, **limits)


def texts(row, tokenizer):
    return [tokenizer.decode(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
