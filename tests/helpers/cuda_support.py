"""What the CUDA tests share: when they run, and values with their gradient."""

import pytest
import torch

import tdpo_ext


def reason_to_skip(devices: int = 1) -> str:
    if torch.cuda.device_count() < devices:
        return "no CUDA device" if devices == 1 else f"fewer than {devices} CUDA devices"
    if not tdpo_ext.build_info()["cuda_archs"]:
        return "tdpo_ext was built without CUDA kernels"
    return ""


def gpu(test):
    """Marks a test for `pytest -m cuda`; it is skipped, with the reason, where it can't run."""
    reason = reason_to_skip()
    return pytest.mark.cuda(pytest.mark.skipif(bool(reason), reason=reason)(test))


def values_and_gradient(function, logits, ref_logits, labels, **options):
    leaf = logits.detach().requires_grad_()
    divergence = function(leaf, ref_logits, labels, **options)
    kept = torch.isfinite(divergence.kl)
    (divergence.logps.sum() - 0.3 * torch.where(kept, divergence.kl, 0).sum()).backward()
    return divergence.detach(), leaf.grad
