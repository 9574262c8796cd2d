"""What the virtual GPU's log says of a call: devices and streams, synchronisations, launches, products' operands."""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

CALL = """
import functools, json, sys, torch, virtual_gpu.queue
from tdpo_ext import linear_preference_loss, tdpo_loss

case = json.loads(sys.argv[1])
lengths, vocab, width, device = case["lengths"], case["vocab"], 64, torch.device("cuda", case["device"])
objective, rows = functools.partial(tdpo_loss, beta=0.1), sum(lengths)
stream = torch.cuda.Stream(device)
stream.wait_stream(torch.cuda.current_stream(device))
with torch.cuda.stream(stream):
    hidden, weight = (torch.randn(n, width, device=device).bfloat16().requires_grad_() for n in (rows, vocab))
    ref_hidden, ref_weight = hidden.detach().clone(), weight.detach().clone()
    labels = torch.randint(vocab, (rows,), device=device)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(device)
    options = {"cu_seqlens": offsets, "logits_budget": case["budget"]}
    if case["known"]:
        options["row_lengths"] = lengths
    for name in ("first", "second"):
        hidden.grad = weight.grad = None
        virtual_gpu.queue.log(f"--- {name} {stream.cuda_stream:#x}")
        loss = linear_preference_loss(objective, hidden, weight, ref_hidden, ref_weight, labels, **options)[0]
        loss.backward()
    virtual_gpu.queue.log("--- end")
"""
SHORT, LONG = [5, 7, 6, 9], [150, 200, 180, 170]
BUDGETS = {"one chunk": (SHORT, 1 << 30), "several chunks": (LONG, 4_500_000), "deferred": (LONG, 1_500_000)}


@functools.cache
def log_of(plan, *, known=True, device=1, vocab=1031):
    """The lines of the second call, and its stream."""
    lengths, budget = BUDGETS[plan]
    case = {"lengths": lengths, "budget": budget, "known": known, "device": device, "vocab": vocab}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        environment = {**os.environ, "VIRTUAL_GPU_DEVICES": "2", "VIRTUAL_GPU_LOG": str(log)}
        command = [sys.executable, "-c", CALL, json.dumps(case)]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = log.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("--- second"))
    return lines[first + 1 : lines.index("--- end")], lines[first].split()[2]


def test_all_work_is_on_the_device_and_the_stream_of_the_call():
    lines, stream = log_of("deferred")
    placed = [line for line in lines if "stream=" in line and "device=" in line]
    assert len(placed) > 20
    for line in placed:
        assert f"stream={stream}" in line, line
        assert "device=1" in line, line


@pytest.mark.parametrize("plan", BUDGETS)
def test_a_call_whose_lengths_are_known_waits_for_nothing(plan):
    lines, _ = log_of(plan)
    assert [line for line in lines if line.startswith("SYNCHRONISATION")] == []


def test_a_call_whose_lengths_are_on_the_device_waits_once():
    lines, _ = log_of("one chunk", known=False)
    assert lines.count("SYNCHRONISATION stream") == 1  # after a copy to the host, which is another line


@pytest.mark.parametrize("plan", BUDGETS)
@pytest.mark.parametrize("vocab", [1024, 1026, 1034])
def test_products_read_aligned_operands_of_low_precision(plan, vocab):
    """At 16 bytes, as the kernels for large tiles need; logits and dW's sums are written in float32."""
    lines, _ = log_of(plan, vocab=vocab)
    products = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in lines if line.startswith("PRODUCT")]
    assert len(products) >= 4
    for product in products:
        assert {product["a"], product["b"]} == {"bfloat16"}
        for operand in ("a", "b", "c"):
            assert int(product[f"{operand}_offset"]) % 16 == 0, product
        assert product["compute"] == "68"  # CUBLAS_COMPUTE_32F
    assert sum(product["c"] == "float32" for product in products) >= 2


@pytest.mark.parametrize(("plan", "most"), [("one chunk", 45), ("several chunks", 115), ("deferred", 240)])
def test_launches(plan, most):
    """Of torch's kernels and of the emulated ones; products are not among them."""
    lines, _ = log_of(plan)
    launches = [line for line in lines if line.startswith("LAUNCH") or "_kernel" in line]
    assert len(launches) <= most, len(launches)
