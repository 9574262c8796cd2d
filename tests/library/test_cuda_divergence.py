"""The CUDA kernels on a GPU (`pytest -m cuda`): against the float64 oracle, eager torch and the CPU kernels."""

import math
import subprocess
import sys

import pytest
import torch

from helpers.cuda_support import gpu, reason_to_skip, values_and_gradient
from helpers.logit_cases import DTYPES, VOCABULARIES, assert_as_good_as_eager, random_rows
from tdpo_ext import TokenDivergence, eager, token_divergence
from tdpo_ext.ops import operators

INF = math.inf


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("rows", [3, 700])
def test_as_good_as_eager_on_gpu(dtype, vocab, rows):
    inputs = [tensor.cuda() for tensor in random_rows(rows if vocab < 60000 else 3, vocab, dtype, 0.5, ignored=[1])]
    ours, grad = values_and_gradient(token_divergence, *inputs)
    eager_values, eager_grad = values_and_gradient(eager.token_divergence, *inputs)
    doubles = (inputs[0].double(), inputs[1].double(), inputs[2])
    truth, true_grad = values_and_gradient(eager.token_divergence, *doubles)
    for name, *values in zip(TokenDivergence._fields, ours, eager_values, truth):
        assert_as_good_as_eager(*values, name)
    assert_as_good_as_eager(grad, eager_grad, true_grad, "gradient")


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"softcap": 5.0}])
@pytest.mark.parametrize("vocab", [37, 5003])
def test_equals_the_cpu_kernels(dtype, options, vocab):
    inputs = random_rows(9, vocab, dtype, 0.5, ignored=[4])
    ours, grad = values_and_gradient(token_divergence, *(tensor.cuda() for tensor in inputs), **options)
    cpu, cpu_grad = values_and_gradient(token_divergence, *inputs, **options)
    for name, value, expected in zip(TokenDivergence._fields, ours, cpu):
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=2e-6, msg=name)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.cpu(), cpu_grad, rtol=4 * rounding + 1e-6, atol=rounding * 1e-2 + 1e-7)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [8, 507, 9000])
def test_edge_values_on_gpu(dtype, vocab):
    logits, ref_logits, labels = random_rows(7, vocab, dtype)
    labels[:] = 1
    labels[5] = labels[6] = -100
    logits[0, 3] = ref_logits[0, 3] = -INF  # masked in both
    ref_logits[1, 3] = -INF  # q = 0
    logits[2, 3] = -INF  # p = 0 where q > 0
    ref_logits[3, 3] = -3e4  # q underflows
    logits[4], ref_logits[4] = 1e4 * torch.sign(logits[4]), 1e4 * torch.sign(logits[4])
    logits[5], ref_logits[6] = math.nan, INF  # ignored
    inputs = [tensor.cuda() for tensor in (logits, ref_logits, labels)]
    ours, grad = values_and_gradient(token_divergence, *inputs)
    truth, true_grad = values_and_gradient(eager.token_divergence, inputs[0].double(), inputs[1].double(), inputs[2])
    assert ours.kl[2] == INF
    for name, value, expected in zip(TokenDivergence._fields, ours, truth):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5, msg=name)
    assert all(value[5] == value[6] == 0 for value in ours)
    assert not grad[5:].any()
    kept = [0, 1, 3, 4]
    tolerance = 4 * torch.finfo(dtype).eps + 1e-6
    torch.testing.assert_close(grad.double()[kept], true_grad[kept], rtol=tolerance, atol=tolerance)


@gpu
@pytest.mark.parametrize("offsets", [(0, 1), (1, 1), (3, 0)])
def test_any_alignment_on_gpu(offsets):
    logits, ref_logits, labels = (tensor.cuda() for tensor in random_rows(6, 4001, torch.bfloat16))
    expected, expected_grad = values_and_gradient(token_divergence, logits, ref_logits, labels)

    def shifted(tensor, offset):
        wide = torch.zeros(6, 4001 + offset + 2, dtype=tensor.dtype, device="cuda")
        wide[:, offset : offset + 4001] = tensor
        return wide[:, offset : offset + 4001]

    ours, grad = values_and_gradient(
        token_divergence, shifted(logits, offsets[0]), shifted(ref_logits, offsets[1]), labels
    )
    torch.testing.assert_close(ours.kl, expected.kl, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-2, atol=1e-5)


