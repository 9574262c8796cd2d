"""Products that accumulate in float32: with the optional module, where it works for the dtype, and without."""

import pytest
import torch

from tdpo_ext.ops import matmul, operators


def check_product(a, b, depth):
    """A product, and one that is added to it, against float64."""
    truth = a.double() @ b.double()
    out = torch.full(truth.shape, torch.nan)
    operators.matmul_float32(a, b, accumulate=False, out=out)
    tolerance = 4e-6 * depth**0.5
    torch.testing.assert_close(out.double(), truth, rtol=tolerance, atol=tolerance)
    operators.matmul_float32(a, b, accumulate=True, out=out)
    torch.testing.assert_close(out.double(), 2 * truth, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("m", [1, 5, 131])
@pytest.mark.parametrize("k", [1, 64, 2051])
@pytest.mark.parametrize("n", [3, 500])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("brgemm", [True, False])
def test_products_of_any_shape(dtype, m, k, n, transposed, brgemm, monkeypatch):
    if not brgemm:
        monkeypatch.setattr(matmul, "has_brgemm", lambda dtype: False)
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    if transposed:
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    check_product(a, b, k)


# Sizes that the module takes each in its own way (csrc/cpu/brgemm.cpp), with remainders of its tiles and blocks.
SHAPES = {
    "logits": ((150, 600), (600, 1030), (False, True)),
    "logits of many rows": ((700, 30), (30, 800), (False, True)),
    "dhidden, the depth shared": ((150, 4500), (4500, 530), (False, False)),
    "dhidden, a result too large for that": ((2900, 2100), (2100, 1500), (False, False)),
    "dW": ((1030, 150), (150, 530), (True, False)),
    "dW of many rows": ((300, 2300), (2300, 70), (True, False)),
    "dW of wide hidden states": ((300, 333), (333, 2300), (True, False)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("pitch", [0, 7])
def test_large_products(dtype, shape, threads, pitch):
    """With any number of threads, and operands that are parts of wider matrices."""

    def operand(rows, columns, transposed):
        if transposed:
            return operand(columns, rows, False).t()
        return torch.randn(rows, columns + pitch).to(dtype)[:, :columns]

    (m, k), (_, n), (a_transposed, b_transposed) = SHAPES[shape]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_product(operand(m, k, a_transposed), operand(k, n, b_transposed), k)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("m", "k", "n"), [(8192, 3, 5), (8200, 3, 5), (1030, 150, 530), (300, 1500, 2300)])
@pytest.mark.parametrize("brgemm", [True, False])
def test_bfloat16_products_are_rounded_once(m, k, n, brgemm, monkeypatch):
    """dW: by the module tile by tile, without it a block of rows at a time."""
    monkeypatch.setattr(matmul, "_rounds_faster", lambda: True)
    if not brgemm:
        monkeypatch.setattr(matmul, "has_brgemm", lambda dtype: False)
    a, b = torch.randn(k, m).bfloat16().t(), torch.randn(k, n).bfloat16()
    a[1, 0], a[2, 0], a[3, 0] = torch.inf, torch.nan, 3e38
    exact = torch.full((m, n), torch.nan)
    operators.matmul_float32(a, b, accumulate=False, out=exact)
    out = matmul.product(a, b, torch.full((m, n + 9), 7.0, dtype=torch.bfloat16)[:, :n])
    if k <= 1024 and n <= 530:  # sums of the same parts
        torch.testing.assert_close(out, exact.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(out, exact.bfloat16(), equal_nan=True)
    assert torch.equal(out._base[:, n:], torch.full((m, 9), 7.0).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_of_one_dtype_without_the_optional_module(dtype, monkeypatch):
    monkeypatch.setattr(matmul, "has_brgemm", lambda dtype: False)
    a, b = torch.randn(70, 9).to(dtype), torch.randn(9, 33).to(dtype)
    out = matmul.product(a, b, torch.full((70, 33), torch.nan, dtype=dtype))
    torch.testing.assert_close(out, (a.double() @ b.double()).to(dtype))
    matmul.product(a, b, out, accumulate=True)
    torch.testing.assert_close(out, (2 * (a.double() @ b.double())).to(dtype))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"a": torch.ones(4, 5)}, "are not matrices that can be multiplied"),
        ({"a": torch.ones(4, 3, dtype=torch.float64)}, "a has dtype"),
        ({"b": torch.ones(3, 2)}, "both must be"),
        ({"out": torch.ones(4, 3)}, "out has shape"),
        ({"out": torch.ones(2, 4).t()}, "out has shape"),
        ({"out": torch.ones(4, 2).half()}, "out has dtype"),
        ({"out": torch.ones(4, 2).bfloat16(), "accumulate": True}, "out has dtype"),
        ({"a": torch.ones(4, 3), "b": torch.ones(3, 2), "out": torch.ones(4, 2).bfloat16()}, "out has dtype"),
    ],
)
def test_products_refuse_what_they_cannot_take(wrong, message):
    good = {"a": torch.ones(4, 3).bfloat16(), "b": torch.ones(3, 2).bfloat16(), "out": torch.ones(4, 2)}
    operators.matmul_float32(**good, accumulate=False)
    operators.matmul_float32(**{**good, "out": torch.ones(4, 2).bfloat16()}, accumulate=False)
    with pytest.raises((TypeError, ValueError), match=message):
        operators.matmul_float32(**{"accumulate": False, **good, **wrong})
