"""The reference's hidden states on disk: equal to a live reference, resumable, and refused when stale or corrupt."""

import errno
import json
import os
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tdpo import (
    CausalLM,
    PreferenceCollator,
    ReferenceCache,
    cache_reference,
    tokenize_preferences,
)
from tdpo.reference import cache as reference_cache
from tdpo.reference.stored_states import STORED_STATES

from helpers.damage import flip_bit
from helpers.model_families import make_model
from helpers.trainer_cases import losses, make_trainer, run_python

SHARD = "00000.safetensors"
IN_FLOAT32 = {"precompute_reference": True, "reference_dtype": "float32"}


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
            **(IN_FLOAT32 if cached else {}),
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
            **(IN_FLOAT32 if cached else {}),
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


def test_float8_keeps_a_scale_of_every_token(tmp_path, tokens):
    model = make_model("llama")
    model.model.norm.weight.data *= 1000  # beyond what float8 holds without a scale
    exact = responses(cache_reference(tmp_path / "float32", model, tokens, 0, "float32"), tokens)
    cache = cache_reference(tmp_path / "float8", model, tokens, 0, "float8")
    for stored, expected in zip(responses(cache, tokens), exact, strict=True):
        assert expected.abs().max() > torch.finfo(torch.float8_e4m3fn).max
        scales = expected.abs().amax(dim=1, keepdim=True) / 448
        rounding = (expected.abs() / 16).maximum(scales * 2**-10)  # three bits of mantissa, and its smallest steps
        assert ((stored - expected).abs() <= rounding).all()
    count, width = sum(map(len, exact)), exact[0].shape[1]
    sizes = {dtype: (tmp_path / dtype / SHARD).stat().st_size for dtype in ("float32", "float8")}
    for dtype, size in {"float32": count * width * 4, "float8": count * (width + 4)}.items():
        assert size <= sizes[dtype] <= size + 300  # with the shard's own header


def test_float8_of_zeros_is_zero():
    states = torch.zeros(3, 8)
    states[1, 2] = -5
    assert torch.equal(STORED_STATES["float8"].unpack(STORED_STATES["float8"].pack(states)), states)


def test_the_size_is_said_beforehand_and_refused_where_the_disk_lacks_room(tmp_path, tokens, monkeypatch, capsys):
    model = make_model("gpt2")
    cache = cache_reference(tmp_path / "fits", model, tokens, 0)
    width = model.config.n_embd
    size = 2 * width * sum(map(len, responses(cache, tokens)))
    said = capsys.readouterr().err
    assert said.startswith(f"The reference cache {tmp_path / 'fits'} takes {size / 1e9:.2f} GB (")
    assert f"response tokens of {2 * width} bytes" in said.splitlines()[0]
    cache_reference(tmp_path / "fits", model, tokens, 0)
    assert "takes" not in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=size - 1))
    with pytest.raises(OSError, match=rf"needs {size:,} bytes, but {size - 1:,} are free.*short"):
        cache_reference(tmp_path / "short", model, tokens, 0)
    assert not list((tmp_path / "short").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=size))
    assert torch.equal(
        cache_reference(tmp_path / "short", model, tokens, 0).hidden(3, "chosen"), cache.hidden(3, "chosen")
    )


def test_an_interrupted_cache_resumes(tmp_path, tokens, monkeypatch):
    model = make_model("gpt2")
    whole = responses(cache_reference(tmp_path / "whole", model, tokens, 0, "float32", batch=2), tokens)
    monkeypatch.setattr(reference_cache, "_SHARD_ROWS", 4)
    states, calls = reference_cache._states, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 6:  # the second half of the third shard
            raise KeyboardInterrupt
        return states(*arguments)

    monkeypatch.setattr(reference_cache, "_states", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache_reference(tmp_path / "parts", model, tokens, 0, "float32", batch=2)
    monkeypatch.setattr(reference_cache, "_states", states)
    shards = json.loads((tmp_path / "parts" / "header.json").read_text())["shards"]
    assert len(shards) == 2
    left = (tmp_path / "parts" / "reserved.bin").stat().st_size
    size = sum(map(len, whole)) * model.config.n_embd * 4
    assert size - sum(size for size, _ in shards) <= left < size
    with pytest.raises(ValueError, match=r"not finished: 8 of 24.*tdpo cache-reference"):
        ReferenceCache.open(tmp_path / "parts", model, tokens, "float32")
    parts = cache_reference(tmp_path / "parts", model, tokens, 0, "float32", batch=2)
    assert all(map(torch.equal, responses(parts, tokens), whole))
    assert not (tmp_path / "parts" / "reserved.bin").exists()


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
    with pytest.raises(ValueError, match="another tokenized data"):
        cache_reference(folder, model, shorter, 0)
    with pytest.raises(ValueError, match="dtype"):
        cache_reference(folder, model, tokens, 0, dtype="int8")


def responses(cache, tokens):
    """Every response's hidden states, read from a cache."""
    return [cache.hidden(row, side) for row in range(len(tokens)) for side in ("chosen", "rejected")]


def opened(folder, model, tokens):
    return responses(ReferenceCache.open(folder, model, tokens, "bfloat16"), tokens)


@pytest.mark.parametrize("name", ["header.json", SHARD])
def test_flipped_bits_are_detected_or_harmless(name, tmp_path, tokens):
    model, tokens = make_model("gpt2"), tokens.select(range(6))
    folder = tmp_path / "cache"
    cache_reference(folder, model, tokens, 0)
    before, intact = (folder / name).read_bytes(), opened(folder, model, tokens)
    bits = random.Random(0).sample(range(8 * len(before)), min(8 * len(before), 150))
    refused = []
    for bit in bits:
        flip_bit(folder / name, bit)
        try:
            assert all(map(torch.equal, opened(folder, model, tokens), intact)), bit
        except ValueError as error:
            refused.append(str(error))
        (folder / name).write_bytes(before)
    # Of the header, some flips only turn white space into other white space.
    assert all(f"{folder} is corrupt" in message or "was made with" in message for message in refused)
    assert len(refused) >= (len(bits) if name != "header.json" else 0.9 * len(bits))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("header.json", b"", r"header.json is damaged: it is not valid JSON"),
        ("header.json", b"[]", r"header.json is damaged"),
        ("header.json", b"\xff{}", r"header.json is damaged"),
        (SHARD, b"", f"{SHARD} has 0 bytes, not"),
        (SHARD, "zeros", f"{SHARD} does not match its digest"),
        (SHARD, None, f"{SHARD} is missing"),
    ],
)
def test_damaged_files_are_named(name, content, message, tmp_path, tokens):
    model = make_model("gpt2")
    cache_reference(tmp_path, model, tokens, 0)
    size = (tmp_path / name).stat().st_size
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(bytes(size) if content == "zeros" else content)
    for use in (ReferenceCache.open, cache_reference):
        with pytest.raises(ValueError, match=f"corrupt: .*{message}.*tdpo cache-reference"):
            use(tmp_path, model, tokens, *([0] if use is cache_reference else []), "bfloat16").hidden(3, "chosen")


