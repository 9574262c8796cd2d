"""The CUDA kernels on a GPU (`pytest -m cuda`), and, where nvcc is present, that they compile for every target."""

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import DTYPES, VOCABULARIES, assert_as_good_as_eager, random_rows
from linear_cases import loss_and_gradients, make_case

import tdpo_ext
from tdpo_ext import TokenDivergence, reference, tdpo_loss, token_divergence

CSRC = Path(__file__).parent.parent / "csrc"
ARCHITECTURES = (80, 90, 100)


def _reason() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not tdpo_ext.build_info()["cuda_archs"]:
        return "tdpo_ext was built without CUDA kernels"
    return None


def gpu(test):
    return pytest.mark.cuda(pytest.mark.skipif(_reason() is not None, reason=_reason() or "")(test))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_kernels_compile_for_every_architecture(tmp_path):
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    flags = [
        "-std=c++17",
        "-O3",
        "--extended-lambda",
        "--expt-relaxed-constexpr",
        "-Werror",
        "all-warnings",
        "-Xptxas",
        "-v",
    ]
    source = CSRC / "cuda" / "token_divergence.cu"
    command = ["nvcc", *flags, *targets, "-c", str(source), "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spilling, function = [], ""
    for line in done.stderr.splitlines():
        if "Function properties for" in line:
            function = line.split()[-1]
        found = re.search(r"(\d+) bytes spill stores", line)
        if found and found[1] != "0":
            spilling.append(function)
    # float64 is for tests, and softcapping calls tanh: these may spill a little.
    assert all("Idd" in name or "Lb1E" in name for name in spilling), spilling


def values_and_gradient(function, logits, ref_logits, labels, **options):
    leaf = logits.detach().requires_grad_()
    divergence = function(leaf, ref_logits, labels, **options)
    (divergence.logps.sum() - 0.3 * divergence.kl.sum()).backward()
    return divergence.detach(), leaf.grad


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("rows", [3, 700])
def test_as_good_as_eager_on_gpu(dtype, vocab, rows):
    inputs = [tensor.cuda() for tensor in random_rows(rows if vocab < 60000 else 3, vocab, dtype, 0.5, ignored=[1])]
    ours, grad = values_and_gradient(token_divergence, *inputs)
    eager, eager_grad = values_and_gradient(reference.token_divergence, *inputs)
    doubles = (inputs[0].double(), inputs[1].double(), inputs[2])
    truth, true_grad = values_and_gradient(reference.token_divergence, *doubles)
    for name, *values in zip(TokenDivergence._fields, ours, eager, truth):
        assert_as_good_as_eager(*values, name)
    assert_as_good_as_eager(grad, eager_grad, true_grad, "gradient")


@gpu
def test_repeatable():
    inputs = [tensor.cuda() for tensor in random_rows(5, 151936, torch.bfloat16)]
    first, first_grad = values_and_gradient(token_divergence, *inputs)
    for _ in range(3):
        again, grad = values_and_gradient(token_divergence, *inputs)
        assert all(torch.equal(a, b) for a, b in zip(again, first))
        assert torch.equal(grad, first_grad)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [1 << 30, 90_000, 3_000])
def test_fused_loss_on_gpu(dtype, budget):
    case = make_case(dtype, bias=True)
    for name, value in vars(case).items():
        setattr(case, name, value.cuda())
    objective = functools.partial(tdpo_loss, beta=0.1)
    loss, _, grads = loss_and_gradients(tdpo_ext.linear_preference_loss, case, objective, logits_budget=budget)
    truth, _, true_grads = loss_and_gradients(reference.linear_preference_loss, case, objective, dtype=torch.float64)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-4, atol=1e-4)
    for name, grad in grads.items():
        error = (grad.double() - true_grads[name]).norm() / true_grads[name].norm()
        assert error < max(2 * torch.finfo(dtype).eps, 1e-3), name


@gpu
def test_other_streams_and_graph_capture():
    logits, ref_logits, labels = (tensor.cuda() for tensor in random_rows(9, 50257, torch.bfloat16))
    expected = token_divergence(logits, ref_logits, labels)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = token_divergence(logits, ref_logits, labels)
    stream.synchronize()
    assert torch.equal(other.kl, expected.kl)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = token_divergence(logits, ref_logits, labels)
    graph.replay()
    assert torch.equal(captured.kl, expected.kl)
