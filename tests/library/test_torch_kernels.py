"""The kernels in plain torch: against the compiled ones on random calls, their bounded memory, and how they are chosen.

`make torch-kernels-test` runs all of the library's tests with them.
"""

import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tdpo_ext
from helpers.logit_cases import DTYPES, REFUSED
from tdpo_ext.ops import matmul, operators, selection, torch_kernels, torch_row_state
from tdpo_ext.ops.operators import RowOptions

against_compiled = pytest.mark.skipif(
    not selection.has_compiled_kernels("cpu"),
    reason="compares with the compiled kernels, which TDPO_KERNELS=torch leaves out",
)

DTYPE_PATHS = {str(dtype) for dtype in DTYPES}
LAYOUTS = {"matrix", "one row", "padded", "irregular", "no dense rows"}
OUTPUTS = {"new output", "in place", "narrowed"}
PATHS = DTYPE_PATHS | LAYOUTS | OUTPUTS
PATHS |= {"softcap", "forward", "reverse", "temperature", "one slice", "merged slices", "slice of -inf", "offset"}
PATHS |= {"near equality", "far from equality", "infinite KL", "NaN", "ignored", "no gradient", "no KL gradient"}
PATHS |= {"one block", "several blocks"}


def laid_out(layout: str, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits (..., vocab) of a layout of memory."""
    if layout == "one row":
        return (3 * torch.randn(vocab)).to(dtype)
    if layout == "padded":
        return (3 * torch.randn(6, vocab + 5)).to(dtype)[:, :vocab]
    if layout == "irregular":
        return (3 * torch.randn(2, 3, 4, vocab)).to(dtype)[:, :2, :3]
    if layout == "no dense rows":
        return (3 * torch.randn(vocab, 6)).to(dtype).t()
    return (3 * torch.randn(6, vocab)).to(dtype)


class Case:
    """A random call of every operator: its arguments, and the paths that it takes."""

    def __init__(self, draw: random.Random):
        self.paths = {"reverse" if (reverse_kl := draw.random() < 0.5) else "forward"}
        softcap, temperature = draw.choice([0.0, 0.0, 15.0]), draw.choice([1.0, 0.7])
        self.dtype, layout, vocab = draw.choice(DTYPES), draw.choice(sorted(LAYOUTS)), draw.choice([1, 7, 507, 1024])
        self.output = draw.choice(sorted(OUTPUTS))
        if self.output == "narrowed" and self.dtype != torch.float32:
            self.output = "new output"
        self.paths |= {str(self.dtype), layout, self.output}
        self.paths |= {"softcap"} if softcap else set()
        self.paths |= {"temperature"} if temperature != 1 else set()
        self.logits = laid_out(layout, vocab, self.dtype)
        noise = draw.choice([1e-3, 0.5]) * torch.randn(self.logits.shape, dtype=torch.float64)
        offset = draw.choice([0.0, 0.0, 60.0])
        self.paths |= {"offset"} if offset else set()
        self.ref_logits = (self.logits.double() + noise + offset).to(self.dtype)
        self.labels = torch.randint(vocab, self.logits.shape[:-1])
        self.options = RowOptions(0, vocab, -100, temperature, softcap, reverse_kl)
        self._spoil(draw, vocab)
        self._cut(draw, vocab)
        real = operators.state_dtype(self.dtype)
        self.logps_grad, self.kl_grad = (torch.randn(self.labels.shape, dtype=real) for _ in range(2))
        if draw.random() < 0.3:
            self.kl_grad.zero_()
            self.paths.add("no KL gradient")
        if draw.random() < 0.3:
            self.kl_grad.view(-1)[0] = self.logps_grad.view(-1)[0] = 0
            self.paths.add("no gradient")

    def _spoil(self, draw: random.Random, vocab: int) -> None:
        if vocab > 7 and draw.random() < 0.5:
            self.logits[..., 1:3] = self.ref_logits[..., 2:4] = -torch.inf
        if draw.random() < 0.3:
            self.labels.view(-1)[-1] = -100
            self.paths.add("ignored")
        if draw.random() < 0.1:
            self.logits[..., -1:] = torch.nan
            self.paths.add("NaN")

    def _cut(self, draw: random.Random, vocab: int) -> None:
        cuts = sorted(draw.sample(range(1, vocab), 2)) if vocab > 7 and draw.random() < 0.5 else []
        self.slices = list(itertools.pairwise([0, *cuts, vocab]))
        self.paths.add("merged slices" if cuts else "one slice")
        if cuts and draw.random() < 0.4:
            self.logits[..., : cuts[0]] = self.ref_logits[..., : cuts[0]] = -torch.inf
            self.labels.clamp_(max=vocab - 1)
            self.paths.add("slice of -inf")

    def of_slice(self, first: int, stop: int, dtype: torch.dtype):
        rows = [logits[..., first:stop].to(dtype) for logits in (self.logits, self.ref_logits)]
        return (*rows, self.labels), replace(self.options, vocab_start=first).as_keywords()

    def results(self, kernels, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The values and the gradient with some kernels, from the logits in a dtype."""
        reverse_kl, temperature = self.options.reverse_kl, self.options.temperature
        states = [kernels.row_states(*rows, **options) for rows, options in self._slices(dtype)]
        whole = kernels.merge_row_states(torch.stack(states), reverse_kl=reverse_kl) if states[1:] else states[0]
        values = kernels.finalize_row_states(
            whole, self.labels, ignore_index=-100, temperature=temperature, reverse_kl=reverse_kl
        )
        upstream = [gradient.to(whole.dtype) for gradient in (self.logps_grad, self.kl_grad)]
        gradients = []
        for (logits, *others), options in self._slices(dtype):
            narrowed = self.output == "narrowed" and dtype == torch.float32
            out = torch.empty(logits.shape, dtype=torch.bfloat16 if narrowed else dtype)
            if self.output == "in place":
                logits = out.copy_(logits)
            kernels.logit_gradient_out(logits, *others, whole, *upstream, **options, out=out)
            gradients.append(out)
        names = ("logps", "ref_logps", "kl", "entropy", "correct", "tokens")
        return {**dict(zip(names, values)), "gradient": torch.cat(gradients, dim=-1)}

    def _slices(self, dtype: torch.dtype):
        return [self.of_slice(first, stop, dtype) for first, stop in self.slices]


def largest_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Of the entries that are numbers, relative to the largest of them or to 1."""
    known = value.isfinite() & truth.isfinite()
    scale = truth[known].abs().amax().clamp_min(1) if known.any() else 1.0
    return ((value.double() - truth)[known].abs() / scale).max().item() if known.any() else 0.0


@against_compiled
def test_every_operator_is_as_good_as_the_compiled_one(monkeypatch):
    """On 400 random calls, which take every path at least five times; errors by value and dtype, the largest of all."""
    draw, met = random.Random(0), Counter()
    errors = defaultdict(lambda: [0.0, 0.0])
    views = torch_kernels._views

    def counted_views(*tensors):
        parts = list(views(*tensors))
        met["several blocks" if parts[0][0].numel() > 2000 else "one block"] += 1
        return parts

    monkeypatch.setattr(torch_kernels, "_CPU_BLOCK", 2000)
    monkeypatch.setattr(torch_kernels, "_views", counted_views)
    for _ in range(400):
        case = Case(draw)
        ours, compiled = (case.results(kernels, case.dtype) for kernels in (torch_kernels, torch.ops.tdpo_ext))
        truth = case.results(torch.ops.tdpo_ext, torch.float64)
        met.update(case.paths)
        kl = compiled["kl"]
        met.update({"infinite KL": bool(kl.isinf().any())})
        met.update({"near equality": bool((kl < 1e-4).any()), "far from equality": bool((kl > 1e-2).any())})
        for what, value in ours.items():
            assert value.dtype == compiled[what].dtype
            if what == "gradient":  # where the KL is no number, nor is its gradient
                value, compiled[what], truth[what] = (x[kl.isfinite()] for x in (value, compiled[what], truth[what]))
            assert torch.equal(value.isfinite(), compiled[what].isfinite()), f"{what} of {sorted(case.paths)}"
            largest = errors[what, value.dtype]
            found = (largest_error(computed, truth[what]) for computed in (value, compiled[what]))
            largest[:] = map(max, largest, found)
    for (what, dtype), (ours, of_compiled) in errors.items():
        floor = 64 * torch.finfo(dtype).eps if dtype == torch.float64 else torch.finfo(torch.float32).eps
        assert ours <= 2 * of_compiled + floor, f"{what} in {dtype}: {ours:.2g}, compiled {of_compiled:.2g}"
    assert not {path: met[path] for path in PATHS if met[path] < 5}


@against_compiled
@pytest.mark.parametrize("perturbation", [1e-3, 1e-2, 1e-1])
def test_the_kl_keeps_its_digits_near_equality(perturbation):
    logits = 3 * torch.randn(16, 50257)
    ref_logits = logits + perturbation * torch.randn(16, 50257)
    labels, options = torch.randint(50257, (16,)), RowOptions(0, 50257)
    finalize = {"ignore_index": -100, "temperature": 1.0, "reverse_kl": False}
    kl, compiled, truth = (
        kernels.finalize_row_states(kernels.row_states(*rows, labels, **options.as_keywords()), labels, **finalize)[2]
        for kernels, rows in (
            (torch_kernels, (logits, ref_logits)),
            (torch.ops.tdpo_ext, (logits, ref_logits)),
            (torch.ops.tdpo_ext, (logits.double(), ref_logits.double())),
        )
    )
    errors = [((value - truth).abs() / truth).max().item() for value in (kl, compiled)]
    assert errors[0] <= 2 * errors[1] + 1e-6


def bad_calls():
    """Arguments that the operators refuse, by the operator's name."""
    logits, labels = torch.randn(4, 9), torch.tensor([1, 2, 3, -100])
    rows, options = (logits, logits.clone(), labels), RowOptions(0, 9).as_keywords()
    states = torch.ops.tdpo_ext.row_states(*rows, **options)
    gradient = (*rows, states, torch.ones(4), torch.ones(4))
    finalize = {"ignore_index": -100, "temperature": 1.0, "reverse_kl": False}
    beyond = states.clone()
    beyond[1, 0] = 2.0**31
    return [
        ("row_states", (logits.int(), *rows[1:]), options),
        ("row_states", (logits, logits.double(), labels), options),
        ("row_states", (logits, logits[:3], labels), options),
        ("row_states", (logits, logits, labels.int()), options),
        ("row_states", (logits, logits, torch.tensor([1, 2, 3, 9])), options),
        ("row_states", rows, {**options, "vocab_start": 1}),
        ("row_states", rows, {**options, "temperature": 0.0}),
        ("row_states", rows, {**options, "softcap": -1.0}),
        ("merge_row_states", (states[0],), {"reverse_kl": False}),
        ("merge_row_states", (states[None].half(),), {"reverse_kl": False}),
        ("finalize_row_states", (states[:, :3], labels), finalize),
        ("finalize_row_states", (states, labels[:2]), finalize),
        ("finalize_row_states", (beyond, labels), finalize),
        ("logit_gradient_out", gradient, {**options, "out": torch.empty(4, 8)}),
        ("logit_gradient_out", gradient, {**options, "out": rows[1]}),
        ("logit_gradient_out", gradient, {**options, "out": torch.empty(9).expand(4, 9)}),
        ("logit_gradient_out", (*gradient[:4], torch.ones(3), torch.ones(4)), {**options, "out": torch.empty(4, 9)}),
        ("logit_gradient_out", (*rows[:2], labels + 8, *gradient[3:]), {**options, "out": torch.empty(4, 9)}),
    ]


@against_compiled
@pytest.mark.parametrize("number", range(len(bad_calls())))
def test_bad_arguments_are_refused_in_the_same_words(number):
    name, positional, keyword = bad_calls()[number]
    raised = []
    for kernels in (torch.ops.tdpo_ext, torch_kernels):
        with pytest.raises((ValueError, IndexError, REFUSED)) as error:
            getattr(kernels, name)(*positional, **keyword)
        raised.append((type(error.value), str(error.value)))
    assert raised[0] == raised[1]


class LargestResult(TorchDispatchMode):
    """The most entries that a result of torch's operations has."""

    entries = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        given = {argument.untyped_storage().data_ptr() for argument in arguments if isinstance(argument, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.entries = max(self.entries, result.numel())
        return result


def test_no_temporary_is_larger_than_a_block(monkeypatch):
    monkeypatch.setattr(torch_kernels, "_CPU_BLOCK", 5000)
    logits, ref_logits, out = (torch.randn(3, 50, 501).bfloat16()[:, :40] for _ in range(3))
    labels, options = torch.randint(501, (3, 40)), RowOptions(0, 501).as_keywords()
    with LargestResult() as largest:
        states = torch_kernels.row_states(logits, ref_logits, labels, **options)
        torch_kernels.logit_gradient_out(
            logits, ref_logits, labels, states, torch.ones(3, 40), torch.ones(3, 40), **options, out=out
        )
    assert 4000 < largest.entries <= 5000


@pytest.mark.filterwarnings("ignore:tdpo_ext")
@pytest.mark.parametrize("reverse_kl", [False, True])
def test_the_host_reads_nothing_from_a_device(reverse_kl, monkeypatch):
    """On the meta device there is nothing to read: a kernel that looked would fail."""
    for check in ("check_rows", "check_slices", "check_states", "check_gradient"):  # of addresses, which it has none of
        monkeypatch.setattr(torch.ops.tdpo_ext, check, lambda *tensors, **options: None)
    logits, labels = torch.empty(4, 6, 33, device="meta"), torch.empty(4, 6, dtype=torch.int64, device="meta")
    options = RowOptions(0, 33, softcap=10.0, reverse_kl=reverse_kl).as_keywords()
    states = torch_kernels.row_states(logits, logits, labels, **options)
    merged = torch_kernels.merge_row_states(torch.stack([states, states]), reverse_kl=reverse_kl)
    values = torch_kernels.finalize_row_states(
        merged, labels, ignore_index=-100, temperature=1.0, reverse_kl=reverse_kl
    )
    gradients = values[0], values[2]
    out = torch.empty_like(logits)
    torch_kernels.logit_gradient_out(logits, logits, labels, states, *gradients, **options, out=out)
    assert (states.shape, merged.shape, values.shape) == ((4, 6, 9), (4, 6, 9), (6, 4, 6))


@pytest.fixture
def unseen(monkeypatch):
    """Labels and states are taken for those of a device that the host does not look at."""
    monkeypatch.setattr(torch_kernels, "_was_looked_at", lambda tensor: False)
    for check in ("check_rows", "check_states"):
        monkeypatch.setattr(torch.ops.tdpo_ext, check, lambda *tensors, **options: None)


def out_of_range():
    """A call for rows whose labels are wrong in the second, and one for states whose maximum is in the second."""
    logits, labels = torch.randn(3, 9), torch.tensor([1, 9, -100])
    states = torch_kernels.row_states(logits, logits, labels.clamp(max=8), **RowOptions(0, 9).as_keywords())
    states[1, 0] = 2.0**31
    finalize = {"ignore_index": -100, "temperature": 1.0, "reverse_kl": False}
    return {
        "labels hold one out of range; allowed are 0 to 8 and ignore_index -100": lambda: torch_kernels.row_states(
            logits, logits, labels, **RowOptions(0, 9).as_keywords()
        ),
        "have a maximum that is too large": lambda: torch_kernels.finalize_row_states(states, labels, **finalize).t(),
    }


@pytest.mark.filterwarnings("ignore:tdpo_ext")
@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("number", [0, 1])
def test_what_is_out_of_range_stops_a_device_or_is_nan(number, monkeypatch):
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    can_stop = {"aten::_assert_async.msg": False}
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: can_stop.get(name, has_kernel(name, key))
    )
    message, call = list(out_of_range().items())[number]
    assert call().isnan().all(dim=1).tolist() == [False, True, False]
    can_stop.clear()
    with pytest.raises(RuntimeError, match=message):
        list(out_of_range().values())[number]()


def test_a_device_is_asked_for_float32_products(monkeypatch):
    """Where it has none of low-precision operands, they are made of copies."""
    assert matmul._has_out_dtype.__wrapped__("meta", torch.bfloat16)

    def refuses(*operands, **options):
        raise NotImplementedError("aten::mm.dtype")

    monkeypatch.setattr(torch, "mm", refuses)
    assert not matmul._has_out_dtype.__wrapped__("meta", torch.bfloat16)


def test_rows_of_devices_without_float64(monkeypatch):
    """As on Apple's GPUs: numbers of a row in float32, as torch's own log_softmax has them."""
    monkeypatch.setattr(torch_row_state, "wide_dtype", lambda like: torch.float32)
    logits, labels = 3 * torch.randn(8, 5000), torch.randint(5000, (8,))
    ref_logits, options = logits + 0.1 * torch.randn(8, 5000), RowOptions(0, 5000).as_keywords()
    states = torch_kernels.row_states(logits, ref_logits, labels, **options)
    values = torch_kernels.finalize_row_states(states, labels, ignore_index=-100, temperature=1.0, reverse_kl=False)
    truth = tdpo_ext.eager.token_divergence(logits.double(), ref_logits.double(), labels)
    torch.testing.assert_close(values[0].double(), truth.logps, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(values[2].double(), truth.kl, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["row_states", "merge_row_states", "finalize_row_states", "logit_gradient"])
@pytest.mark.parametrize("key", ["CPU", "CUDA", "XPU", "MPS", "HPU", "PrivateUse1"])
def test_every_device_has_kernels(name, key):
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"tdpo_ext::{name}", key)


TWO_CALLS = """
import json, warnings
import torch, tdpo_ext
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        logits = torch.randn(3, 5, requires_grad=True)
        tdpo_ext.token_divergence(logits, torch.randn(3, 5), torch.arange(3)).kl.sum().backward()
said = [str(warning.message) for warning in caught if "tdpo_ext" in str(warning.message)]
print(json.dumps([tdpo_ext.build_info()["kernels"], said]))
"""


def run_with(kernels, folder):
    environment = {**os.environ, "TDPO_KERNELS": kernels}
    command = [sys.executable, "-c", TWO_CALLS]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)


def test_torch_kernels_are_named_and_warn_once(tmp_path):
    done = run_with("torch", tmp_path)
    assert done.returncode == 0, done.stderr
    kernels, said = json.loads(done.stdout.splitlines()[-1])
    assert kernels == "torch on every device (TDPO_KERNELS=torch)"
    assert len(said) == 1
    assert "plain torch compute on cpu: TDPO_KERNELS=torch" in said[0]
    assert "one pass over the logits, without temporaries" in said[0]


def test_compiled_kernels_are_named_and_say_nothing(tmp_path):
    done = run_with("compiled", tmp_path)
    assert done.returncode == 0, done.stderr
    kernels, said = json.loads(done.stdout.splitlines()[-1])
    assert kernels.startswith("compiled on cpu")
    assert kernels.endswith("torch on every other device")
    assert said == []


def test_other_kernels_are_refused(tmp_path):
    done = run_with("triton", tmp_path)
    assert done.returncode == 1
    assert "ValueError: TDPO_KERNELS is 'triton'; allowed are compiled (the default) and torch" in done.stderr
