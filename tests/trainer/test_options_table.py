"""Every option of transformers, of TRL and of ours has the fate that docs/options.md tells."""

from __future__ import annotations

import copy
import re
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace

import option_fates
import options as options_page
import pytest
import torch
import transformers.integrations.integration_utils as integrations
import transformers.trainer
from datasets import Dataset
from option_fates import REFUSED, WORKS
from tdpo import TDPOConfig, TDPOTrainer
from tdpo.option_checks import NEEDED, NEEDED_BY_TRAIN
from tdpo.refusals import OF_TRANSFORMERS, OF_TRL, refuse
from transformers import EarlyStoppingCallback, TrainingArguments

from helpers.device import USE_CPU
from helpers.model_families import make_model, make_tokenizer
from helpers.option_runs import ROWS, Run, make, trained, watched
from helpers.option_walk import OF_TRL_ALONE, RUNS, SAME, SHOWS, STEPS, Reporter

trl = pytest.importorskip("trl", reason="TRL is not installed")

ROOT = Path(__file__).parents[2]
INHERITED = {name: entry for group in option_fates.OF_TRANSFORMERS.values() for name, entry in group.items()}
ALL = {**INHERITED, **option_fates.OF_TRL, **option_fates.OF_TDPO}
PARENT = {"tdpo": "transformers", "tdpo.trl": "trl"}


def names(config: type) -> set[str]:
    return {item.name for item in fields(config)}


# ---- the table ----


def test_every_option_of_transformers_is_decided():
    assert set(INHERITED) == names(TrainingArguments)


def test_every_option_of_trl_is_decided():
    assert set(option_fates.OF_TRL) == names(trl.DPOConfig) - set(INHERITED)


def test_every_option_of_ours_is_decided():
    absent = {name for name, entry in option_fates.OF_TRL.items() if entry.native == option_fates.ABSENT}
    assert set(option_fates.OF_TDPO) == names(TDPOConfig) - set(INHERITED) - set(option_fates.OF_TRL)
    assert absent == set(option_fates.OF_TRL) - names(TDPOConfig)


def test_what_is_refused_is_what_the_trainers_refuse():
    assert {name for name, entry in ALL.items() if entry.native == REFUSED} == set(OF_TRANSFORMERS)
    assert {name for name, entry in ALL.items() if entry.trl == REFUSED} == set(OF_TRL)


def test_the_page_is_that_of_the_table():
    assert (ROOT / "docs/options.md").read_text() == options_page.page()


@pytest.mark.parametrize(("name", "needed"), {**NEEDED, **NEEDED_BY_TRAIN}.items())
def test_the_page_says_what_an_option_needs(name, needed):
    assert f"`{needed}`" in options_page.row(name, ALL[name])[-1]
    assert needed in ALL


@pytest.mark.parametrize("name", sorted(name for name, entry in ALL.items() if entry.shown))
def test_what_another_test_shows_is_named_there(name):
    assert re.search(rf"\b{name}\b", (ROOT / ALL[name].shown).read_text())


# ---- what is refused ----

OTHERS = {
    "include_for_metrics": ["loss"],
    "eval_accumulation_steps": 1,
    "label_names": ["labels"],
    "torch_compile_mode": "default",
    "torch_compile_backend": "eager",
    "label_smoothing_factor": 0.1,
    "liger_kernel_config": {"rope": True},
    "length_column_name": "words",
    "f_divergence_type": "js_divergence",
    "f_alpha_divergence_coef": 0.7,
    "ld_alpha": 0.5,
    "precompute_ref_batch_size": 2,
}


def other_value(name: str, unused: object) -> object:
    return OTHERS.get(name, not unused)


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_options_are_refused(name, tmp_path):
    refusal = OF_TRANSFORMERS[name]
    with pytest.raises(ValueError, match=f"^{name} is .*{re.escape(refusal.instead)}$"):
        TDPOConfig(output_dir=str(tmp_path), use_cpu=USE_CPU, **{name: other_value(name, refusal.unused)})
    defaults = {item.name: item.default for item in fields(TDPOConfig)}
    assert defaults[name] in (refusal.unused, MISSING)


