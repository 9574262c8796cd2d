"""The reference's hidden states on disk: equal to a live reference, resumable, and refused when stale or corrupt."""

import json

import numpy as np
import pytest
import torch
from model_families import make_model
from tdpo import ReferenceCache, cache_reference, reference_cache, tokenize_preferences
from trainer_cases import losses, make_trainer, run_python


@pytest.fixture(scope="module")
def tokens(tokenizer, preferences):
    return tokenize_preferences(preferences, tokenizer, 40, 16)


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("own", [True, False], ids=["the policy's start", "another model"])
def test_training_from_the_cache_equals_a_live_reference(own, padding_free, tmp_path):
    curves, evaluations = [], []
    for cached in (False, True):
        trainer = make_trainer(
            tmp_path / str(cached),
            model=make_model("llama", 0),
            ref_model=None if own else make_model("llama", 1),
            precompute_reference=cached,
            reference_dtype="float32",
            padding_free=padding_free,
        )
        assert (trainer.ref_model is None) == cached
        trainer.train()
        curves.append(losses(trainer))
        evaluations.append(trainer.evaluate())
    assert curves[1] == pytest.approx(curves[0], rel=1e-5, abs=1e-7)
    for name in ("eval_loss", "eval_kl/chosen", "eval_rewards/margins"):
        assert evaluations[1][name] == pytest.approx(evaluations[0][name], rel=1e-4, abs=1e-6), name


def test_every_evaluation_split_has_its_metrics(tmp_path, preferences):
    splits = {"short": preferences.select(range(4)), "long": preferences.select(range(4, 12))}
    evaluations = []
    for cached in (False, True):
        trainer = make_trainer(
            tmp_path / str(cached),
            model=make_model("llama", 0),
            ref_model=make_model("llama", 1),
            eval_dataset=splits,
            precompute_reference=cached,
            reference_dtype="float32",
        )
        evaluations.append(trainer.evaluate())
    for split in splits:
        for name in (f"eval_{split}_loss", f"eval_{split}_kl/chosen"):
            assert evaluations[1][name] == pytest.approx(evaluations[0][name], rel=1e-5)
    assert evaluations[0]["eval_short_loss"] != evaluations[0]["eval_long_loss"]


def test_caches_belong_to_the_splits_of_the_trainer(tmp_path, preferences):
    splits = {"short": preferences.select(range(4)), "long": preferences.select(range(4, 12))}
    options = {"precompute_reference": True, "model": make_model("llama", 0), "ref_model": make_model("llama", 1)}
    trainer = make_trainer(tmp_path, eval_dataset=splits, **options)
    by_name = trainer.evaluate()
    given = trainer.evaluate(trainer.eval_dataset["short"])
    assert given["eval_kl/chosen"] == by_name["eval_short_kl/chosen"]
    trainer.train_dataset = trainer.train_dataset.select(range(4))
    with pytest.raises(ValueError, match="has no cache"):
        trainer.get_train_dataloader()
    with pytest.raises(ValueError, match="split 'train'"):
        make_trainer(tmp_path, eval_dataset={"train": splits["short"]}, **options)


def test_bfloat16_storage_changes_the_kl_little(tmp_path):
    values = []
    for dtype in ("float32", "bfloat16"):
        trainer = make_trainer(
            tmp_path / dtype,
            model=make_model("llama", 0),
            ref_model=make_model("llama", 1),
            precompute_reference=True,
            reference_dtype=dtype,
        )
        batch = next(iter(trainer.get_train_dataloader()))
        values.append(trainer.model(preference=batch).chosen.kl)
    torch.testing.assert_close(values[1], values[0], rtol=0.02, atol=0)
    assert not torch.equal(values[1], values[0])


def test_an_interrupted_cache_resumes(tmp_path, tokens, monkeypatch):
    model = make_model("gpt2")
    unbroken = cache_reference(tmp_path / "unbroken", model, tokens, 0, "float32", batch=4)
    monkeypatch.setattr(reference_cache, "_ROWS_PER_SAVE", 4)
    crc32, calls = reference_cache.zlib.crc32, []

    def interrupted(data):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return crc32(data)

    monkeypatch.setattr(reference_cache.zlib, "crc32", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache_reference(tmp_path / "parts", model, tokens, 0, "float32", batch=4)
    monkeypatch.setattr(reference_cache.zlib, "crc32", crc32)
    assert json.loads((tmp_path / "parts" / "header.json").read_text())["done"] == 8
    with pytest.raises(ValueError, match=r"not finished: 8 of 24.*tdpo cache-reference"):
        ReferenceCache.open(tmp_path / "parts", model, tokens, "float32")
    parts = cache_reference(tmp_path / "parts", model, tokens, 0, "float32", batch=4)
    for row in range(len(tokens)):
        for side in ("chosen", "rejected"):
            assert torch.equal(parts.hidden(row, side), unbroken.hidden(row, side))


def test_stale_and_corrupt_caches_are_refused(tmp_path, tokens, tokenizer, preferences):
    model, folder = make_model("gpt2"), tmp_path / "cache"
    with pytest.raises(ValueError, match="does not exist"):
        ReferenceCache.open(folder, model, tokens, "bfloat16")
    cache_reference(folder, model, tokens, 0)
    with pytest.raises(ValueError, match=r"another reference weights.*tdpo cache-reference"):
        ReferenceCache.open(folder, make_model("gpt2", seed=7), tokens, "bfloat16")
    shorter = tokenize_preferences(preferences, tokenizer, 12, 5)
    with pytest.raises(ValueError, match="another tokenized data"):
        ReferenceCache.open(folder, model, shorter, "bfloat16")
    with pytest.raises(ValueError, match="another reference, other data"):
        cache_reference(folder, model, shorter, 0)
    with pytest.raises(ValueError, match="dtype"):
        cache_reference(folder, model, tokens, 0, dtype="int8")

    stored = np.memmap(folder / "hidden.bin", np.uint16, "r+")
    stored[7] ^= 1
    stored.flush()
    cache = ReferenceCache.open(folder, model, tokens, "bfloat16")
    with pytest.raises(ValueError, match=r"corrupt: row 0 .*tdpo cache-reference"):
        cache.hidden(0, "chosen")
    with open(folder / "hidden.bin", "r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=r"corrupt.*sizes"):
        ReferenceCache.open(folder, model, tokens, "bfloat16")


def test_nothing_in_a_cache_is_unpickled(tmp_path, tokens):
    folder = tmp_path / "cache"
    cache_reference(folder, make_model("gpt2"), tokens, 0)
    np.save(folder / "offsets.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="pickle"):
        cache_reference(folder, make_model("gpt2"), tokens, 0)


PEAK = """
import sys

import torch
from trainer_cases import make_trainer
from transformers import LlamaConfig, LlamaForCausalLM

folder, kind, cache = sys.argv[1:]
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=300, hidden_size=768, intermediate_size=3072, num_hidden_layers=8, num_attention_heads=8
)
trainer = make_trainer(
    folder,
    model=LlamaForCausalLM(config),
    max_steps=1,
    optim="sgd",
    precompute_reference=kind == "cached",
    reference_cache=cache,
)
trainer.train()
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024)
"""


@pytest.mark.slow
def test_peak_memory_with_a_cache_is_lower(tmp_path):
    def peak(kind):
        done = run_python("-c", PEAK, str(tmp_path / kind), kind, str(tmp_path / "cache"), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return float(done.stdout.split()[-1])

    parameters = 8 * (4 * 768**2 + 3 * 768 * 3072) * 4 / 2**20  # MiB of a second model
    assert peak("cached") < peak("live") - 0.7 * parameters
