"""Fused losses in CUDA graphs (`pytest -m cuda`): a replay on new values gives what a call gives."""

import functools

import pytest
import torch

from helpers.cuda_support import gpu
from tdpo_ext import linear_preference_loss, tdpo_loss

VOCAB, WIDTH = 301, 16
OBJECTIVE = functools.partial(tdpo_loss, beta=0.1)


def tensors(dtype, rows, seed):
    """hidden, weight, ref_hidden, ref_weight and labels."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [(rows, WIDTH), (VOCAB, WIDTH), (rows, WIDTH), (VOCAB, WIDTH)]
    values = [(torch.randn(shape, generator=draw) / 2).to(dtype) for shape in shapes]
    return [*values, torch.randint(VOCAB, (rows,), generator=draw)]


def loss_and_gradients(given, lengths, **options):
    hidden, weight = given[0].requires_grad_(), given[1].requires_grad_()
    loss, chosen, _ = linear_preference_loss(OBJECTIVE, *given, row_lengths=lengths, **options)
    return loss, chosen.kl, *torch.autograd.grad(loss, (hidden, weight))


@gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "budget"),
    [([5, 7, 6, 9], 1 << 30), ([5, 7, 6, 9], 30_000), ([5, 7, 6, 9], 100), ([150, 200, 180, 170], 700_000)],
    ids=["one chunk", "several chunks", "streamed", "deferred"],
)
def test_replays(dtype, lengths, budget):
    offsets = torch.tensor([0, *lengths]).cumsum(0).cuda()
    static = [tensor.cuda() for tensor in tensors(dtype, sum(lengths), 1)]
    options = {"cu_seqlens": offsets, "logits_budget": budget}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loss_and_gradients(static, lengths, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradients(static, lengths, **options)
    for seed in (2, 3):
        new = tensors(dtype, sum(lengths), seed)
        with torch.no_grad():
            for tensor, values in zip(static, new):
                tensor.copy_(values)
        graph.replay()
        fresh = loss_and_gradients([tensor.cuda() for tensor in new], lengths, **options)
        for ours, expected in zip(captured, fresh):
            assert torch.equal(ours, expected)
