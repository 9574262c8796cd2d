"""The operators themselves: schemas, fake kernels and instruction sets."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from helpers.logit_cases import REFUSED, random_rows
from tdpo_ext.ops import operators
from tdpo_ext.ops.operators import RowOptions

TESTS = Path(__file__).parent.parent


def operator_samples():
    """Arguments of every operator: (positional, keyword)."""
    logits, ref_logits, labels = random_rows(4, 33, ignored=[2])
    options = RowOptions(vocab_start=0, vocab_size=33, temperature=0.9)
    states = operators.row_states(logits, ref_logits, labels, options)
    rows = (logits, ref_logits, labels)
    gradient = (*rows, states, torch.randn(4), torch.randn(4))
    a, b = torch.randn(5, 7).bfloat16(), torch.randn(7, 3).bfloat16()
    return {
        "row_states": (rows, asdict(options)),
        "merge_row_states": ((torch.stack([states, states]),), {"reverse_kl": False}),
        "finalize_row_states": ((states, labels), {"ignore_index": -100, "temperature": 0.9, "reverse_kl": False}),
        "logit_gradient": (gradient, asdict(options)),
        "logit_gradient_out": (gradient, {**asdict(options), "out": torch.empty_like(logits)}),
        "token_divergence": (
            (logits.clone().requires_grad_(), ref_logits, labels),
            {**asdict(options), "group_name": ""},
        ),
        "matmul_float32": ((a, b), {"accumulate": False, "out": torch.zeros(5, 3)}),
        "scale_unless_one": ((torch.randn(5), torch.tensor(0.5)), {}),
    }


@pytest.mark.parametrize("name", list(operator_samples()))
def test_opcheck(name):
    positional, keyword = operator_samples()[name]
    torch.library.opcheck(getattr(torch.ops.tdpo_ext, name).default, positional, keyword)


@pytest.mark.parametrize("vocab", [33, 5000])
def test_slices_merge_to_the_whole(vocab):
    logits, ref_logits, labels = random_rows(6, vocab, torch.float64)
    whole = operators.row_states(logits, ref_logits, labels, RowOptions(vocab_start=0, vocab_size=vocab))
    slices = [
        operators.row_states(
            logits[:, first:stop], ref_logits[:, first:stop], labels, RowOptions(vocab_start=first, vocab_size=vocab)
        )
        for first, stop in itertools.pairwise([0, 1, vocab // 3, vocab])
    ]
    merged = operators.merge_row_states(torch.stack(slices), reverse_kl=False)
    values, expected = (
        operators.finalize_row_states(states, labels, RowOptions(0, vocab)) for states in (merged, whole)
    )
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_in_place_and_narrowed(out_dtype):
    logits, ref_logits, labels = random_rows(5, 507)
    options = RowOptions(vocab_start=0, vocab_size=507)
    states = operators.row_states(logits, ref_logits, labels, options)
    upstream = {"logps_grad": torch.randn(5), "kl_grad": torch.tensor([0.5, 0.0, -1.0, 0.0, 2.0])}
    expected = operators.logit_gradient(logits, ref_logits, labels, states, **upstream, options=options)
    out = logits.clone() if out_dtype == torch.float32 else torch.empty(5, 507, dtype=out_dtype)
    source = out if out_dtype == torch.float32 else logits
    operators.logit_gradient_out(source, ref_logits, labels, states, **upstream, options=options, out=out)
    assert torch.equal(out, expected.to(out_dtype))


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab", "pitch"), [(5, 507, 507), (5, 507, 512), (1, 40_000, 40_000), (3, 1, 1)])
@pytest.mark.parametrize("same_reference", [False, True])
def test_a_narrower_gradient_over_the_logits(out_dtype, rows, vocab, pitch, same_reference):
    """Rows that begin where those of the logits do, which are read while they are overwritten; `narrowed`."""
    logits, ref_logits, labels = random_rows(rows, vocab, ignored=[1][: rows - 1])
    memory = torch.full((rows, pitch), torch.nan)
    memory[:, :vocab] = logits
    z = memory[:, :vocab]
    r, reference = (z, logits) if same_reference else (ref_logits, ref_logits)
    options = RowOptions(vocab_start=0, vocab_size=vocab)
    states = operators.row_states(logits, reference, labels, options)
    upstream = {"logps_grad": torch.randn(rows), "kl_grad": torch.randn(rows)}
    expected = operators.logit_gradient(logits, reference, labels, states, **upstream, options=options)
    out = operators.narrowed(z, out_dtype)
    assert out.data_ptr() == memory.data_ptr()
    operators.logit_gradient_out(z, r, labels, states, **upstream, options=options, out=out)
    assert torch.equal(out, expected.to(out_dtype))


def test_reference_is_not_read_without_a_kl_gradient():
    logits, ref_logits, labels = random_rows(3, 100)
    options = RowOptions(vocab_start=0, vocab_size=100)
    states = operators.row_states(logits, ref_logits, labels, options)
    upstream = {"logps_grad": torch.randn(3), "kl_grad": torch.zeros(3)}
    expected = operators.logit_gradient(logits, ref_logits, labels, states, **upstream, options=options)
    nothing = torch.full_like(ref_logits, torch.nan)
    unread = operators.logit_gradient(logits, nothing, labels, states, **upstream, options=options)
    assert torch.equal(expected, unread)


def test_scale_unless_one():
    tensor = torch.tensor([1.0, -2.0])
    version = tensor._version
    operators.scale_unless_one(tensor, torch.tensor(1.0))
    assert tensor._version == version  # untouched
    operators.scale_unless_one(tensor, torch.tensor(0.5))
    assert tensor.tolist() == [0.5, -1.0]


@pytest.mark.parametrize("cut", [1, 30, 63])
def test_labels_at_the_border_of_a_slice(cut):
    logits, ref_logits, _ = random_rows(3, 64)
    labels = torch.tensor([cut - 1, cut, min(63, cut + 1)])
    slices = [
        operators.row_states(
            logits[:, first:stop], ref_logits[:, first:stop], labels, RowOptions(vocab_start=first, vocab_size=64)
        )
        for first, stop in ((0, cut), (cut, 64))
    ]
    merged = operators.merge_row_states(torch.stack(slices), reverse_kl=False)
    logps = operators.finalize_row_states(merged, labels, RowOptions(0, 64))[0]
    expected = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(logps, expected)


PRINT_VALUES = """
import json, torch, tdpo_ext
from helpers.logit_cases import REFUSED, random_rows
torch.manual_seed(0)
found = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    logits, ref_logits, labels = random_rows(4, 507, dtype)
    logits[0, 3], ref_logits[1, 5] = -torch.inf, -torch.inf
    leaf = logits.requires_grad_()
    if dtype == torch.float32:
        with torch.no_grad():
            leaf[2].mul_(1e4)  # products of large logits are rounded after the maximum is subtracted
            ref_logits[2] = leaf[2] + 0.5 * torch.randn(507)
    d = tdpo_ext.token_divergence(leaf, ref_logits, labels, softcap=20.0 if dtype == torch.float16 else None)
    (d.logps - 0.3 * torch.where(d.kl.isfinite(), d.kl, 0)).sum().backward()
    found[str(dtype)] = [d.logps.tolist(), d.kl.nan_to_num(posinf=-1).tolist(), leaf.grad.double().norm().item()]
