"""Runs functions on several processes of one process group and brings back what became of them."""

import os
import traceback
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def backend_of(device):
    """NCCL between GPUs, gloo between processors and virtual GPUs."""
    return "nccl" if device == "cuda" and torch.cuda.get_device_name() != "virtual GPU" else "gloo"


def on_time(device):
    """Variables of processes that exchange: gloo's gathers read memory in which a virtual GPU's work may wait."""
    return {"VIRTUAL_GPU_LATE": "0"} if device == "cuda" and backend_of(device) == "gloo" else {}


def outcome_of(check, rank, world, device):
    """ "" where the check passes, or a traceback."""
    try:
        check(rank, world, device)
    except BaseException:  # pytest's own failures, as of `pytest.raises`, are no Exceptions
        return traceback.format_exc()
    return ""


def _worker(rank, world, device, store, checks, outcomes):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend_of(device),
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),  # a rank that waits for another in vain fails its test
    )
    for name, check in checks.items():
        torch.manual_seed(0)
        outcomes[name, rank] = outcome_of(check, rank, world, device)
    dist.destroy_process_group()
    # gloo's threads may still be dropping finished work, for which they need an interpreter that is not shutting down.
    os._exit(0)


def run_on_ranks(checks, world, device, folder):
    """{(name, rank): "" or a traceback} of every check(rank, world, device) in `checks`, run one after the other."""
    with mock.patch.dict(os.environ, on_time(device)), mp.Manager() as manager:
        outcomes = manager.dict()
        arguments = (world, device, str(folder / f"store-{world}"), checks, outcomes)
        mp.spawn(_worker, arguments, nprocs=world, join=True)
        return dict(outcomes)
