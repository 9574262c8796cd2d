"""Counts the bytes that this process hands to torch's collectives; also used by benchmarks/bench_vocab_parallel.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch.distributed as dist


@contextmanager
def payload_bytes() -> Iterator[list[int]]:
    """While the context is open, the yielded list grows by the bytes of every all_gather and all_reduce payload."""
    payloads: list[int] = []
    all_gather, all_reduce = dist.all_gather, dist.all_reduce

    def counted_gather(tensor_list, tensor, **options):
        payloads.append(tensor.nbytes)
        return all_gather(tensor_list, tensor, **options)

    def counted_reduce(tensor, **options):
        payloads.append(tensor.nbytes)
        return all_reduce(tensor, **options)

    with mock.patch.multiple(dist, all_gather=counted_gather, all_reduce=counted_reduce):
        yield payloads
