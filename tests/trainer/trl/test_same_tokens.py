"""TRL and tdpo make the same tokens of the same rows."""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from tdpo import tokenize_preferences
from trl import DPOTrainer

from helpers.chat_tokenizers import TEMPLATES, TOKENIZERS
from helpers.token_rows import message

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
CHAT = {
    "prompt": [message("user", "what is it?")],
    "chosen": [message("assistant", "yes, good fun")],
    "rejected": [message("assistant", "<think>\nboring\n</think>\n\nno")],
}
TEXTS = [
    ("question:", "yes", "no"),
    ("question: ", "yes", "no"),
    ("question:", " yes", " no"),
    ("the film was gr", "eat", "im"),
    ("", "good fun", "boring"),
]


def check(rows, tokenizer):
    dataset = Dataset.from_list(rows)
    options = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    of_trl = DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), dataset, tokenizer, options, "train")
    ours = tokenize_preferences(dataset, tokenizer, 400, 200)
    assert ours.select_columns(COLUMNS).to_list() == of_trl.select_columns(COLUMNS).to_list()


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_of_texts(name, begins):
    check([dict(zip(("prompt", "chosen", "rejected"), row)) for row in TEXTS], TOKENIZERS[name](begins))


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "plain words"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_of_messages(name, template, begins):
    tokenizer = TOKENIZERS[name](begins)
    tokenizer.chat_template = TEMPLATES[template]
    check([CHAT], tokenizer)