print(json.dumps([tdpo_ext.build_info()["cpu_capability"], found]))
"""


def values_under(capability, folder):
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [sys.executable, "-c", PRINT_VALUES], env=environment, capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_instruction_set_gives_the_same(tmp_path):
    baseline, expected = values_under("default", tmp_path)
    assert baseline in ("DEFAULT", "NO AVX", "default")
    for capability in ("avx2", "avx512"):
        _, found = values_under(capability, tmp_path)
        for dtype, (logps, kl, norm) in found.items():
            torch.testing.assert_close(torch.tensor(logps), torch.tensor(expected[dtype][0]), rtol=1e-6, atol=2e-6)
            torch.testing.assert_close(torch.tensor(kl), torch.tensor(expected[dtype][1]), rtol=1e-5, atol=1e-6)
            assert norm == pytest.approx(expected[dtype][2], rel=1e-3)


def gradient_call(logits, ref_logits, labels, out, vocab_start=0):
    vocab = logits.shape[1]
    options = RowOptions(vocab_start=vocab_start, vocab_size=vocab)
    states = operators.row_states(logits, ref_logits, labels.clamp(max=vocab - 1), RowOptions(0, vocab))
    zeros = torch.zeros(len(logits))
    operators.logit_gradient_out(
        logits, ref_logits, labels, states, logps_grad=zeros, kl_grad=zeros, options=options, out=out
    )


def test_operators_refuse_overlapping_outputs():
    memory = torch.randn(2, 4, 64)
    logits, ref_logits, labels = memory[0], memory[1], torch.tensor([1, 2, 3, 4])
    gradient_call(logits, ref_logits, labels, out=torch.empty(4, 64))
    for message, out in (
        ("out overlaps ref_logits", ref_logits),
        ("out overlaps logits", memory.view(-1)[8 : 8 + 256].view(4, 64)),
        ("overlap each other", torch.empty(64).expand(4, 64)),
    ):
        with pytest.raises(REFUSED, match=message):
            gradient_call(logits, ref_logits, labels, out=out)
    for message, out in (
        ("out overlaps ref_logits", operators.narrowed(ref_logits, torch.bfloat16)),
        ("out overlaps logits", logits.view(torch.bfloat16)[:, 1:65]),
        ("out overlaps logits", logits.view(torch.bfloat16).view(-1)[:256].view(4, 64)),  # of other rows
    ):
        with pytest.raises(REFUSED, match=message):
            gradient_call(logits, ref_logits, labels, out=out)
    gradient_call(logits, ref_logits, labels, out=operators.narrowed(logits, torch.bfloat16))
    gradient_call(logits, ref_logits, labels, out=logits)  # in place
    square = torch.randn(8, 8)
    for name, a, b in (("a", square, torch.randn(8, 8)), ("b", torch.randn(8, 8), square)):
        with pytest.raises(ValueError, match=f"out overlaps {name}"):
            operators.matmul_float32(a, b, accumulate=False, out=square)
    with pytest.raises(ValueError, match="rows overlap"):
        operators.matmul_float32(
            torch.randn(8, 8), torch.randn(8, 8), accumulate=False, out=torch.empty(8).expand(8, 8)
        )


@pytest.mark.parametrize("first", [0, 64, 127, 128, 192, 255, 256])
def test_outputs_may_touch_operands_but_not_share_an_entry(first):
    """Operands are entries 128 to 192 of a piece of memory, and the output 64 others of it."""
    memory = torch.randn(320)
    a, out = memory[128:192].view(8, 8), memory[first : first + 64].view(8, 8)
    b, labels = torch.randn(8, 8), torch.arange(8)
    shared = 64 < first < 192
    for name in ("a", "b"):
        operands = {"a": b, "b": b, name: a}
        expected = operands["a"] @ operands["b"]
        if shared:
            with pytest.raises(ValueError, match=f"out overlaps {name}"):
                operators.matmul_float32(**operands, accumulate=False, out=out)
        else:
            operators.matmul_float32(**operands, accumulate=False, out=out)
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    if shared:
        with pytest.raises(REFUSED, match="out overlaps ref_logits"):
            gradient_call(b, a, labels, out=out)
    else:
        gradient_call(b, a, labels, out=out)


@pytest.mark.parametrize("label", [64, -1, -(1 << 40)])
def test_gradients_refuse_labels_out_of_range(label):
    logits, ref_logits, labels = torch.randn(4, 64), torch.randn(4, 64), torch.tensor([1, 2, 3, label])
    options = RowOptions(vocab_start=0, vocab_size=64)
    states, zeros = torch.zeros(4, operators.STATE_SIZE), torch.zeros(4)
    with pytest.raises(IndexError, match=f"labels hold {label}"):
        operators.logit_gradient(logits, ref_logits, labels, states, logps_grad=zeros, kl_grad=zeros, options=options)


@pytest.mark.parametrize("start", [-1, 1, 1 << 62])
def test_slices_outside_the_vocabulary_are_refused(start):
    logits, ref_logits, labels = random_rows(4, 64)
    with pytest.raises(REFUSED, match="vocab_start"):
        operators.row_states(logits, ref_logits, labels, RowOptions(vocab_start=start, vocab_size=64))


FORK = """
import os, signal, threading, torch
from tdpo_ext.ops import memory
busy = True
def churn():
    while busy:
        del_me = [memory.empty((9 << 20,), torch.uint8, torch.device("cpu")) for _ in range(3)]
threads = [threading.Thread(target=churn) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(150):
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a deadlocked child ends by this
        memory.empty((9 << 20,), torch.uint8, torch.device("cpu"))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        busy = False
        raise SystemExit(f"the child ended with status {status}")
busy = False
"""


@pytest.mark.slow
def test_forks_do_not_inherit_a_held_lock(tmp_path):
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
