"""A small case of every CUDA kernel, for compute-sanitizer: whole and split rows, warps and CTAs, all dtypes."""

import functools
import sys

import torch

from tdpo_ext import linear_preference_loss, tdpo_loss, token_divergence

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cuda"  # cpu: rehearses the script


def logit_kernels() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for rows, vocab in ((5, 7), (9, 507), (3, 20011)):
            logits = torch.randn(rows, vocab, device=DEVICE, dtype=dtype, requires_grad=True)
            labels = torch.randint(vocab, (rows,), device=DEVICE)
            labels[1] = -100
            divergence = token_divergence(logits, torch.randn_like(logits), labels)
            (divergence.logps.sum() + divergence.kl.sum()).backward()


def fused_loss() -> None:
    randn = functools.partial(torch.randn, device=DEVICE, dtype=torch.bfloat16)
    hidden, weight = randn(4, 6, 16, requires_grad=True), randn(301, 16, requires_grad=True)
    ref_hidden = randn(4, 6, 16)
    labels = torch.randint(301, (4, 6), device=DEVICE)
    objective = functools.partial(tdpo_loss, beta=0.1)
    for budget in (1 << 20, 9000):  # the chunked and the streaming plan
        loss, _, _ = linear_preference_loss(
            objective, hidden, weight, ref_hidden, weight.detach(), labels, logits_budget=budget
        )
        (0.5 * loss).backward()


if __name__ == "__main__":
    logit_kernels()
    fused_loss()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