def test_the_fingerprint_covers_both_responses_and_the_prompt(tmp_path, tokens):
    model = make_model("gpt2")
    cache_reference(tmp_path, model, tokens, 0)
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        changed = [dict(row) for row in tokens]
        changed[3][column] = [*changed[3][column][:-1], 7]  # as many tokens, so that sizes agree
        with pytest.raises(ValueError, match="another tokenized data"):
            ReferenceCache.open(tmp_path, model, Dataset.from_list(changed), "bfloat16")


def test_rows_without_a_prompt_and_dropped_rows(tmp_path, tokenizer):
    """Of a sequence without a prompt nothing predicts the first token; of dropped rows nothing is cached."""
    rows = [
        {"prompt": "the film", "chosen": " good", "rejected": " good"},  # dropped
        {"prompt": "", "chosen": " great good fun", "rejected": " bad"},
        {"prompt": "the film was", "chosen": " great", "rejected": " bad plot"},
        {"prompt": "", "chosen": "a", "rejected": "b good plot"},
    ]
    model, tokens = make_model("llama"), tokenize_preferences(Dataset.from_list(rows), tokenizer, 40, 16)
    cache = cache_reference(tmp_path, model, tokens, 0, "float32", batch=2)
    collate = PreferenceCollator(pad_token_id=0, stored_hidden=cache.hidden)
    for picked in ([0], [2], [2, 0, 1]):
        batch = collate([tokens[row] for row in picked])
        with torch.no_grad():
            live = CausalLM.of(model).hidden(**batch).flatten(0, 1)[batch["rows"]]
        torch.testing.assert_close(batch["ref_hidden"], live, rtol=1e-5, atol=1e-6)


def test_a_full_disk_is_a_clear_error_and_the_cache_resumes(tmp_path, tokens, monkeypatch):
    model, reserve = make_model("gpt2"), os.posix_fallocate

    def full(descriptor, offset, size):
        if size > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: [\d,]+ bytes are needed: .*reserved.bin"):
        cache_reference(tmp_path, model, tokens, 0)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    expected = responses(cache_reference(tmp_path / "other", model, tokens, 0), tokens)
    cache_reference(tmp_path, model, tokens, 0)
    assert all(map(torch.equal, opened(tmp_path, model, tokens), expected))


PEAK = """
import sys

import torch
from helpers.forked import run_forked
from helpers.trainer_cases import make_trainer
from transformers import LlamaConfig, LlamaForCausalLM


def peak(folder, kind, cache):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=768, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=8
    )
    trainer = make_trainer(
        folder,
        model=LlamaForCausalLM(config),
        max_steps=1,
        optim="sgd",
        **({"precompute_reference": True, "reference_cache": cache} if kind == "cached" else {}),
    )
    trainer.train()
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024


folder = sys.argv[1]
print(*(run_forked(peak, folder + "/" + kind, kind, folder + "/cache").result for kind in ("live", "cached")))
"""


@pytest.mark.slow
def test_peak_memory_with_a_cache_is_lower(tmp_path):
    done = run_python("-c", PEAK, str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    live, cached = map(float, done.stdout.split()[-2:])
    parameters = 4 * (4 * 768**2 + 3 * 768 * 3072) * 4 / 2**20  # MiB of a second model
    assert cached < live - 0.7 * parameters
