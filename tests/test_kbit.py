"""Weights of 3 to 8 bits: levels, packing, the layer; against formulas written here again."""

import copy
import pickle
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmint8.formats import KBit, LLMInt8Error
from llmint8.kernels.kbit import packing, reference
from llmint8.kernels.kbit.levels import check_levels, levels_of, quantiles
from llmint8.kernels.kbit.linear import prepare
from llmint8.runtime import KBitLinear
from llmint8.runtime.layers.embedding import Int8Embedding, tied_head

SCHEMES = [
    KBit(3, "int", 32),
    KBit(4, "float", 64),
    KBit(4, "nf4", None),
    KBit(5, "dynamic", 128),
    KBit(6, "quantile", 4096),
    KBit(7, "int", None),
    KBit(8, "float", 64),
]
schemes = pytest.mark.parametrize("kbit", SCHEMES, ids=lambda kbit: kbit.name)


def make_layer(kbit: KBit, k_in: int = 95, n: int = 17, dims: Tensor | None = None, bias: bool = True) -> KBitLinear:
    torch.manual_seed(0)
    return KBitLinear.from_linear(nn.Linear(k_in, n, bias).half(), kbit, dims)


def near(y: Tensor, exact: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Whether y is right where levels, absmax and x may be rounded to 16 bit, half a unit of 8 bits each."""
    bound = x.double().abs() @ weight.double().abs().t() * 4 * 2.0**-9 + exact.abs() * 2.0**-8 + 1e-6
    return bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("bits", range(3, 9))
@pytest.mark.parametrize("data_type", ["int", "float", "dynamic"])
def test_the_levels_are_those_of_the_other_reader(bits: int, data_type: Any, spec_reader: ModuleType) -> None:
    found = levels_of(data_type, bits)
    assert found.tolist() == spec_reader.levels(bits, data_type).tolist()
    assert bool((found.diff() >= 0).all())
    assert 0 in found
    assert float(found[-1]) == 1


@pytest.mark.parametrize("bits", range(3, 9))
@pytest.mark.parametrize("k", [1, 63, 64, 130])
def test_what_is_packed_comes_back_and_takes_k_bits(bits: int, k: int, spec_reader: ModuleType) -> None:
    codes = torch.randint(0, 2**bits, (3, k), dtype=torch.uint8)
    packed = packing.pack(codes, bits)
    assert packed.shape == (3, -(-k // 64) * 8 * bits)
    assert torch.equal(packing.unpack(packed, bits, k), codes)
    assert spec_reader.codes(packed.numpy(), bits, k).tolist() == codes.tolist()
    assert packing.unpack(packing.pack(codes[:0], bits), bits, k).shape == (0, k)


@schemes
def test_every_code_is_that_of_the_nearest_level(kbit: KBit) -> None:
    weight = torch.randn(7, 100)
    weight[2, :40] = 0
    codes, absmax, levels = reference.quantize_weight(weight, kbit.bits, kbit.data_type, kbit.block)
    width = kbit.block or 100
    for row in range(7):
        for start in range(0, 100, width):
            block = weight[row, start : start + width]
            largest = float(block.abs().max().half())
            assert float(absmax[row, start // width]) == largest
            apart = (block[:, None].double() - levels.double() * largest).abs()
            chosen = apart.gather(1, codes[row, start : start + width, None].long())[:, 0]
            assert bool((chosen <= apart.min(1).values + 1e-6 * largest).all())
    restored = reference.dequantize_codes(codes, absmax, levels, kbit.block)
    assert bool((restored[2, : min(width, 40) // 32 * 32] == 0).all())


def test_a_block_of_zeros_or_of_less_than_float16_holds_is_of_zeros() -> None:
    weight = torch.randn(3, 70)
    weight[0, :32], weight[1, 32:64], weight[2, 64:] = 0, 2.0**-26, 1
    absmax = reference.block_absmax(weight, 32)
    over = reference.normalized(weight, absmax, 32)
    assert absmax.dtype == torch.float16
    assert (absmax == 0).tolist() == [[True, False, False], [False, True, False], [False, False, False]]
    assert torch.equal(over[0, :32], torch.zeros(32))
    assert torch.equal(over[1, 32:64], torch.zeros(32))
    assert torch.equal(over[2, 64:], torch.ones(6))
    assert torch.equal(over[0, 32:64], weight[0, 32:64] / absmax[0, 1].float())


def test_quantile_levels_are_quantiles_of_the_weights() -> None:
    torch.manual_seed(0)
    values = torch.randn(20, 50).clamp(-4, 3) / 4
    for bits in (3, 4, 6):
        half = 2 ** (bits - 1)
        outermost = (1 / 2**bits + 1 / (2**bits - 1)) / 2
        upper = np.quantile(values.numpy(), np.linspace(1 - outermost, 0.5, half + 1)[:-1])
        lower = np.quantile(values.numpy(), np.linspace(outermost, 0.5, half)[:-1])
        # Of a sample the median is not quite 0, and no level lies on the other side of it.
        upper, lower = np.maximum(upper, 0), np.minimum(lower, 0)
        expected = np.sort(np.concatenate([upper / upper[0], -lower / lower[0], [0]]))
        levels = quantiles(values, bits)
        assert np.allclose(levels.numpy(), expected, atol=2.0**-11)  # half a unit of float16
        assert torch.equal(levels.half().float(), levels)
    assert bool((quantiles(torch.zeros(4, 8), 4).diff() >= 0).all())
    assert len(quantiles(torch.zeros(0, 8), 4)) == 16


@pytest.mark.parametrize(
    ("bits", "data_type", "message"),
    [(2, "int", "2 bits, expected 3 to 8"), (4, "fp4", "expected one of int, float"), (3, "nf4", "it has 4")],
)
def test_levels_that_there_are_not(bits: int, data_type: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_levels(data_type, bits)
    with pytest.raises(ValueError, match=message.replace("it has 4", "expected 4")):
        KBit(bits, data_type, None)


@schemes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_layer_multiplies_by_the_dequantized_weight(kbit: KBit, dtype: torch.dtype) -> None:
    layer = make_layer(kbit, dims=torch.tensor([0, 7, 94])).to(dtype)
    codes = packing.unpack(layer.unpacked_weight(), kbit.bits, 95)
    levels = layer.codebook.float() if kbit.has_codebook else levels_of(kbit.data_type, kbit.bits)
    weight = reference.dequantize_codes(codes, layer.absmax, levels, kbit.block)
    assert layer.outlier_dims is not None
    assert layer.outlier_weight is not None
    assert layer.bias is not None
    weight[:, [0, 7, 94]] = layer.outlier_weight.float()
    assert torch.equal(layer.dequantize(), weight)
    assert layer.absmax.dtype == torch.float16
    assert layer.outlier_weight.dtype == dtype
    x = torch.randn(2, 3, 95).to(dtype)
    y = layer(x)
    assert (y.dtype, y.shape) == (dtype, (2, 3, 17))
    exact = x.double() @ weight.double().t() + layer.bias.double()
    assert near(y.flatten(0, 1), exact.flatten(0, 1), x.flatten(0, 1), weight)
    one = layer(x[1, 2])
    assert near(one[None], exact[1, 2:3], x[1, 2:3], weight)
    layer.configure(outliers="none")
    without = reference.dequantize_codes(codes, layer.absmax, levels, kbit.block)
    exact = x[0].double() @ without.double().t() + layer.bias.double()
    assert near(layer(x[0]), exact, x[0], without)


def test_outlier_columns_are_those_of_the_weight() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 8).half()
    layer = KBitLinear.from_linear(linear, KBit(3, "int", 32), torch.tensor([5, 40]))
    x = torch.zeros(1, 64)
    x[0, 5] = 1
    expected = linear.weight[:, 5].float() + linear.bias.float()
    # The code's part is taken away again: what is left of its rounding is in units of 2^-12 of the largest weight.
    assert torch.allclose(layer.float()(x)[0], expected, atol=float(linear.weight.abs().max()) * 2.0**-9)


@schemes
def test_a_copy_a_pickle_a_state_and_a_cast_run_as_the_layer_does(kbit: KBit) -> None:
    layer = make_layer(kbit, dims=torch.tensor([3]))
    x = torch.randn(4, 95).half()
    expected = layer(x)
    copied, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    empty = KBitLinear(95, 17, outlier_count=0, kbit=kbit, dtype=torch.float16)
    state = layer.state_dict()
    assert state["weight"].dtype == torch.uint8
    empty.load_state_dict(state)
    for other in (copied, pickled, empty, layer.float().half()):
        assert torch.equal(other(x), expected)
    with pytest.raises(
        RuntimeError, match=r"weight is torch.float32, expected torch.uint8; see KBitLinear.from_linear"
    ):
        empty.load_state_dict({**state, "weight": torch.zeros(17, 95)})


def test_what_is_written_into_the_weight_is_quantized() -> None:
    layer = make_layer(KBit(4, "quantile", 32), k_in=64, dims=torch.tensor([3]))
    weight = layer.dequantize()
    weight[2] += 0.01
    layer.weight.data = weight
    assert torch.equal(layer.dequantize()[:, 3], weight[:, 3].half().float())
    expected = reference.quantize_to(weight, layer.codebook.float(), 32)
    assert torch.equal(packing.unpack(layer.unpacked_weight(), 4, 64), expected[0])
    assert torch.equal(layer.absmax, expected[1])
    before = layer.dequantize()
    with pytest.raises(LLMInt8Error, match="holds NaN or infinity"):
        layer.weight.data = weight * float("inf")
    assert torch.equal(layer.dequantize(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_is_that_of_the_dequantized_weight(dtype: torch.dtype) -> None:
    layer = make_layer(KBit(4, "nf4", 64), dims=torch.tensor([0, 9])).to(dtype)
    x = torch.randn(5, 95).to(dtype).requires_grad_()
    assert layer.bias is not None
    layer.bias.requires_grad_()
    gradient = torch.randn(5, 17).to(dtype)
    layer(x).backward(gradient)
    assert x.grad is not None
    assert layer.bias.grad is not None
    weight = layer.dequantize().double()
    exact = gradient.double() @ weight
    assert near(x.grad, exact, gradient, weight.t())
    assert torch.allclose(layer.bias.grad.double(), gradient.double().sum(0), rtol=2.0**-7, atol=1e-2)


def test_compilers_take_the_operator_whole() -> None:
    layer = make_layer(KBit(4, "float", 64), dims=torch.tensor([2]))
    x = torch.randn(3, 95).half()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    assert layer.prepared is not None
    operands: Any = layer.prepared.operands  # type: ignore[attr-defined]
    torch.library.opcheck(torch.ops.llmint8.kbit_linear.default, (x, *operands))
    weight = layer.stored()
    coded = weight.packed, weight.absmax, weight.levels, 95, 64, weight.outlier_dims, weight.outlier_weight
    torch.library.opcheck(torch.ops.llmint8.kbit_linear_gradient.default, (torch.randn(3, 17).half(), *coded))
    with pytest.raises(ValueError, match=r"absmax has shape \[17, 2\], expected \[17, 3\]"):
        torch.ops.llmint8.kbit_linear(x, *operands._replace(block=32))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"packed": torch.zeros(17, 5, dtype=torch.uint8)}, r"packed has shape \[17, 5\], expected \[any, 64\]"),
        ({"packed": torch.zeros(17, 64, dtype=torch.int8)}, "packed is torch.int8"),
        ({"absmax": torch.zeros(17, 2)}, "absmax is torch.float32"),
        ({"levels": torch.zeros(15)}, "levels has shape"),
        ({"outlier_dims": torch.tensor([95], dtype=torch.int32)}, "strictly increasing numbers from 0 to 94"),
        ({"outlier_weight": torch.zeros(16, 1)}, r"columns has shape \[16, 1\], expected \[17, 1\]"),
        ({"bias": torch.zeros(3)}, r"bias has shape \[3\]"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(changed: dict[str, Tensor], message: str) -> None:
    stored = make_layer(KBit(4, "float", 64), dims=torch.tensor([2])).stored()
    parts = {name: changed.get(name, getattr(stored, name)) for name in stored.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        prepare(reference.KBitWeight(**parts))


@pytest.mark.parametrize("kbit", [KBit(4, "int", 32), KBit(3, "quantile", None)], ids=lambda kbit: kbit.name)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_made_of_a_linear_one_and_shares_nothing_with_it(kbit: KBit, bias: bool) -> None:
    torch.manual_seed(0)
    linear, dims = nn.Linear(70, 9, bias).requires_grad_(False), torch.tensor([2, 69], dtype=torch.int32)
    turned = Conv1D(9, 70)
    turned.weight = nn.Parameter(linear.weight.t().contiguous(), requires_grad=False)
    turned.bias = linear.bias
    layers = [KBitLinear.from_linear(one, kbit, dims) for one in (linear, turned)]
    state = {name: tensor.clone() for name, tensor in layers[0].state_dict().items()}
    assert ("bias" in state, "codebook" in state) == (bias, kbit.has_codebook)
    assert torch.equal(state["outlier_weight"], linear.weight[:, [2, 69]])
    for layer in layers:
        assert (layer.in_features, layer.out_features, layer.outliers) == (70, 9, "static")
        assert torch.equal(layer.dequantize()[:, [2, 69]], linear.weight[:, [2, 69]])
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        assert layer.prepared is not None
        assert repr(layer).endswith(f"bias={bias}, outlier_dims=2, outliers='static', weight={kbit.name!r})")
    for tensor in (dims, *linear.parameters(), *turned.parameters()):
        tensor.zero_()
    for layer in layers:
        assert layer.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())


def test_a_weight_that_no_scale_holds_is_refused() -> None:
    for value in (1e5, float("nan"), float("inf")):
        linear = nn.Linear(64, 8).requires_grad_(False)
        linear.weight[1, 2] = value
        with pytest.raises(ValueError, match="values that are not finite, or that float16 cannot hold"):
            KBitLinear.from_linear(linear, KBit(4, "int", 32))


def test_columns_count_or_not_as_it_is_configured() -> None:
    layer = make_layer(KBit(4, "int", 64), dims=torch.tensor([3, 90]))
    x = torch.randn(4, 95).half()
    prepared, counted = layer.prepared, layer(x)
    layer.configure()
    layer.configure(outliers="static")
    assert layer.prepared is prepared
    layer.outliers = "none"
    assert layer.outliers == "none"
    assert not torch.equal(layer(x), counted)
    made = KBitLinear(95, 17, outlier_count=2, kbit=layer.kbit, outliers="none", dtype=torch.float16)
    assert made.prepared is None
    made.load_state_dict(layer.state_dict())
    assert torch.equal(made(x), layer(x))
    for settings in ({}, {"outliers": "none"}, {"activation": "absmax"}):
        layer.configure(**settings)  # type: ignore[arg-type]
        assert layer.outliers == "none"
    layer.configure(outliers="static")
    assert torch.equal(layer(x), counted)
    for wrong in ("some", "dynamic"):
        with pytest.raises(ValueError, match=f"^outliers is '{wrong}', "):
            KBitLinear(95, 17, kbit=layer.kbit, outliers=wrong)  # type: ignore[arg-type]


def test_there_is_nothing_to_search_for() -> None:
    layer = make_layer(KBit(4, "float", 64))
    with pytest.raises(ValueError, match="the inputs of layers of k bits are not quantized"):
        layer.outliers = "dynamic"
    layer.configure(activation="absmax", activation_group=64, threshold=3.0)  # of other layers
    assert layer.outliers == "static"


def test_a_table_of_k_bits_and_the_head_that_is_tied_to_it() -> None:
    kbit = KBit(4, "nf4", 32)
    layer = make_layer(kbit, k_in=40, n=9, dims=torch.tensor([1]), bias=False)
    with torch.device("meta"):
        plain = nn.Embedding(9, 40)
    table = Int8Embedding.in_place_of(plain, 1, device="cpu", dtype=torch.float16, kbit=kbit)
    table.load_state_dict(layer.state_dict())
    rows = torch.tensor([[3, 0], [8, 3]])
    assert torch.equal(table(rows), layer.dequantize().half()[rows])
    head = tied_head(table)
    head.prepare()
    x = torch.randn(2, 40).half()
    assert torch.equal(head(x), layer(x))
    assert isinstance(head, KBitLinear)
    assert head.table is table
    assert not head.state_dict()
    assert np.shares_memory(head.absmax.numpy(), table.absmax.numpy())
