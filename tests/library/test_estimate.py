"""tdpo_ext.estimate: the plan and the bytes of a call that is not made."""

import ctypes
import functools
import gc
import platform
from pathlib import Path

import pytest
import torch

import tdpo_ext
from tdpo_ext.fused import call
from tdpo_ext.fused.planning.plan import cuda_budget
from tdpo_ext.ops.matmul import _COPIED_SIDE, has_brgemm

OBJECTIVE = functools.partial(tdpo_ext.tdpo_loss, beta=0.1)
SHAPE = {"vocab": 3000, "width": 64}


def not_a_margin_loss(chosen, rejected):
    return OBJECTIVE(chosen, rejected)


def step(lengths, *, vocab, width, ref_width, dtype, objective=OBJECTIVE, frozen_head=False, budget=None):
    """Forward and backward of packed pairs of `lengths` rows; returns the bytes of its arguments and its gradients."""
    rows, halves = sum(lengths), [length // 2 for length in lengths]
    sequences = [*halves, *(length - half for length, half in zip(lengths, halves))]
    hidden = torch.randn(rows, width, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, dtype=dtype).requires_grad_(not frozen_head)
    reference = torch.randn(rows, ref_width, dtype=dtype), torch.randn(vocab, ref_width, dtype=dtype)
    labels = torch.randint(vocab, (rows,))
    loss, *_ = tdpo_ext.linear_preference_loss(
        objective, hidden, weight, *reference, labels, row_lengths=sequences, logits_budget=budget
    )
    loss.backward()
    gradients = sum(leaf.grad.nbytes for leaf in (hidden, weight) if leaf.requires_grad)
    return sum(tensor.nbytes for tensor in (hidden, weight, *reference, labels)), gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("objective", [OBJECTIVE, not_a_margin_loss])
@pytest.mark.parametrize("budget", [None, 4 << 20, 500_000])
def test_the_plan_is_the_one_that_the_loss_makes(dtype, frozen_head, objective, budget, monkeypatch):
    made, lengths = [], [120, 40, 250]

    def recorded(*arguments, **options):
        made.append(call_make_plan(*arguments, **options))
        return made[-1]

    call_make_plan = call.make_plan
    monkeypatch.setattr(call, "make_plan", recorded)
    shared = {**SHAPE, "ref_width": 48, "dtype": dtype, "frozen_head": frozen_head}
    _, gradients = step(lengths, **shared, objective=objective, budget=budget)
    estimate = tdpo_ext.estimate(
        lengths,
        **shared,
        margin_loss=objective is OBJECTIVE,
        logits_budget=budget,
    )
    assert made == [estimate.plan]
    assert estimate.temporaries == estimate.plan.bytes
    assert estimate.gradients == gradients


def peak_resident():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs Linux, and memory that glibc gives back")
@pytest.mark.parametrize("objective", [OBJECTIVE, not_a_margin_loss], ids=["deferred", "streaming"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_call_takes_the_memory_of_its_plan(objective, dtype):
    shape, lengths, budget = {"vocab": 60_000, "width": 64}, [1500, 1500], 160 << 20
    call = {"dtype": dtype, "objective": objective, "budget": budget, "ref_width": 64}
    step(lengths, **call, **shape)  # what is imported or allocated once
    gc.collect()
    tdpo_ext.release_scratch()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_resident()
    arguments, gradients = step(lengths, **call, **shape)
    estimate = tdpo_ext.estimate(
        lengths, **shape, dtype=dtype, margin_loss=objective is OBJECTIVE, logits_budget=budget
    )
    assert (str(estimate.plan).startswith("streaming")) == (objective is not_a_margin_loss)
    measured = peak_resident() - before - arguments - gradients
    # Where the processor does not multiply bfloat16, blocks of both operands are copied to float32.
    copies = 0 if dtype == torch.float32 or has_brgemm(dtype) else 2 * 4 * _COPIED_SIDE**2
    assert 0.9 * estimate.temporaries < measured < 1.1 * estimate.temporaries + copies


def test_budgets_of_a_gpu_follow_its_memory():
    for memory in (8 << 30, 80 << 30):
        plan = tdpo_ext.estimate([512], **SHAPE, device_type="cuda", device_memory=memory).plan
        assert plan.budget == cuda_budget(memory)
    own = {"logits_budget": 123 << 20, "device_type": "cuda", "device_memory": 80 << 30}
    assert tdpo_ext.estimate([512], **SHAPE, **own).plan.budget == 123 << 20


def test_others_by_hand():
    estimate = tdpo_ext.estimate([100, 60], **SHAPE, positions=400)
    assert estimate.published == 400 * 3000 * 7 * 4
    assert estimate.trl == 160 * 32768 * 2 + (3000 * 64 + 160 * 64) * 4
    assert tdpo_ext.estimate([10000], **SHAPE, dtype=torch.float32).trl == 4096 * 32768 * 4
    assert tdpo_ext.estimate([100], **SHAPE, frozen_head=True).trl == 100 * 32768 * 2 + 100 * 64 * 4
    assert tdpo_ext.estimate([100], **SHAPE).published == 100 * 3000 * 7 * 4


def test_it_is_frozen_and_says_why():
    estimate = tdpo_ext.estimate([100], **SHAPE)
    assert str(estimate.plan) == "chunked: all 100 rows fit the budget at once"
    with pytest.raises(AttributeError):
        estimate.trl = 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pair_lengths": []}, "pair_lengths is .*rows are needed"),
        ({"pair_lengths": [2.5]}, "pair_lengths is 2.5; an integer"),
        ({"pair_lengths": [-1]}, "pair_lengths is -1"),
        ({"vocab": 0}, "vocab is 0; it must be at least 1"),
        ({"width": "64"}, "width is '64'; an integer"),
        ({"ref_width": -1}, "ref_width is -1"),
        ({"dtype": torch.int8}, "dtype is torch.int8; allowed are torch.float32"),
        ({"logits_budget": 0}, "logits_budget is 0"),
        ({"device_type": "tpu"}, "device_type is 'tpu'; allowed are 'cpu' and 'cuda'"),
        ({"device_memory": 1 << 30}, "device_memory is .*, but device_type is 'cpu'"),
        ({"device_type": "cuda", "device_memory": 0}, "device_memory is 0"),
        ({"positions": 50}, "positions is 50; it must be at least 100"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tdpo_ext.estimate(**{"pair_lengths": [100], **SHAPE, **wrong})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_its_memory_is_asked_for():
    with pytest.raises(ValueError, match="device_memory is None"):
        tdpo_ext.estimate([100], **SHAPE, device_type="cuda")
