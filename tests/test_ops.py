"""The operators themselves: schemas, fakes and instruction sets."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import random_rows

from tdpo_ext import ops

HERE = os.path.dirname(__file__)  # subprocesses run here: in the source tree they would import it


def operator_samples():
    logits, ref_logits, labels = random_rows(4, 33, ignored=[2])
    options = (0, 33, -100, 0.9, 0.0)
    states = ops.row_states(logits, ref_logits, labels, *options)
    upstream = (torch.randn(4), torch.randn(4))
    a, b = torch.randn(5, 7).bfloat16(), torch.randn(7, 3).bfloat16()
    return {
        "row_states": (logits, ref_logits, labels, *options),
        "merge_row_states": (torch.stack([states, states]),),
        "finalize_row_states": (states, labels, -100, 0.9),
        "logit_gradient": (logits, ref_logits, labels, states, *upstream, *options),
        "logit_gradient_out": (logits, ref_logits, labels, states, *upstream, *options, torch.empty_like(logits)),
        "token_divergence": (logits.clone().requires_grad_(), ref_logits, labels, *options, ""),
        "matmul_float32": (a, b, False, torch.zeros(5, 3)),
    }


@pytest.mark.parametrize("name", list(operator_samples()))
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.tdpo_ext, name).default, operator_samples()[name])


@pytest.mark.parametrize("vocab", [33, 5000])
def test_slices_merge_to_the_whole(vocab):
    logits, ref_logits, labels = random_rows(6, vocab, torch.float64)
    whole = ops.row_states(logits, ref_logits, labels, 0, vocab, -100, 1.0, 0.0)
    cuts = [0, 1, vocab // 3, vocab]
    slices = [
        ops.row_states(logits[:, a:b], ref_logits[:, a:b], labels, a, vocab, -100, 1.0, 0.0)
        for a, b in itertools.pairwise(cuts)
    ]
    merged = ops.merge_row_states(torch.stack(slices))
    for value, expected in zip(
        ops.finalize_row_states(merged, labels, -100, 1.0), ops.finalize_row_states(whole, labels, -100, 1.0)
    ):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_in_place_and_narrowed(out_dtype):
    logits, ref_logits, labels = random_rows(5, 507)
    options = (0, 507, -100, 1.0, 0.0)
    states = ops.row_states(logits, ref_logits, labels, *options)
    upstream = (torch.randn(5), torch.tensor([0.5, 0.0, -1.0, 0.0, 2.0]))
    expected = ops.logit_gradient(logits, ref_logits, labels, states, *upstream, *options)
    out = logits.clone() if out_dtype == torch.float32 else torch.empty(5, 507, dtype=out_dtype)
    source = out if out_dtype == torch.float32 else logits
    ops.logit_gradient_out(source, ref_logits, labels, states, *upstream, *options, out)
    assert torch.equal(out, expected.to(out_dtype))


def test_reference_is_not_read_without_a_kl_gradient():
    logits, ref_logits, labels = random_rows(3, 100)
    options = (0, 100, -100, 1.0, 0.0)
    states = ops.row_states(logits, ref_logits, labels, *options)
    upstream = (torch.randn(3), torch.zeros(3))
    expected = ops.logit_gradient(logits, ref_logits, labels, states, *upstream, *options)
    nothing = torch.full_like(ref_logits, torch.nan)
    assert torch.equal(expected, ops.logit_gradient(logits, nothing, labels, states, *upstream, *options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("m", [1, 5, 130])
@pytest.mark.parametrize("k", [1, 64, 1025])
@pytest.mark.parametrize("n", [3, 500])
@pytest.mark.parametrize("transposed", [False, True])
def test_matmul_float32(dtype, m, k, n, transposed):
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    if transposed:
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    truth = a.double() @ b.double()
    out = torch.full((m, n), torch.nan)
    ops.matmul_float32(a, b, False, out)
    tolerance = 4e-6 * k**0.5
    torch.testing.assert_close(out.double(), truth, rtol=tolerance, atol=tolerance)
    ops.matmul_float32(a, b, True, out)
    torch.testing.assert_close(out.double(), 2 * truth, rtol=tolerance, atol=2 * tolerance)


PRINT_VALUES = """
import json, torch, tdpo_ext
from conftest import random_rows
torch.manual_seed(0)
found = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    logits, ref_logits, labels = random_rows(4, 507, dtype)
    logits[0, 3], ref_logits[1, 5] = -torch.inf, -torch.inf
    leaf = logits.requires_grad_()
    d = tdpo_ext.token_divergence(leaf, ref_logits, labels, softcap=20.0 if dtype == torch.float16 else None)
    (d.logps - 0.3 * torch.where(d.kl.isfinite(), d.kl, 0)).sum().backward()
    found[str(dtype)] = [d.logps.tolist(), d.kl.nan_to_num(posinf=-1).tolist(), leaf.grad.double().norm().item()]
print(json.dumps([tdpo_ext.build_info()["cpu_capability"], found]))
"""


def values_under(capability):
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": HERE}
    done = subprocess.run(
        [sys.executable, "-c", PRINT_VALUES], env=environment, capture_output=True, text=True, cwd=HERE
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_instruction_set_gives_the_same():
    baseline, expected = values_under("default")
    assert baseline in ("DEFAULT", "NO AVX", "default")
    for capability in ("avx2", "avx512"):
        _, found = values_under(capability)
        for dtype, (logps, kl, norm) in found.items():
            torch.testing.assert_close(torch.tensor(logps), torch.tensor(expected[dtype][0]), rtol=1e-6, atol=2e-6)
            torch.testing.assert_close(torch.tensor(kl), torch.tensor(expected[dtype][1]), rtol=1e-5, atol=1e-6)
            assert norm == pytest.approx(expected[dtype][2], rel=1e-3)
