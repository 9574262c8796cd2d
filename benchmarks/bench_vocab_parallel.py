"""The fused TDPO loss with the vocabulary sharded over 1, 2 and 4 processes of one machine (gloo, CPU).

    python benchmarks/bench_vocab_parallel.py [--rounds 3]

Step: 2 pairs, 512 response rows, D 512, V 50,304, float32, forward and backward, one thread per process. The bytes that
a rank hands to the collectives are counted, and counted again at V 12,576, which must not change them. Memory is a
rank's peak beyond its inputs and gradients; "logits" is the size of both heads' logits on a rank. Results go to
benchmarks/results/bench_vocab_parallel.json.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import peak_extra_bytes, save, text_table

from tdpo_ext import VocabShard, linear_preference_loss, tdpo_loss

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from helpers.collectives import payload_bytes

PAIRS, TOKENS, WIDTH, VOCABS = 2, 128, 512, (50304, 12576)
OBJECTIVE = functools.partial(tdpo_loss, beta=0.1)
BUDGET = 1 << 30


def measure(rank: int, world: int, vocab: int, rounds: int) -> dict:
    torch.manual_seed(0)
    hidden = torch.randn(2 * PAIRS, TOKENS, WIDTH).requires_grad_()
    labels = torch.randint(vocab, (2 * PAIRS, TOKENS))
    shard = VocabShard.from_group(vocab, dist.group.WORLD)
    generator = torch.Generator().manual_seed(1 + rank)
    weight = (torch.randn(shard.size, WIDTH, generator=generator) / WIDTH**0.5).requires_grad_()
    ref_weight, ref_hidden = weight.detach().clone(), hidden.detach() + 0.1 * torch.randn_like(hidden)

    def step() -> None:
        loss, _, _ = linear_preference_loss(
            OBJECTIVE, hidden, weight, ref_hidden, ref_weight, labels, logits_budget=BUDGET, shard=shard
        )
        loss.backward()

    step()
    hidden.grad = weight.grad = None
    dist.barrier()
    with payload_bytes() as payloads:
        extra = peak_extra_bytes(step) - hidden.nbytes - weight.nbytes
    seconds = []
    for _ in range(rounds):
        hidden.grad = weight.grad = None
        dist.barrier()
        begin = time.perf_counter()
        step()
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
    rows = labels.numel()
    return {
        "ranks": world,
        "vocab": vocab,
        "seconds": statistics.median(seconds),
        "bytes_per_row": sum(payloads) / rows,
        "extra_mb": extra / 2**20,
        "logits_mb": 2 * rows * shard.size * 4 / 2**20,
    }


def worker(rank: int, world: int, store: str, rounds: int, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    measured = [measure(rank, world, vocab, rounds) for vocab in VOCABS]
    if rank == 0:
        results.extend(measured)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; medians are reported")
    rounds = parser.parse_args().rounds
    with mp.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        results = manager.list()
        for world in (1, 2, 4):
            mp.spawn(worker, (world, str(Path(folder, f"store-{world}")), rounds, results), nprocs=world)
        rows = list(results)
    print(text_table(rows, list(rows[0])))
    shape = {"rows": 2 * PAIRS * TOKENS, "width": WIDTH, "cores": mp.cpu_count()}
    print(f"saved {save('bench_vocab_parallel', {**shape, 'results': rows})}")


if __name__ == "__main__":
    main()
