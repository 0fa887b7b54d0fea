"""Gradients through an int8 layer, against the product with its dequantized weight in 64-bit arithmetic."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmint8.kernels import gradient as gradient_module
from llmint8.kernels import reference
from llmint8.kernels.cpu import native
from llmint8.kernels.gradient import linear_gradient
from llmint8.kernels.operands import Operands
from llmint8.kernels.prepared import ReferenceWeight
from llmint8.kernels.reference import Int8Weight
from llmint8.runtime import Int8Linear

SHAPES = [  # M, K, N, k
    (1, 64, 32, 0),
    (17, 95, 63, 16),
    (5, 1023, 7, 3),
    (3, 33, 1, 33),
    (2, 1, 5, 0),
    (0, 8, 4, 1),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "M{}-K{}-N{}-k{}".format(*shape))
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
RUN = ["as it is", "without the compiled layer", "reference"]


def make_layer(k_in: int, n: int, k: int, dtype: torch.dtype = torch.float32, **how: Any) -> Int8Linear:
    torch.manual_seed(k_in + n)
    linear = nn.Linear(k_in, n, dtype=dtype).requires_grad_(False)
    return Int8Linear.from_linear(linear, torch.randperm(k_in)[:k].sort().values, **how)


def gradients(layer: Int8Linear, x: Tensor, of_out: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    layer(x).backward(of_out)
    assert x.grad is not None
    return x.grad


def assert_gradient(layer: Int8Linear, of_out: Tensor, found: Tensor) -> None:
    """Compare with `of_out @ W`: each sum of N terms in float32, rotated ones and their 6 additions, rounded once."""
    exact, weight = layer.stored(), layer.dequantize(torch.float64)
    if layer.outliers != "static":
        weight = reference.dequantize_weight(exact.values, exact.absmax, exact.rotation).double()
    expected = of_out.double() @ weight
    parts = of_out.double().abs() @ (exact.values.double().abs() * exact.absmax.double()[:, None] / 127)
    if layer.rotation is not None and layer.in_features >= 64:
        blocks = parts[:, : layer.in_features // 64 * 64].unflatten(1, (-1, 64))
        blocks.copy_(blocks.sum(2, True).expand_as(blocks) / 8)
    parts += of_out.double().abs() @ weight.abs()
    sums = (len(weight) + 20) * 2.0**-23 * parts
    # The smallest numbers of float16 have fewer digits.
    rounding = torch.finfo(found.dtype).eps * expected.abs() + torch.finfo(found.dtype).smallest_normal
    assert found.dtype == of_out.dtype
    assert ((found.double() - expected).abs() <= sums + rounding).all()


@shapes
@pytest.mark.parametrize("run", RUN)
@pytest.mark.parametrize("rotation", [None, 64])
def test_the_gradient_is_the_product_with_the_dequantized_weight(
    shape: tuple[int, int, int, int], run: str, rotation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, k_in, n, k = shape
    for dtype in DTYPES:
        if run == "without the compiled layer":
            monkeypatch.setattr(native, "kinds", list)
        layer = make_layer(k_in, n, k, dtype, rotation=rotation)
        for outliers in ("static", "none") if rotation else ("static", "dynamic", "none"):
            layer.configure(outliers=outliers)  # type: ignore[arg-type]
            if run == "reference":
                layer.prepared = ReferenceWeight.prepare(layer.stored())
            x, of_out = torch.randn(m, k_in, dtype=dtype) * 4, torch.randn(m, n, dtype=dtype)
            assert_gradient(layer, of_out, gradients(layer, x, of_out))
            stored = layer.stored()
            assert_gradient(layer, of_out, reference.linear_gradient(of_out, stored))
            assert_gradient(layer, of_out, linear_gradient(of_out, stored))


def test_many_blocks_of_columns_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for rotation in (None, 64):
        weight = make_layer(1000, 30, 5, rotation=rotation).stored()  # type: ignore[arg-type]
        of_out = torch.randn(4, 30)
        whole = linear_gradient(of_out, weight)
        monkeypatch.setattr(gradient_module, "_BLOCK_ELEMENTS", 1)
        # The same sums, in whatever order a product of this width has them.
        assert torch.allclose(linear_gradient(of_out, weight), whole, rtol=0, atol=1e-5)
        monkeypatch.undo()


def test_batches_other_dtypes_and_strided_gradients() -> None:
    layer = make_layer(95, 63, 3)
    x, of_out = torch.randn(2, 3, 95), torch.randn(2, 3, 63)
    found = gradients(layer, x, of_out)
    assert torch.equal(found.view(6, 95), gradients(layer, x.view(6, 95), of_out.view(6, 63)))
    assert gradients(layer, x.double(), of_out.double()).dtype == torch.float64
    ones = torch.ones(()).expand(6, 63)  # as that of a sum
    assert torch.equal(gradients(layer, x.view(6, 95), ones), gradients(layer, x.view(6, 95), ones.contiguous()))
    assert torch.equal(gradients(layer, x, of_out.transpose(0, 1).contiguous().transpose(0, 1)), found)


def test_under_autocast_the_gradient_has_the_dtype_of_the_input() -> None:
    layer = make_layer(64, 32, 3)
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        assert out.dtype == torch.bfloat16
        out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert torch.allclose(x.grad, layer.dequantize().sum(0).expand(5, 64), rtol=2.0**-7, atol=1e-3)


@pytest.mark.parametrize("rotation", [None, 64])
@pytest.mark.parametrize("run", RUN[:2])
def test_nothing_is_kept_for_the_backward_pass(run: str, rotation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if run == "without the compiled layer":
        monkeypatch.setattr(native, "kinds", list)
    layer = make_layer(128, 32, 3, rotation=rotation)
    kept: list[Tensor] = []
    first = torch.randn(5, 128, requires_grad=True)
    x = first * 1
    gone = weakref.ref(x)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(x)
    del x
    assert kept == []
    assert gone() is None  # the input itself
    held = [value for value in vars(out.grad_fn).values() if isinstance(value, Tensor)]
    assert held == []
    out.sum().backward()
    assert first.grad is not None


def test_without_a_gradient_wanted_there_is_no_graph() -> None:
    layer = make_layer(64, 32, 3)
    x = torch.randn(5, 64)
    assert not layer(x).requires_grad
    with torch.no_grad():
        assert not layer(x.requires_grad_()).requires_grad
    assert torch.equal(layer(x), layer(x.detach()))


@pytest.mark.parametrize("run", RUN[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_is_trained_and_what_is_written_into_it_counts(
    run: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if run == "without the compiled layer":
        monkeypatch.setattr(native, "kinds", list)
    layer = make_layer(64, 32, 3, dtype)
    assert layer.bias is not None
    layer.bias.requires_grad_()
    x = torch.randn(5, 64, dtype=dtype)
    before = layer(x)
    before.backward(torch.ones_like(before))
    assert torch.equal(layer.bias.grad, torch.full((32,), 5, dtype=dtype))  # type: ignore[arg-type]
    with torch.no_grad():
        layer.bias.fill_(0)
        zeros = layer(x).float()
        layer.bias.fill_(4)
        fours = layer(x).float()
    # Each is rounded to its dtype.
    assert torch.allclose(fours - zeros, torch.tensor(4.0), atol=8 * torch.finfo(dtype).eps)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("outliers", "rotation"), [("static", None), ("dynamic", None), ("static", 64)])
@pytest.mark.parametrize("run", RUN[:2])
def test_compilers_take_it(run: str, outliers: Any, rotation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if run == "without the compiled layer":
        monkeypatch.setattr(native, "kinds", list)
    torch._dynamo.reset()
    layer = make_layer(128, 32, 3, rotation=rotation)
    layer.configure(outliers=outliers)
    x, of_out = torch.randn(5, 128) * 4, torch.randn(5, 32)
    expected, out = gradients(layer, x, of_out), layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), out, atol=1e-4)
    assert torch.allclose(gradients(compiled, x, of_out), expected, atol=1e-5)


def test_the_operator_is_one_that_compilers_can_trust() -> None:
    weight: Int8Weight = make_layer(130, 32, 3).stored()
    arguments = weight.values, weight.absmax, weight.outlier_dims, weight.outlier_weight
    for rotation in (None, 64):
        torch.library.opcheck(
            torch.ops.llmint8.int8_linear_gradient.default,
            (torch.randn(5, 32), *arguments, rotation),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_a_second_derivative_is_an_error() -> None:
    layer = make_layer(64, 32, 3)
    x, of_out = torch.randn(5, 64, requires_grad=True), torch.randn(5, 32, requires_grad=True)
    (found,) = torch.autograd.grad(layer(x), x, of_out, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^there is no second derivative through quantized layers$"):
        found.sum().backward()


def test_functional_gradients() -> None:
    layer = make_layer(64, 32, 3)
    x = torch.randn(5, 64)
    found = torch.func.grad(lambda x: layer(x).sum())(x)
    assert torch.equal(found, gradients(layer, x, torch.ones(5, 32)))


def test_stored_outliers_do_not_count_where_outliers_are_searched() -> None:
    weight: Int8Weight = replace(make_layer(130, 32, 3).stored(), threshold=6.0)
    wrong = replace(weight, outlier_weight=weight.outlier_weight + 100)
    gradient = torch.randn(5, 32)
    expected = gradient @ reference.dequantize_weight(weight.values, weight.absmax)
    for stored in (ReferenceWeight.prepare(wrong).stored(), Operands.prepare(wrong).stored()):
        found = linear_gradient(gradient, stored)
        assert torch.allclose(found, expected, atol=1e-5)  # sums of 32 products in any order
    assert torch.allclose(reference.linear_gradient(gradient, wrong), expected, atol=1e-5)
