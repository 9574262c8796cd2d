"""Random calls of the three public functions against an independent float64 oracle, under every instruction set.

    python tests/soak/fuzz.py [--cases 50000] [--seed 0]

The oracle is numpy, written from the definitions: it shares no line with `tdpo_ext.eager`. A case draws shapes, dtypes
of both models, magnitudes, offsets, perturbations, masks, ignored rows, strides, options, both directions of the KL,
budgets and objectives. A fourth of the cases are whole batches of the preference loss (tests/helpers/any_batch.py), of
which every path must be met. Prints a JSON line with the counts and every failing case, which `--only SEED` repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Batches of which at least one takes each path.
_ENOUGH_BATCHES = 1000
CAPABILITIES = ("default", "avx2", "avx512")


def log_softmax(x):
    import numpy as np

    with np.errstate(invalid="ignore", divide="ignore"):
        top = x.max(-1, keepdims=True)
        return x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))


def oracle(logits, ref_logits, labels, temperature, softcap, kl_direction):
    """logps, ref_logps, kl, entropy in float64; rows with label -100 are 0. And log p, log q of the whole rows."""
    import numpy as np

    z, r = logits.astype(np.float64), ref_logits.astype(np.float64)
    kept = labels != -100
    z, r = np.where(kept[:, None], z, 0.0), np.where(kept[:, None], r, 0.0)
    if softcap is not None:
        z, r = softcap * np.tanh(z / softcap), softcap * np.tanh(r / softcap)
    log_p, log_q = log_softmax(z / temperature), log_softmax(r / temperature)
    rows, index = np.arange(len(labels)), np.where(kept, labels, 0)
    p, q = np.exp(log_p), np.exp(log_q)
    with np.errstate(invalid="ignore"):
        if kl_direction == "reverse":
            kl = np.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
        else:
            kl = np.where(q > 0, q * (log_q - log_p), 0.0).sum(-1)
        entropy = -np.where(p > 0, p * log_p, 0.0).sum(-1)
    values = (log_p[rows, index], log_q[rows, index], kl, entropy)
    return [np.where(kept, value, 0.0) for value in values], log_p, log_q


def draw_options(draw):
    return {
        "temperature": draw.choice([1.0, 1.0, 0.7, 1.9]),
        "softcap": draw.choice([None, None, 4.0, 30.0]),
        "kl_direction": draw.choice(["forward", "reverse"]),
    }


def close(name, got, expected, rtol, atol):
    import torch

    torch.testing.assert_close(
        got.detach().double(), torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol, msg=name
    )


def logit_case(draw):
    """token_divergence: values, and the gradient by its closed forms.

    a [v = y] + (k - a) p - k q forward, and a ([v = y] - p) + k p (log p - log q - kl) reverse.
    """
    import numpy as np
    import torch

    import tdpo_ext

    rows, vocab = draw.randint(0, 6), draw.choice([1, 2, 7, 64, 507, 1024, 2100])
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    magnitude = draw.choice([0.1, 3.0, 50.0])
    logits = (magnitude * torch.randn(rows, vocab, dtype=torch.float64)).to(dtype)
    ref_logits = logits.double() + draw.choice([0.0, 1e-3, 1.0, 10.0]) * torch.randn(rows, vocab)
    if dtype in (torch.float32, torch.float64):
        ref_logits = ref_logits + draw.choice([0.0, 0.0, 20.0, -300.0])
    ref_logits = ref_logits.to(draw.choice([dtype, dtype, torch.float32]))
    labels = torch.randint(vocab, (rows,))
    masked = torch.rand(rows, vocab) < draw.choice([0.0, 0.3])
    masked.scatter_(-1, labels[:, None], False)
    logits, ref_logits = logits.masked_fill(masked, -torch.inf), ref_logits.masked_fill(masked, -torch.inf)
    labels[torch.rand(rows) < draw.choice([0.0, 0.4])] = -100
    options = draw_options(draw)
    values, log_p, log_q = oracle(logits.double().numpy(), ref_logits.double().numpy(), labels.numpy(), **options)
    leaf = logits.clone()
    if draw.random() < 0.3:  # rows that are not dense
        leaf = torch.cat([leaf, leaf[:, :1]], 1)[:, :vocab]
    leaf.requires_grad_()
    ours = tdpo_ext.token_divergence(leaf, ref_logits, labels, **options)
    for name, got, expected in zip(ours._fields, ours, values):
        close(name, got, expected, 3e-5, 3e-5)
    a, k = torch.randn(rows, dtype=torch.float64), torch.randn(rows, dtype=torch.float64)
    (ours.logps * a + ours.kl * k).sum().backward()
    kept = (labels != -100).numpy()
    one_hot = np.zeros((rows, vocab))
    one_hot[np.arange(rows)[kept], labels.numpy()[kept]] = 1.0
    p, q, a, k = np.exp(log_p), np.exp(log_q), a[:, None].numpy(), k[:, None].numpy()
    if options["kl_direction"] == "reverse":
        with np.errstate(invalid="ignore"):
            excess = np.where(p > 0, log_p - log_q - values[2][:, None], 0.0)
        grad = a * (one_hot - p) + k * p * excess
    else:
        grad = a * one_hot + (k - a) * p - k * q
    if options["softcap"] is not None:
        grad = grad * (1 - np.tanh(np.where(kept[:, None], logits.double().numpy(), 0.0) / options["softcap"]) ** 2)
    grad = np.where(kept[:, None], grad / options["temperature"], 0.0)
    rounding = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0.0
    close("gradient", leaf.grad, grad, 2e-4 + rounding, 1e-6 + 4e-7 * magnitude / options["temperature"])


def fused_case(draw):
    """linear_preference_loss and linear_token_divergence: values and loss by the oracle on materialised logits."""
    import functools

    import numpy as np
    import torch

    import tdpo_ext

    pairs, tokens, width = draw.randint(1, 3), draw.randint(1, 9), draw.choice([1, 8, 24])
    vocab, dtype = draw.choice([2, 33, 300]), draw.choice([torch.float32, torch.bfloat16])
    hidden = torch.randn(2 * pairs, tokens, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width) / width**0.5).to(dtype).requires_grad_()
    ref_dtype = draw.choice([dtype, torch.float32, torch.bfloat16])
    ref_hidden = (hidden.detach().float() + 0.3 * torch.randn(2 * pairs, tokens, width)).to(ref_dtype)
    ref_weight = weight.detach().to(ref_dtype)
    labels = torch.randint(vocab, (2 * pairs, tokens))
    labels[torch.rand(2 * pairs, tokens) < draw.choice([0.0, 0.4, 1.0])] = -100
    row_options = draw_options(draw)
    scales = draw.choice([(1.0, 1.0), (0.5, 0.5), (0.5, 0.8)])
    z = scales[0] * (hidden.detach().double().numpy() @ weight.detach().double().numpy().T)
    r = scales[1] * (ref_hidden.double().numpy() @ ref_weight.double().numpy().T)
    flat = (z.reshape(-1, vocab), r.reshape(-1, vocab), labels.flatten().numpy())
    values, _, _ = oracle(*flat, **row_options)
    options = {
        **row_options,
        "logit_scale": scales[0],
        "ref_logit_scale": scales[1],
        "logits_budget": draw.choice([1 << 30, 60_000, 9_000, 500]),
    }
    logps, ref_logps, kl, _ = (value.reshape(2 * pairs, tokens) for value in values)
    arguments = (hidden, weight, ref_hidden, ref_weight, labels)
    ours = tdpo_ext.linear_token_divergence(*arguments, **options)
    close("kl", ours.kl, kl, 1e-4, 1e-4)
    close("logps", ours.logps, logps, 1e-4, 1e-4)
    (ours.kl.sum() - ours.logps.sum()).backward()
    assert hidden.grad.isfinite().all()
    variant = draw.choice(["tdpo1", "tdpo2"])
    objective = functools.partial(tdpo_ext.tdpo_loss, beta=0.1, variant=variant)
    loss, chosen, rejected = tdpo_ext.linear_preference_loss(objective, *arguments, **options)
    u = (logps - ref_logps).sum(-1)
    delta = (kl[pairs:].sum(-1) - kl[:pairs].sum(-1)) * (1.0 if variant == "tdpo1" else 0.5)
    margin = 0.1 * (u[:pairs] - u[pairs:] - delta)
    close("loss", loss, np.logaddexp(0.0, -margin).mean(), 1e-4, 1e-4)
    close("chosen kl", chosen.kl, kl[:pairs].sum(-1), 1e-4, 1e-4)
    assert rejected.tokens.sum() == (labels[pairs:] != -100).sum()
    hidden.grad = None
    loss.backward()
    assert hidden.grad.isfinite().all()
    assert not hidden.grad[labels == -100].any()


def batch_case(draw):
    """The gradients of a batch of pairs of any lengths, at any budget."""
    from helpers.any_batch import check, draw_batch

    check(draw_batch(draw))


CASES = {"token_divergence": logit_case, "linear losses": fused_case, "batches": batch_case}


def run(cases: int, seed: int, only: int | None) -> dict:
    import random

    import torch

    import tdpo_ext
    from helpers.paths_met import KINDS, counting

    torch.set_num_threads(1)
    counts, failures, met = dict.fromkeys(CASES, 0), [], Counter()
    for index in range(cases) if only is None else [only]:
        draw = random.Random(seed * 10_000_019 + index)
        torch.manual_seed(seed * 10_000_019 + index)
        kind = draw.choice(["token_divergence", "token_divergence", "linear losses", "batches"])
        counts[kind] += 1
        try:
            with counting(met):
                CASES[kind](draw)
        except Exception:
            failures.append({"case": index, "kind": kind, "error": traceback.format_exc(limit=-2)})
    if counts["batches"] >= _ENOUGH_BATCHES and KINDS - set(met):
        failures.append({"error": f"paths that no batch took: {sorted(KINDS - set(met))}"})
    return {"capability": tdpo_ext.build_info()["cpu_capability"], "cases": counts, "failures": failures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=50_000, help="cases, over all instruction sets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat one case")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker or arguments.only is not None:
        print(json.dumps(run(arguments.cases, arguments.seed, arguments.only)))
        return 0
    results = []
    for number, capability in enumerate(CAPABILITIES):
        cases = arguments.cases // len(CAPABILITIES)
        command = [sys.executable, __file__, "--worker", "--cases", str(cases), "--seed", str(arguments.seed + number)]
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            results.append({"capability": capability, "cases": {}, "failures": [{"error": done.stderr[-2000:]}]})
        else:
            results.append(json.loads(done.stdout.splitlines()[-1]))
    print(json.dumps({"fuzz": results}))
    return 1 if any(result["failures"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
