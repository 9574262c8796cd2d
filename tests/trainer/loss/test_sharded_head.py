"""The trainer's loss of models whose heads are sharded over ranks (tensor parallelism), beside that of whole heads."""

import functools

import pytest
import torch
from tdpo import PreferenceCollator
from tdpo.loss.preference_loss import FusedLoss, why_not_fused
from tdpo.models.causal_lm import CausalLM
from tdpo.reference.second_model import SecondModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from helpers.cuda_support import reason_to_skip
from helpers.distributed import run_on_ranks
from helpers.model_families import make_model
from tdpo_ext import tdpo_loss


def loss_and_gradients(models, batch):
    policy, reference = CausalLM.of(models[0]), SecondModel.of(models[1])
    assert why_not_fused(policy, reference) is None
    output = FusedLoss(policy, reference, functools.partial(tdpo_loss, beta=0.1))(batch)
    output.loss.backward()
    grads = [parameter.grad for parameter in models[0].parameters()]
    return output.loss, [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]


def sharded_and_whole(rank, world, device):
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3, 9, i], "rejected_ids": [4, 5]} for i in range(3)]
    batch = PreferenceCollator(0)(rows)
    batch |= {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    mesh, plan = init_device_mesh(device, (world,)), {"lm_head": ColwiseParallel(use_local_output=False)}
    whole, sharded = ([make_model("llama", seed).to(device) for seed in (0, 1)] for _ in range(2))
    sharded = [parallelize_module(model, mesh, plan) for model in sharded]
    assert all(isinstance(model.lm_head.weight, DTensor) for model in sharded)
    expected, found = loss_and_gradients(whole, batch), loss_and_gradients(sharded, batch)
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_sharded_heads(device, tmp_path):
    if device == "cuda" and (reason := reason_to_skip(2)):
        pytest.skip(reason)
    outcomes = run_on_ranks({"loss": sharded_and_whole}, 2, device, tmp_path)
    assert not {rank: trace for rank, trace in outcomes.items() if trace}
