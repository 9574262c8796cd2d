"""The trainer on streams of preference rows: it trains, audits, resumes and evaluates as on a dataset."""

import json

import pytest
import torch
from datasets import IterableDataset
from tdpo import TDPOConfig
from tdpo import trainer as trainer_module

from helpers.model_families import make_model
from helpers.trainer_cases import FOUR_STEPS, losses, make_preferences, make_trainer

NINE_STEPS = {"max_steps": 9, "train_sampling_strategy": "sequential"}  # one and a half passes over 24 rows


def stream_of(rows=24, shards=3):
    return make_preferences(rows).to_iterable_dataset(num_shards=shards)


def assert_equal_weights(one, other):
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


@pytest.mark.parametrize("options", [{}, {"padding_free": True}, {"gradient_accumulation_steps": 2}])
def test_training_on_a_stream_equals_that_on_its_rows(options, tmp_path):
    """So batches are whole: accelerate would cut a stream's tensors, on one process too."""
    trainers = []
    for data in (make_preferences(), stream_of()):
        model = make_model("llama")
        trainers.append(make_trainer(tmp_path, model=model, train_dataset=data, **NINE_STEPS, **options))
        trainers[-1].train()
    assert len(losses(trainers[1])) == 9
    assert losses(trainers[1]) == losses(trainers[0])
    assert_equal_weights(*trainers)
    assert trainers[1].state.num_input_tokens_seen == trainers[0].state.num_input_tokens_seen


def test_rows_of_a_stream_are_shuffled_unless_their_order_is_asked_for(tmp_path):
    orders = []
    for options in ({}, {"data_seed": 7}, {"train_sampling_strategy": "sequential"}):
        trainer = make_trainer(tmp_path, train_dataset=stream_of(shards=1), **options)
        batches = iter(trainer.get_train_dataloader())
        orders.append([next(batches)["dataset_row"].tolist() for _ in range(6)])
        assert sorted(sum(orders[-1], [])) == list(range(24))  # noqa: RUF017
    assert orders[2] == [list(range(first, first + 4)) for first in range(0, 24, 4)]
    assert len({str(order) for order in orders}) == 3


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"dataloader_num_workers": 1}])
def test_resuming_on_a_stream_is_exact(options, tmp_path):
    """Also of a run that was interrupted in a later pass: two batches are 8 of 6 rows."""
    trainers = [
        make_trainer(tmp_path / name, train_dataset=stream_of(6), **FOUR_STEPS, **more)
        for name, more in (("a", options), ("b", {key: options[key] for key in options if key[0] == "g"}))
    ]
    unbroken, resumed = trainers
    unbroken.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses(resumed) == losses(unbroken)
    assert_equal_weights(unbroken, resumed)


def test_a_finished_run_on_a_stream_is_not_trained_further(tmp_path):
    make_trainer(tmp_path, train_dataset=stream_of(), **FOUR_STEPS).train()
    again = make_trainer(tmp_path, train_dataset=stream_of(), **FOUR_STEPS)
    again.train(resume_from_checkpoint=True)
    assert again.was_finished


def test_the_data_of_a_stream_are_not_recorded(tmp_path):
    make_trainer(tmp_path, train_dataset=stream_of(), **FOUR_STEPS).train()
    assert json.loads((tmp_path / "checkpoint-2" / "run.json").read_text())["training data"] == "a stream"
    card = (tmp_path / "checkpoint-2" / "README.md").read_text()
    assert "on `preference pairs given in memory` with tdpo_ext, for 2 steps" in card
    on_rows = make_trainer(tmp_path, **FOUR_STEPS)
    with pytest.raises(ValueError, match="the training data, as tokens, are others"):
        on_rows.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_audit_sees_the_longest_of_the_first_pairs_of_a_stream(tmp_path, capsys, monkeypatch):
    audited, seen = trainer_module.audited, []
    monkeypatch.setattr(
        trainer_module, "audited", lambda examples, device: seen.append(examples) or audited(examples, device)
    )
    trainer = make_trainer(tmp_path, train_dataset=stream_of(shards=1), train_sampling_strategy="sequential")
    trainer.train()
    assert "audit: 2 pairs against plain arithmetic" in capsys.readouterr().err
    assert trainer.audit().pairs == 2
    lengths = [pair["length"] for pair in make_trainer(tmp_path).train_dataset.select(range(4))]
    for examples in seen:
        assert [example["length"] for example in examples] == sorted(lengths)[:-3:-1]
    assert len(seen) == 2


@pytest.mark.parametrize("batch", [8, 3])
def test_evaluation_on_a_stream_equals_that_on_its_rows(batch, tmp_path):
    evaluated, samples = [], []
    for data in (make_preferences(), stream_of()):
        models = {"model": make_model("llama"), "ref_model": make_model("llama", 1)}
        options = {"per_device_eval_batch_size": batch, "eval_samples": 2, "eval_sample_tokens": 4}
        trainer = make_trainer(tmp_path, **models, eval_dataset={"held": data}, **options)
        metrics = trainer.evaluate()
        evaluated.append(
            {name: value for name, value in metrics.items() if "second" not in name and "time" not in name}
        )
        samples.append(json.loads((tmp_path / "samples" / "eval_held-step-0.json").read_text()))
        assert trainer.evaluate()["eval_held_loss"] == metrics["eval_held_loss"]
    assert evaluated[1] == evaluated[0]
    assert samples[1] == samples[0]
    assert len(samples[0]) == 2


def test_evaluations_while_training_on_a_stream(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    logs = []
    for data in (make_preferences(8), stream_of(8)):
        trainer = make_trainer(tmp_path, train_dataset=stream_of(), eval_dataset=data, **options)
        trainer.train()
        logs.append([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])
    assert logs[1] == logs[0]
    assert len(logs[0]) == 2


@pytest.mark.parametrize("given", ["train_dataset", "eval_dataset"])
def test_what_streams_can_not_do_is_refused_before_they_are_read(given, tmp_path):
    def unread():
        raise AssertionError("a row was read")
        yield

    data = {given: IterableDataset.from_generator(unread)}
    for name, value in (("precompute_reference", True), ("dataset_num_proc", 2)):
        with pytest.raises(ValueError, match=f"^{name} is {value}, but the data are a stream"):
            make_trainer(tmp_path, **data, **{name: value})
    if given == "train_dataset":
        with pytest.raises(ValueError, match=r"^max_steps is not set, but the training data are a stream"):
            make_trainer(tmp_path, **data, max_steps=-1)
    else:
        make_trainer(tmp_path, eval_dataset=stream_of(), max_steps=-1)


def test_batches_are_never_dispatched(tmp_path):
    given = {"dispatch_batches": True}
    with pytest.raises(ValueError, match=r"^accelerator_config has dispatch_batches True, which cuts batches"):
        TDPOConfig(output_dir=str(tmp_path), accelerator_config=given)
    for config in (None, {"split_batches": True}):
        args = TDPOConfig(output_dir=str(tmp_path), accelerator_config=config)
        assert args.accelerator_config.dispatch_batches is False
        assert args.accelerator_config.split_batches is (config is not None)
