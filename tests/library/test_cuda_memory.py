"""Memory that torch's allocator reserves over batches of many lengths (`pytest -m cuda`)."""

import random

import pytest
import torch

from helpers.cuda_support import gpu
from helpers.planning import llm_sizes
from tdpo_ext.fused.planning.choose import make_plan
from tdpo_ext.fused.planning.plan import cuda_budget
from tdpo_ext.fused.planning.sizes import row_pitch
from tdpo_ext.ops.memory import Buffer, allocate

VOCAB, WIDTH = 128_256, 4096
MEMORY = 80 << 30


@gpu
def test_batches_of_many_lengths_reserve_little_more_than_the_largest_needs():
    """The buffers of 60 calls and their dW: 16 sequences of 64 to 400 rows, nothing is computed."""
    if torch.cuda.mem_get_info()[0] < 0.9 * MEMORY:
        pytest.skip("needs 72 GiB of free GPU memory")
    device, draw, sizes = torch.device("cuda"), random.Random(0), llm_sizes(VOCAB)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(60):
        lengths = [draw.randint(64, 400) + draw.randint(64, 400) for _ in range(8)]
        plan = make_plan(lengths, sizes, cuda_budget(MEMORY), can_defer=True, device_type="cuda")
        pitch = row_pitch(VOCAB)
        logits = Buffer((plan.rows, VOCAB), torch.float32, pitch)
        dz = Buffer((plan.dz_rows, VOCAB), torch.bfloat16, pitch)
        scratch = allocate(device, {"z": logits, "r": logits, "dz": dz}, plan.budget)
        weight_grad = torch.empty(VOCAB, WIDTH, dtype=torch.bfloat16, device=device)
        hidden_grad = torch.empty(sum(lengths), WIDTH, dtype=torch.bfloat16, device=device)
        del scratch, weight_grad, hidden_grad
    assert torch.cuda.memory_reserved() <= 1.25 * torch.cuda.max_memory_allocated()


@gpu
@pytest.mark.parametrize(("needed", "budget", "allocated"), [(100, 128, 112), (100, 110, 110), (100, 90, 112)])
def test_a_block_of_rounded_size_keeps_the_budget(needed, budget, allocated):
    """In MiB: of a block beyond the budget, which only some plans may take, the size is rounded up too."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    allocate(torch.device("cuda"), {"z": Buffer((needed << 20,), torch.uint8)}, budget << 20)
    assert torch.cuda.max_memory_allocated() - before == allocated << 20
