"""Every CUDA kernel in a small case: whole and split rows, warps and CTAs, all dtypes. For compute-sanitizer.

python tools/every_kernel.py [--large]      (large: the row kernels on the logits of a training step, for a profiler)
"""

import argparse
import functools

import torch

from tdpo_ext import linear_preference_loss, tdpo_loss, token_divergence

randn = functools.partial(torch.randn, device="cuda")


def logit_kernels(rows: int, vocab: int, dtype: torch.dtype) -> None:
    logits = randn(rows, vocab, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocab, (rows,), device="cuda")
    labels[1] = -100
    divergence = token_divergence(logits, torch.randn_like(logits), labels)
    (divergence.logps.sum() + divergence.kl.sum()).backward()


def fused_loss(budget: int) -> None:
    hidden, weight = (randn(*shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((4, 6, 16), (301, 16)))
    labels = torch.randint(301, (4, 6), device="cuda")
    objective = functools.partial(tdpo_loss, beta=0.1)
    ref_hidden, ref_weight = randn(4, 6, 16, dtype=torch.bfloat16), weight.detach()
    loss, _, _ = linear_preference_loss(objective, hidden, weight, ref_hidden, ref_weight, labels, logits_budget=budget)
    (0.5 * loss).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="4,096 rows of 128,256 logits, bfloat16 and float32")
    if parser.parse_args().large:
        for dtype in (torch.bfloat16, torch.float32):
            logit_kernels(4096, 128_256, dtype)
    else:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for rows, vocab in ((5, 7), (9, 507), (3, 20011)):
                logit_kernels(rows, vocab, dtype)
        for budget in (1 << 20, 9000):  # the chunked and the streaming plan
            fused_loss(budget)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
