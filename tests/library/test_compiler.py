"""torch's compiler: not imported before it is used; the fused losses end its graphs, and the logit kernel does not."""

import subprocess
import sys

import pytest
import torch

from helpers.linear_cases import make_case
from tdpo_ext import LinearTDPOLoss, linear_preference_loss, linear_token_divergence, tdpo_loss, token_divergence

NEW_MODULES = """
import sys
import torch
before = set(sys.modules)
import tdpo_ext
print(*sorted(name for name in set(sys.modules) - before if name.split(".")[0] != "tdpo_ext"))
tdpo_ext.LinearTDPOLoss()(*(torch.ones(2, 3, 4), torch.ones(5, 4)) * 2, torch.ones(2, 3, dtype=torch.int64))
print(sorted(name for name in sys.modules if name.startswith("torch._dynamo")))
"""


def test_nothing_is_imported_beside_torch_itself(tmp_path):
    """In a folder of its own: in the source root Python would import the source tree."""
    command = [sys.executable, "-c", NEW_MODULES]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    new, compilers = done.stdout.splitlines()
    assert new == ""
    assert compilers == "[]"  # a call imports no compiler either


TENSORS = make_case(ignored=0.0).tensors()
NAMES = ("hidden", "weight", "ref_hidden", "ref_weight", "labels")
MODULE = LinearTDPOLoss()
LOSSES = {
    "function": lambda tensors: linear_preference_loss(tdpo_loss, **tensors)[0],
    "module": lambda tensors: MODULE(*(tensors[name] for name in NAMES))[0],
    "values": lambda tensors: linear_token_divergence(**{name: tensors[name] for name in NAMES}).kl.sum(),
}


@pytest.fixture(params=LOSSES)
def step(request):
    """A training step around a fused loss: it takes and returns tensors that the compiler sees."""
    torch._dynamo.reset()
    loss_of = LOSSES[request.param]

    def step(hidden):
        loss = loss_of({**TENSORS, "hidden": torch.tanh(hidden) * 2, "bias": None, "ref_bias": None})
        return 3 * loss + hidden.square().sum()

    return step


@pytest.mark.slow
def test_a_fused_loss_ends_the_graph_and_says_why(step):
    explained = torch._dynamo.explain(step)(TENSORS["hidden"])
    assert explained.graph_count > 1
    assert all("fused losses plan by the lengths of a batch" in at.reason for at in explained.break_reasons)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fused losses plan by the lengths of a batch"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(TENSORS["hidden"])


@pytest.mark.slow
def test_a_compiled_step_computes_the_same(step):
    compiled, grads = torch.compile(step, backend="aot_eager"), []
    for number, function in enumerate((step, compiled, compiled, compiled)):
        hidden = TENSORS["hidden"].detach().clone().requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            grads.append(torch.autograd.grad(function(hidden), (hidden, TENSORS["weight"])))
    for of_compiled in grads[1:]:
        assert all(torch.equal(ours, eager) for ours, eager in zip(of_compiled, grads[0]))


@pytest.mark.slow
def test_the_logit_kernel_compiles_whole():
    torch._dynamo.reset()
    logits, ref_logits, labels = torch.randn(6, 9, requires_grad=True), torch.randn(6, 9), torch.arange(6)

    def loss(logits):
        values = token_divergence(2 * logits, ref_logits, labels)
        return (values.kl - values.logps).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(*(torch.autograd.grad(function(logits), logits)[0] for function in (loss, compiled)))