@gpu
def test_repeatable():
    inputs = [tensor.cuda() for tensor in random_rows(5, 151936, torch.bfloat16)]
    first, first_grad = values_and_gradient(token_divergence, *inputs)
    for _ in range(3):
        again, grad = values_and_gradient(token_divergence, *inputs)
        assert all(torch.equal(a, b) for a, b in zip(again, first))
        assert torch.equal(grad, first_grad)


@gpu
def test_other_streams_and_graph_capture():
    logits, ref_logits, labels = (tensor.cuda() for tensor in random_rows(9, 50257, torch.bfloat16))
    expected, expected_grad = values_and_gradient(token_divergence, logits, ref_logits, labels)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other, other_grad = values_and_gradient(token_divergence, logits, ref_logits, labels)
    stream.synchronize()
    assert torch.equal(other.kl, expected.kl)
    assert torch.equal(other_grad, expected_grad)
    graph, leaf = torch.cuda.CUDAGraph(), logits.clone().requires_grad_()
    with torch.cuda.graph(graph):
        captured = token_divergence(leaf, ref_logits, labels)
        (grad,) = torch.autograd.grad(captured.logps.sum() - 0.3 * captured.kl.sum(), leaf)
    with torch.no_grad():
        leaf.copy_(logits)
    graph.replay()
    assert torch.equal(captured.kl, expected.kl)
    assert torch.equal(grad, expected_grad)


@gpu
@pytest.mark.skipif(bool(reason_to_skip(2)), reason=reason_to_skip(2))
def test_second_device():
    inputs = random_rows(5, 9001, torch.bfloat16)
    first, first_grad = values_and_gradient(token_divergence, *(tensor.to("cuda:0") for tensor in inputs))
    second, second_grad = values_and_gradient(token_divergence, *(tensor.to("cuda:1") for tensor in inputs))
    assert torch.equal(first.kl.cpu(), second.kl.cpu())
    assert torch.equal(first_grad.cpu(), second_grad.cpu())


@gpu
def test_large_offsets_on_gpu():
    rows, vocab = 9000, 250_000  # 2.25e9 entries: 4.5 GB, and as much for the gradient
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of free GPU memory")
    row = torch.randn(2, vocab, device="cuda").half()
    logits = torch.zeros(rows, vocab, dtype=torch.float16, device="cuda")
    logits[0], logits[-1] = row[0], row[1]
    labels = torch.full((rows,), -100, device="cuda")
    labels[0], labels[-1] = 5, 7
    ours, grad = values_and_gradient(token_divergence, logits, logits, labels)
    expected, expected_grad = values_and_gradient(token_divergence, row, row, torch.tensor([5, 7], device="cuda"))
    torch.testing.assert_close(ours.logps[[0, -1]], expected.logps)
    torch.testing.assert_close(grad[[0, -1]], expected_grad)
    assert not grad[1:-1].any()


@gpu
@pytest.mark.parametrize("vocab", [9, 5003, 151936])  # a warp a row, a CTA a row, several CTAs a row
def test_bad_label_trips_a_device_assertion(vocab):
    code = (
        "import torch, tdpo_ext\n"
        f"logits = torch.zeros(2, {vocab}, device='cuda')\n"
        f"tdpo_ext.token_divergence(logits, logits, torch.tensor([1, {vocab}], device='cuda'))\n"
        "torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode != 0
    assert f"labels hold {vocab}" in done.stdout + done.stderr


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_unless_one(dtype):
    values = torch.randn(1000, 3, device="cuda").to(dtype)
    for factor in (1.0, 0.3):
        scaled, by = values.clone(), torch.tensor(factor, device="cuda", dtype=operators.state_dtype(dtype))
        operators.scale_unless_one(scaled, by)
        assert torch.equal(scaled, values * factor)
