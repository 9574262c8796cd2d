"""`token_divergence` against the float64 oracle."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import tdpo_ext
from helpers.logit_cases import DTYPES, VOCABULARIES, assert_as_good_as_eager, random_rows
from tdpo_ext import TokenDivergence, eager, token_divergence
from tdpo_ext.ops.selection import has_compiled_kernels

INF = math.inf


def values_and_gradient(function, logits, ref_logits, labels, **options):
    leaf = logits.detach().requires_grad_()
    divergence = function(leaf, ref_logits, labels, **options)
    weights = torch.linspace(-1, 1, labels.numel(), dtype=divergence.logps.dtype).view(labels.shape)
    kept = torch.isfinite(divergence.kl)
    (divergence.logps * weights + torch.where(kept, divergence.kl, 0) * (0.5 - weights)).sum().backward()
    return divergence.detach(), leaf.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("perturbation", [1e-3, 0.5])
def test_as_good_as_eager(dtype, vocab, perturbation):
    inputs = random_rows(6, vocab, dtype, perturbation, ignored=[2])
    logits, ref_logits, labels = inputs
    ours, grad = values_and_gradient(token_divergence, *inputs)
    eager_values, eager_grad = values_and_gradient(eager.token_divergence, *inputs)
    truth, true_grad = values_and_gradient(eager.token_divergence, logits.double(), ref_logits.double(), labels)
    for name, *values in zip(TokenDivergence._fields, ours, eager_values, truth):
        assert_as_good_as_eager(*values, f"{name} at {vocab}")
        assert values[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    assert_as_good_as_eager(grad, eager_grad, true_grad, f"gradient at {vocab}")


@pytest.mark.parametrize("perturbation", [1e-3, 1e-2, 1e-1])
def test_kl_keeps_its_signal_near_equality(perturbation):
    logits, ref_logits, labels = random_rows(32, 32000, torch.float32, perturbation)
    truth = eager.token_divergence(logits.double(), ref_logits.double(), labels).kl
    ours = token_divergence(logits, ref_logits, labels).kl
    eager_kl = eager.token_divergence(logits, ref_logits, labels).kl
    error, eager_error = (((kl - truth).abs() / truth).max().item() for kl in (ours, eager_kl))
    assert error < 1e-4
    assert error < eager_error / 4


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"softcap": 5.0}, {"temperature": 1.6, "softcap": 30.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_temperature_and_softcap(options, dtype):
    inputs = random_rows(5, 507, dtype, 1.0, ignored=[0])
    ours, grad = values_and_gradient(token_divergence, *inputs, **options)
    eager_values, eager_grad = values_and_gradient(eager.token_divergence, *inputs, **options)
    doubles = (inputs[0].double(), inputs[1].double(), inputs[2])
    truth, true_grad = values_and_gradient(eager.token_divergence, *doubles, **options)
    for name, *values in zip(TokenDivergence._fields, ours, eager_values, truth):
        assert_as_good_as_eager(*values, name)
    assert_as_good_as_eager(grad, eager_grad, true_grad, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [6, 507, 20000])
def test_ignored_rows_are_selected_away(dtype, vocab):
    logits, ref_logits, labels = random_rows(4, vocab, dtype, ignored=[1, 3])
    poisoned, ref_poisoned = logits.clone(), ref_logits.clone()
    poisoned[1], poisoned[3, 0], ref_poisoned[3] = math.nan, INF, -INF
    clean, clean_grad = values_and_gradient(token_divergence, logits, ref_logits, labels)
    ours, grad = values_and_gradient(token_divergence, poisoned, ref_poisoned, labels)
    for value, expected in zip(ours, clean):
        assert torch.equal(value, expected)
        assert torch.equal(value[[1, 3]], torch.zeros(2, dtype=value.dtype))
    assert torch.equal(grad, clean_grad)
    assert not grad[[1, 3]].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_upstream_gradient_has_none_whatever_it_holds(dtype):
    logits, ref_logits, labels = random_rows(4, 507, dtype)
    logits[1], ref_logits[2] = math.nan, math.nan
    divergence = token_divergence(logits.requires_grad_(), ref_logits, labels)
    kept = [0, 3]
    (divergence.logps[kept].sum() + divergence.kl[kept].sum()).backward()
    assert divergence.kl[1:3].isnan().all()
    assert not logits.grad[1:3].any()
    assert logits.grad[kept].any(-1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [8, 507])
def test_edge_values(dtype, vocab):
    logits, ref_logits, labels = random_rows(5, vocab, dtype)
    labels[:] = 1
    logits[0, 3] = ref_logits[0, 3] = -INF  # masked in both
    ref_logits[1, 3] = -INF  # q = 0
    logits[2, 3] = -INF  # p = 0 where q > 0
    ref_logits[3, 3] = -3e4  # q underflows
    logits[4], ref_logits[4] = 1e4 * torch.sign(logits[4]), 1e4 * torch.sign(logits[4])
    ours, grad = values_and_gradient(token_divergence, logits, ref_logits, labels)
    truth, true_grad = values_and_gradient(eager.token_divergence, logits.double(), ref_logits.double(), labels)
    assert ours.kl[2] == INF
    for name, value, expected in zip(TokenDivergence._fields, ours, truth):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5, msg=name)
    assert torch.isfinite(grad).all()
    rows = [0, 1, 3, 4]
    tolerance = 4 * torch.finfo(dtype).eps + 1e-6
    torch.testing.assert_close(grad.double()[rows], true_grad[rows], rtol=tolerance, atol=tolerance)


def test_all_policy_mass_on_what_the_reference_masks():
    logits, ref_logits = torch.tensor([[0.0, -INF]]), torch.tensor([[-INF, 0.0]])
    divergence = token_divergence(logits, ref_logits, torch.tensor([0]))
    assert divergence.kl.item() == INF
    assert divergence.entropy.item() == 0


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_few_rows_split_over_threads(rows):
    inputs = random_rows(rows, 300_000)
    doubles = (inputs[0].double(), inputs[1].double(), inputs[2])
    ours, grad = values_and_gradient(token_divergence, *inputs)
    truth, true_grad = values_and_gradient(eager.token_divergence, *doubles)
    for value, expected in zip(ours, truth):
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=1e-7)


def strided_forms(logits):
    """The same (4, 3, V) logits with every kind of strides a caller has."""
    rows, tokens, vocab = logits.shape
    longer = torch.zeros(rows, tokens + 1, vocab, dtype=logits.dtype)
    longer[:, :-1] = logits
    padded = torch.zeros(rows, tokens, vocab + 5, dtype=logits.dtype)
    padded[..., 2:-3] = logits
    every_other = torch.zeros(rows, 2 * tokens, vocab, dtype=logits.dtype)
    every_other[:, ::2] = logits
    return {
        "shifted": longer[:, :-1],
        "unaligned": padded[..., 2:-3],
        "every other": every_other[:, ::2],
        "transposed rows": logits.transpose(0, 1).contiguous().transpose(0, 1),
        "vocabulary first": logits.movedim(-1, 0).contiguous().movedim(0, -1),
        "expanded": logits[:1].expand(4, 3, vocab) if torch.equal(logits[:1].expand_as(logits), logits) else logits,
    }


@pytest.mark.parametrize("form", ["shifted", "unaligned", "every other", "transposed rows", "vocabulary first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(form, dtype):
    logits, ref_logits, labels = random_rows(12, 333, dtype)
    logits, ref_logits, labels = logits.view(4, 3, -1), ref_logits.view(4, 3, -1), labels.view(4, 3)
    expected, expected_grad = values_and_gradient(token_divergence, logits, ref_logits, labels)
    ours, grad = values_and_gradient(
        token_divergence, strided_forms(logits)[form], strided_forms(ref_logits)[form], labels
    )
    # torch's own operations round the last entries of a block, those that fill no vector, otherwise than the others.
    tolerance = 0.0 if has_compiled_kernels("cpu") else 2e-6
    for value, other in zip((*ours, grad), (*expected, expected_grad)):
        torch.testing.assert_close(value, other, rtol=tolerance, atol=tolerance * 1e-2)


def test_expanded_rows():
    logits, ref_logits, labels = random_rows(1, 333)
    ours = token_divergence(logits.expand(5, -1), ref_logits.expand(5, -1), labels.expand(5))
    assert torch.equal(ours.kl, token_divergence(logits, ref_logits, labels).kl.expand(5))


def test_scalar_labels_and_no_rows():
    logits, ref_logits, labels = random_rows(1, 11)
    one = token_divergence(logits[0], ref_logits[0], labels[0])
    assert one.kl.shape == ()
    assert torch.equal(one.kl, token_divergence(logits, ref_logits, labels).kl[0])
    none, grad = values_and_gradient(token_divergence, logits[:0], ref_logits[:0], labels[:0])
    assert none.kl.shape == (0,)
    assert grad.shape == (0, 11)


def test_large_offsets():
    rows, vocab = 9000, 250_000  # 2.25e9 entries
    row = torch.randn(2, vocab).half()
    logits = torch.empty(rows, vocab, dtype=torch.float16)
    logits[0], logits[-1] = row[0], row[1]
    labels = torch.full((rows,), -100)
    labels[0], labels[-1] = 5, 7
    ours = token_divergence(logits, logits, labels)
    expected = token_divergence(row, row, torch.tensor([5, 7]))
    torch.testing.assert_close(ours.logps[[0, -1]], expected.logps, rtol=1e-6, atol=0)
    assert ours.logps[1:-1].abs().max() == 0


@given(
    rows=st.integers(0, 7),
    vocab=st.integers(1, 700),
    magnitude=st.sampled_from([0.1, 3.0, 50.0, 3e4]),
    perturbation=st.sampled_from([0.0, 1e-3, 1.0, 20.0]),
    masked=st.floats(0, 0.5),
    ignored=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    layout=st.sampled_from(["dense", "padded", "every other", "transposed"]),
    seed=st.integers(0, 2**31),
)
@example(5, 170, 3e4, 20.0, 0.5, 0.0, torch.float32, "dense", 46987)  # maxima of 5e4, 30 nats apart
def test_any_rows(rows, vocab, magnitude, perturbation, masked, ignored, dtype, layout, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(rows, vocab, generator=generator, dtype=torch.float64)

    logits = (magnitude * draw()).to(dtype)
    ref_logits = (logits.double() + perturbation * draw()).to(dtype)
    labels = torch.randint(vocab, (rows,), generator=generator)
    hidden = torch.rand(rows, vocab, generator=generator) < masked
    hidden.scatter_(-1, labels[:, None], False)
    logits, ref_logits = logits.masked_fill(hidden, -INF), ref_logits.masked_fill(hidden, -INF)
    skipped = torch.rand(rows, generator=generator) < ignored
    labels[skipped], logits[skipped] = -100, math.nan

    ours, grad = values_and_gradient(token_divergence, laid_out(logits, layout), laid_out(ref_logits, layout), labels)
    truth, true_grad = values_and_gradient(eager.token_divergence, logits.double(), ref_logits.double(), labels)
    for value, expected in zip(ours, truth):
        torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=2e-5)
    # A probability at the end of an exponent of size m carries m roundings; the gradient is rounded to its dtype.
    spread = 1e-7 * min(100.0, magnitude + perturbation)
    rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-4 + rounding, atol=1e-6 + 4 * spread)


def laid_out(logits, layout):
    """The same rows in memory of other strides."""
    rows, vocab = logits.shape
    if layout == "padded":
        wide = logits.new_zeros(rows, vocab + 5)
        wide[:, 3 : 3 + vocab] = logits
        return wide[:, 3 : 3 + vocab]
    if layout == "every other":
        return logits.repeat_interleave(2, 0)[::2]
    return logits.t().contiguous().t() if layout == "transposed" else logits


def test_gradcheck():
    logits, ref_logits, labels = random_rows(4, 9, torch.float64, ignored=[1])
    logits.requires_grad_()

    def outputs(x):
        divergence = token_divergence(x, ref_logits, labels, temperature=0.8, softcap=4.0)
        return divergence.logps, divergence.kl

    assert torch.autograd.gradcheck(outputs, (logits,))


def test_double_backward_is_refused():
    logits, ref_logits, labels = random_rows(3, 9)
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(token_divergence(logits, ref_logits, labels).kl.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_reference_and_metrics_carry_no_gradient():
    logits, ref_logits, labels = random_rows(3, 9)
    divergence = token_divergence(logits.requires_grad_(), ref_logits.requires_grad_(), labels)
    assert not divergence.ref_logps.requires_grad
    assert not divergence.entropy.requires_grad
    (divergence.kl.sum() + divergence.logps.sum()).backward()
    assert ref_logits.grad is None


def test_compiles_without_a_graph_break():
    logits, ref_logits, labels = random_rows(6, 50)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(x):
        chosen, rejected = token_divergence(2 * x, ref_logits, labels.view(6)).chunk(2)
        return tdpo_ext.tdpo_loss(chosen, rejected).mean()

    leaf = logits.clone().requires_grad_()
    loss(leaf).backward()
    plain = logits.clone().requires_grad_()
    chosen, rejected = token_divergence(2 * plain, ref_logits, labels).chunk(2)
    tdpo_ext.tdpo_loss(chosen, rejected).mean().backward()
    torch.testing.assert_close(leaf.grad, plain.grad)


BAD_CALLS = {
    "rank": (lambda a: {**a, "logits": torch.tensor(1.0)}, ValueError, "logits"),
    "dtype": (lambda a: {**a, "logits": a["logits"].int()}, TypeError, "logits"),
    "ref dtype": (lambda a: {**a, "ref_logits": a["ref_logits"].int()}, TypeError, "ref_logits"),
    "ref shape": (lambda a: {**a, "ref_logits": a["ref_logits"][:, :-1]}, ValueError, "ref_logits"),
    "label shape": (lambda a: {**a, "labels": a["labels"][:-1]}, ValueError, "labels"),
    "label dtype": (lambda a: {**a, "labels": a["labels"].int()}, TypeError, "labels"),
    "label range": (lambda a: {**a, "labels": a["labels"] + 9}, IndexError, "labels"),
    "negative label": (lambda a: {**a, "labels": a["labels"] * 0 - 1}, IndexError, "labels"),
    "temperature": (lambda a: {**a, "temperature": 0.0}, ValueError, "temperature"),
    "softcap": (lambda a: {**a, "softcap": -1.0}, ValueError, "softcap"),
    "empty vocabulary": (
        lambda a: {**a, "logits": a["logits"][:, :0], "ref_logits": a["ref_logits"][:, :0]},
        ValueError,
        "vocabulary",
    ),
    "device": (lambda a: {**a, "ref_logits": a["ref_logits"].to("meta")}, ValueError, "ref_logits"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_names_the_argument(case):
    change, error, name = BAD_CALLS[case]
    arguments = dict(zip(("logits", "ref_logits", "labels"), random_rows(4, 9)))
    with pytest.raises(error, match=name):
        token_divergence(**change(arguments))


def test_per_sequence_and_chunk():
    inputs = random_rows(8, 9)
    divergence = TokenDivergence._make(value.view(4, 2) for value in token_divergence(*inputs))
    chosen, rejected = divergence.per_sequence().chunk(2)
    torch.testing.assert_close(rejected.kl, divergence.kl[2:].sum(-1))
    torch.testing.assert_close(chosen.logratio, (divergence.logps - divergence.ref_logps)[:2].sum(-1))
    with pytest.raises(ValueError, match="chunks"):
        divergence.chunk(3)


def test_shift_labels():
    shifted = tdpo_ext.shift_labels(torch.tensor([[5, -100, 7], [1, 2, 3]]))
    assert shifted.tolist() == [[-100, 7, -100], [2, 3, -100]]
    with pytest.raises(ValueError, match="labels"):
        tdpo_ext.shift_labels(torch.tensor(1))
