"""Bars of what may take long: each counts what it says, with a rate, and `disable_tqdm` turns all of them off."""

import re
from types import SimpleNamespace

import pytest
from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from peft import LoraConfig
from tdpo.cli.main import main
from tdpo.progress import library_bars, shows_bars
from transformers.utils.logging import is_progress_bar_enabled

from helpers.trainer_cases import make_preferences, make_trainer, write_home

BARS = {
    "Tokenizing preferences": ("24/24", "examples"),
    "Caching the reference": ("24/24", "pairs"),
    "Auditing": ("0/5", "checks"),  # which is not left there: two pairs, two sides each, and the loss
    "Evaluating": ("11/11", "pairs"),
}


def work(path, **options):
    """Does all that has a bar; the last batch of the evaluation holds fewer pairs."""
    trainer = make_trainer(
        path,
        precompute_reference=True,
        max_steps=1,
        per_device_eval_batch_size=4,
        eval_dataset=make_preferences(11),
        **options,
    )
    trainer.train()
    trainer.evaluate()


def test_every_bar_counts_to_its_end(tmp_path, capsys):
    work(tmp_path, disable_tqdm=False)
    shown = re.split(r"[\r\n]", capsys.readouterr().err)
    for name, (count, unit) in BARS.items():
        of_bar = [line for line in shown if line.startswith(name)]
        assert any(count in line and f" {unit}/s" in line for line in of_bar), name
    for name in ("Caching the reference", "Evaluating"):
        last = [line for line in shown if line.startswith(name) and BARS[name][0] in line][-1]
        assert re.search(rf"100%.* [\d.]+ {BARS[name][1]}/s", last)


def test_no_bar_with_disable_tqdm(tmp_path, capsys):
    work(tmp_path, disable_tqdm=True)
    shown = capsys.readouterr().err
    assert "%|" not in shown
    assert not [name for name in BARS if name in shown]
    assert not are_progress_bars_disabled()  # for what else the process does


@pytest.mark.parametrize("adapters", [False, True])
def test_the_audit_ticks_once_a_check(adapters, tmp_path, monkeypatch):
    """Four sequences and the loss; and the loss again where what trains could change the reference."""
    seen = []

    class Bar:
        def __init__(self, *, total, desc, **others):
            self.done, self.total = 0, total
            seen.append((desc, self))

        def update(self, count=1):
            self.done += count

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    config = LoraConfig(task_type="CAUSAL_LM", r=4) if adapters else None
    trainer = make_trainer(tmp_path, peft_config=config, disable_tqdm=False)
    monkeypatch.setattr("tdpo.progress.logging.tqdm", Bar)
    trainer.audit()
    assert [(name, bar.done, bar.total) for name, bar in seen] == [("Auditing", 5 + adapters, 5 + adapters)]


def test_the_main_process_alone_shows_bars():
    of = [shows_bars(SimpleNamespace(disable_tqdm=off, process_index=i)) for off in (False, True) for i in (0, 1)]
    assert of == [True, False, False, False]


def test_a_switch_that_was_off_stays_off():
    disable_progress_bars()
    try:
        with library_bars(shown=False):
            assert not is_progress_bar_enabled()
        assert are_progress_bars_disabled()
        assert is_progress_bar_enabled()
    finally:
        enable_progress_bars()


def test_a_command_without_bars(tmp_path, capsys):
    """Those of loading weights and data, which are others', too."""
    write_home(tmp_path, eval_dataset=str(tmp_path / "data.jsonl"))
    capsys.readouterr()
    evaluate = ["evaluate", str(tmp_path / "config.yaml"), "--ref_model", str(tmp_path / "model")]
    assert main([*evaluate, "--output_dir", str(tmp_path), "--disable_tqdm"]) == 0
    assert "%|" not in capsys.readouterr().err
    assert main([*evaluate, "--output_dir", str(tmp_path), "--max_length", "39"]) == 0
    shown = capsys.readouterr().err
    assert "Loading weights: 100%|" in shown
    assert "24/24" in shown
