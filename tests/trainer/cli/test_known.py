"""The list of options is that of the classes, and is read without importing transformers."""

from dataclasses import fields

import pytest
import transformers
from tdpo.cli import known
from tdpo.cli.known import known_options, of_class
from tdpo.config import TDPOConfig
from tdpo.options import DataOptions, ModelOptions, TDPOOptions
from transformers import TrainingArguments

COMPUTED = {"log_level", "log_level_replica"}  # whose choices the source text computes


def test_what_is_read_is_what_is_imported():
    read = {option.name: option for option in known._read_training_arguments()}
    imported = of_class(TrainingArguments)
    assert list(read) == list(imported)
    for name, option in imported.items():
        assert read[name].kinds == option.kinds, name
        if name not in COMPUTED:
            assert read[name].choices == option.choices, name
        assert read[name].default in (getattr(option.default, "value", option.default), None), name


def test_all_options_are_known_and_ours_come_first():
    options = known_options((ModelOptions, DataOptions, TDPOOptions))
    expected = {item.name for group in (ModelOptions, DataOptions, TDPOConfig) for item in fields(group) if item.init}
    assert set(options) == expected
    assert options["logging_steps"].default == 10  # transformers' is 500


@pytest.mark.parametrize("text", ["", "class TrainingArguments:\n    beta: int = field(default=(\n"])
def test_a_source_that_can_not_be_read_is_imported(text, tmp_path, monkeypatch):
    monkeypatch.setattr(known, "find_spec", lambda name: transformers.__spec__)
    monkeypatch.setattr(transformers.__spec__, "submodule_search_locations", [str(tmp_path)])
    (tmp_path / "training_args.py").write_text(text)
    known._of_training_arguments.cache_clear()
    try:
        assert {option.name for option in known._of_training_arguments()} == set(of_class(TrainingArguments))
    finally:
        known._of_training_arguments.cache_clear()