@pytest.mark.parametrize("name", OF_TRL)
def test_options_are_refused_in_trls_trainer(name, tmp_path):
    refusal = OF_TRL[name]
    with pytest.raises(ValueError, match=f"^[a-z_]+ is .*{re.escape(refusal.instead)}$") as raised:
        make("tdpo.trl", tmp_path, **{name: other_value(name, refusal.unused)})
    assert name in str(raised.value)


@pytest.mark.parametrize("sizes", [{"cp_size": 2, "sp_size": 1}, {"cp_size": 1, "sp_size": 2}])
def test_split_sequences_are_refused(sizes, tmp_path):
    args = TDPOConfig(output_dir=str(tmp_path), use_cpu=USE_CPU)
    args.parallelism_config = SimpleNamespace(**sizes)
    with pytest.raises(ValueError, match=r"^parallelism_config splits sequences"):
        refuse(args, OF_TRANSFORMERS)


@pytest.mark.parametrize("use_cpu", [False, True])
def test_float16_on_a_cpu_is_refused(use_cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: use_cpu)
    with pytest.raises(ValueError, match=r"^fp16 is True"):
        TDPOConfig(output_dir=str(tmp_path), use_cpu=use_cpu, fp16=True)


def test_the_body_of_a_policy_can_be_compiled_as_its_refusal_says(tmp_path):
    graphs, losses = [], []

    def backend(graph, examples):
        graphs.append(graph)
        return graph.forward

    for compiled in (False, True):
        trainer = make("tdpo", tmp_path, max_steps=1)
        if compiled:
            trainer.model.base_model.compile(backend=backend)
        losses.append(trainer.train().training_loss)
    assert graphs
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# ---- what works: as in the trainer without TDPO ----


@pytest.fixture
def globals_restored(monkeypatch):
    """What a trainer sets for the whole process."""
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "0")
    monkeypatch.setitem(integrations.INTEGRATION_TO_CALLBACK, "dvclive", Reporter)
    yield
    torch.use_deterministic_algorithms(False)


def run_of(kind: str, folder: Path, monkeypatch, options: dict) -> Run:
    cleared = []
    monkeypatch.setattr(transformers.trainer, "clear_device_cache", lambda: cleared.append(1))
    run = trained(
        kind, folder, most=3 if "auto_find_batch_size" in options else None, **copy.deepcopy({**STEPS, **options})
    )
    run.cleared = len(cleared)
    return run


@pytest.fixture(scope="module")
def plain_runs(tmp_path_factory):
    """Of each trainer, with the options that no test changes."""
    runs = {}

    def run(kind: str) -> Run:
        if kind not in runs:
            runs[kind] = trained(kind, tmp_path_factory.mktemp("plain"), **STEPS)
        return runs[kind]

    return run


CASES = [(kind, name) for kind in PARENT for name in RUNS] + [("tdpo.trl", name) for name in OF_TRL_ALONE]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_options_work_as_without_tdpo(kind, name, tmp_path, monkeypatch, globals_restored, plain_runs):
    options = {**RUNS, **OF_TRL_ALONE}[name]
    ours = run_of(kind, tmp_path / "ours", monkeypatch, options)
    theirs = run_of(PARENT[kind], tmp_path / "theirs", monkeypatch, options)
    for option in ("output_dir", *options):
        shown = SHOWS[option](ours)
        assert shown == SHOWS[option](theirs), option
        if option not in SAME and not option.endswith("_kwargs"):
            try:
                before = SHOWS[option](plain_runs(kind))
            except (AttributeError, TypeError, IndexError, KeyError, ValueError):
                continue  # nothing of the kind happens there
            assert shown != before, option


# ---- what needs two trainings, or none ----


@pytest.mark.parametrize("kind", PARENT)
def test_data_are_skipped_or_not(kind, tmp_path):
    orders = {}
    for trainer in (kind, PARENT[kind]):
        folder = tmp_path / trainer
        first = trained(trainer, folder, max_steps=2, save_strategy="steps", save_steps=2).recorder.batches
        for skip in (True, False):
            options = {"max_steps": 3, "ignore_data_skip": not skip}
            orders[trainer, skip] = trained(trainer, folder, resume=True, **options).recorder.batches
        assert orders[trainer, False][0] == first[0]
        assert not set(orders[trainer, True][0]) & {*first[0], *first[1]}
    assert orders[kind, False][0] == orders[PARENT[kind], False][0]


@pytest.mark.parametrize("kind", PARENT)
@pytest.mark.parametrize("restored", [False, True])
def test_callbacks_resume(restored, kind, tmp_path):
    states = []
    for trainer in (kind, PARENT[kind]):
        stop = EarlyStoppingCallback(5)
        options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
        options |= {"metric_for_best_model": "loss", "load_best_model_at_end": True}
        trained(trainer, tmp_path / trainer, callbacks=[stop], max_steps=1, **options)
        stop = EarlyStoppingCallback(9)
        options["restore_callback_states_from_checkpoint"] = restored
        run = trained(trainer, tmp_path / trainer, resume=True, callbacks=[stop], max_steps=2, **options)
        kept = [c for c in run.trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        states.append([callback.early_stopping_patience for callback in kept])
    assert states[0] == states[1] == [5 if restored else 9]


class Hub:
    def __init__(self):
        self.asked = []

    def create_repo(self, name, **options):
        self.asked.append((name, options.get("token"), options.get("private")))
        return SimpleNamespace(repo_id=name)


@pytest.mark.parametrize("kind", PARENT)
def test_what_a_hub_is_asked_for(kind, tmp_path, monkeypatch):
    asked = []
    for trainer in (kind, PARENT[kind]):
        asked.append(Hub())
        monkeypatch.setattr(transformers.trainer, "hf_api", lambda: asked[-1])
        options = {"hub_model_id": "me/mine", "hub_token": "secret", "hub_private_repo": True}
        watched(trainer, tmp_path, push_to_hub=True, **options)
    assert asked[0].asked == asked[1].asked == [("me/mine", "secret", True)]


def test_lengths_are_at_most_so_many_tokens(tmp_path):
    trainer = make("tdpo", tmp_path, max_length=18, max_prompt_length=10)
    lengths = [len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in trainer.train_dataset]
    assert max(lengths) == 18
    assert max(len(row["prompt_ids"]) for row in trainer.train_dataset) == 10


def test_pairs_of_a_prompt_are_at_most_so_many(tmp_path):
    row = {"prompt": "a", "responses": [" b", " c", " d"], "scores": [3.0, 1.0, 2.0]}
    rows = Dataset.from_list(4 * [row])
    numbers = []
    for most in (None, 2):
        args = TDPOConfig(output_dir=str(tmp_path), use_cpu=USE_CPU, pairing="all", pairs_per_prompt=most)
        trainer = TDPOTrainer(make_model("llama"), args=args, train_dataset=rows, processing_class=make_tokenizer())
        numbers.append(len(trainer.train_dataset))
    assert numbers == [12, 8]


def test_every_option_that_works_is_shown():
    elsewhere = {"ignore_data_skip", "restore_callback_states_from_checkpoint"}
    elsewhere |= {"max_length", "hub_token", "hub_private_repo", "hub_model_id"}
    walked = {"output_dir"}.union(*RUNS.values(), *OF_TRL_ALONE.values())
    for name, entry in ALL.items():
        if WORKS in (entry.native, entry.trl) and entry.shown is None:
            assert name in walked | elsewhere, name
    assert ROWS % STEPS["per_device_train_batch_size"]  # so that a last batch can be dropped
