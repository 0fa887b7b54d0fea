"""The compiled layer of 3 to 8 bits: within its bound of the reference, with every instruction set there is."""

import itertools
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from llmint8.kernels.kbit import cpu
from llmint8.kernels.kbit.levels import BITS, DataType
from llmint8.kernels.kbit.linear import kbit_linear, plain_linear, prepare
from llmint8.kernels.kbit.operands import KBitOperands
from llmint8.kernels.kbit.packing import pack
from llmint8.kernels.kbit.reference import KBitWeight, by_element, from_float

# A library that gets sums wrong is no reason to skip.
_SKIPPED = not cpu.kinds() and "wrong" not in cpu.why_not()
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(_SKIPPED, reason=cpu.why_not() if _SKIPPED else ""),
]
every_kind = pytest.mark.parametrize("kind", cpu.kinds())
every_width = pytest.mark.parametrize("bits", BITS)
DTYPES = torch.float32, torch.float16, torch.bfloat16
TENSORS = "packed", "absmax", "levels", "outlier_dims", "outlier_weight", "bias"
# N, K, block and M: chunks that are not full, blocks that end within one, one row of the weight, odd numbers of chunks.
SHAPES = [
    (1, 1, 32, 1),
    (33, 31, None, 2),
    (5, 65, 64, 3),
    (2, 128, 64, 4),
    (63, 97, 32, 5),
    (7, 640, 128, 1),
    (9, 4095, 4096, 1),
    (9, 1000, None, 7),
    (66, 193, 32, 33),
    (34, 257, 64, 12),
]
ids = [f"N{n}-K{k}-B{block}-M{m}" for n, k, block, m in SHAPES]


def layer(
    n: int, k: int, bits: int, block: int | None, data_type: DataType = "quantile", outliers: int = 3
) -> KBitWeight:
    random = torch.Generator().manual_seed(n * k + bits)
    dims = torch.arange(k)[:: max(1, k // max(1, outliers))] if outliers else torch.arange(0)
    weight, bias = torch.randn(n, k, generator=random), torch.randn(n, generator=random)
    return from_float(weight, bits, data_type, block, dims, bias)


def inputs(m: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of different sizes, each with a few values that are much larger."""
    random = torch.Generator().manual_seed(m * k)
    x = torch.randn(m, k, generator=random) * torch.logspace(-3, 2, m)[:, None]
    return torch.where(torch.rand(m, k, generator=random) < 0.01, 50 * x, x).to(dtype)


def bound(x: Tensor, weight: KBitWeight) -> Tensor:
    """What may be lost before the result is rounded, float64 [M, N]: what `kbit.c` says, and of sums in float32."""
    k = weight.in_features
    sizes = x.double().abs()
    chunks = pad(sizes, (0, -k % 64)).view(len(x), -(-k // 64), 64)
    unit = 2.0 ** (chunks.amax(2).clamp(min=1e-30).log2().floor() + 1 - 15)
    absmax = by_element(weight.absmax, k, weight.block).double()
    large = sizes + unit.repeat_interleave(64, 1)[:, :k]
    total = sizes @ weight.dequantize().double().abs().t() + large @ absmax.t()
    lost = large @ absmax.t() * 2.0**-15 + unit.repeat_interleave(64, 1)[:, :k] @ absmax.t()
    return lost + total * 2.0**-20 + 2.0**-20


def assert_close(found: Tensor, x: Tensor, weight: KBitWeight, more: float = 0.0) -> None:
    expected = x.double() @ weight.dequantize().double().t()
    if weight.bias is not None:
        expected += weight.bias.double()
    allowed = bound(x, weight) + expected.abs() * torch.finfo(found.dtype).eps
    if more:
        allowed += more * (x.double().abs() @ weight.dequantize().double().abs().t() + expected.abs())
    assert found.shape == expected.shape
    assert bool(((found.double() - expected).abs() <= allowed).all())


@every_kind
@every_width
def test_it_agrees_with_the_reference(bits: int, kind: cpu.Kind) -> None:
    turns = itertools.cycle(itertools.product(("int", "float", "dynamic", "quantile"), DTYPES))
    for n, k, block, m in SHAPES:
        data_type, dtype = next(turns)
        weight, x = layer(n, k, bits, block, data_type), inputs(m, k, dtype)
        found = cpu.CpuKBit(KBitOperands.prepare(weight)).run(x, kind, 1)
        assert found.dtype == dtype
        assert_close(found, x, weight)


@every_kind
@every_width
def test_every_code_of_even_levels_stands_for_what_the_reference_says(bits: int, kind: cpu.Kind) -> None:
    codes = torch.arange(2**bits, dtype=torch.uint8)[None, [-1, *range(2**bits)]]  # of which the last two are 1
    for block in (32, 64):
        weight = replace(layer(1, codes.shape[1], bits, block, "int", 0), packed=pack(codes, bits))
        native = cpu.CpuKBit(KBitOperands.prepare(weight))
        x = inputs(4, codes.shape[1])
        for m in (1, 2, 4):
            assert_close(native.run(x[:m], kind, 1), x[:m], weight)
        absmax = by_element(weight.absmax, codes.shape[1], block)
        found = native.dequantize(0, torch.empty(codes.shape), kind, 1)
        assert bool(((found - weight.dequantize()).abs() <= 2.0**-15 * absmax).all())


@every_kind
@every_width
def test_rows_of_the_weight_are_dequantized(bits: int, kind: cpu.Kind) -> None:
    for (n, k, block, _), data_type in zip(SHAPES, itertools.cycle(("int", "dynamic", "quantile"))):
        weight = layer(n, k, bits, block, data_type)
        exact, absmax = weight.dequantize(), by_element(weight.absmax, k, block)
        native = cpu.CpuKBit(KBitOperands.prepare(weight))
        found = native.dequantize(n // 2, torch.empty(n - n // 2, k), kind, 2)
        assert bool(((found - exact[n // 2 :]).abs() <= 2.0**-15 * absmax[n // 2 :] + 2.0**-20).all())
        narrow = native.dequantize(n // 2, torch.empty_like(found, dtype=torch.bfloat16), kind, 1)
        assert torch.equal(narrow, found.bfloat16())


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_are_multiplied_dequantized(
    dtype: torch.dtype, kind: cpu.Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_STEP_ELEMENTS", 3000)  # some rows of the weight, and one that is left over
    for bits, (n, k, block, m) in zip(itertools.cycle(BITS), SHAPES):
        weight, x = layer(n, k, bits, block), inputs(m, k, dtype)
        found = cpu.CpuKBit(KBitOperands.prepare(weight)).run_dequantized(x, dtype, kind, 2)
        assert found.dtype == dtype
        assert_close(found, x, weight, more=0 if dtype == torch.float32 else 2.0**-8)


@every_kind
def test_a_row_is_what_it_is_alone_whatever_the_threads(kind: cpu.Kind) -> None:
    for bits, (n, k, block) in zip(
        BITS, [(70, 130, 32), (70, 200, 64), (3, 64, 64), (33, 300, None)] * 2, strict=False
    ):
        native = cpu.CpuKBit(KBitOperands.prepare(layer(n, k, bits, block)))
        x = inputs(11, k)
        x[4] *= 1e6
        found = native.run(x, kind, 3)
        for m in range(11):
            assert torch.equal(native.run(x[m : m + 1], kind, 1)[0], found[m])


@every_kind
def test_what_is_not_finite_makes_nan_of_its_row_and_what_is_tiny_nothing_worse(kind: cpu.Kind) -> None:
    weight = layer(9, 200, 4, 64)
    x = inputs(5, 200)
    native = cpu.CpuKBit(KBitOperands.prepare(weight))
    expected = native.run(x, kind, 1)
    x[1, 70], x[3, 199] = float("nan"), float("-inf")
    found = native.run(x, kind, 1)
    assert found[[1, 3]].isnan().all()
    assert torch.equal(found[[0, 2, 4]], expected[[0, 2, 4]])
    for size in (1e-38, 1e-30, 1e35):
        few = torch.full((1, 200), size)
        assert_close(native.run(few, kind, 1), few, weight)


def test_the_operator_checks_x_and_remembers_weights_and_keeps_none_of_their_tensors() -> None:
    operands, x = KBitOperands.prepare(layer(40, 130, 4, 64)), inputs(2, 130)
    others = [None if part is None else part.clone() for part in operands[:6]]

    def run(tensors: Any, x: Tensor = x) -> Tensor:
        return torch.ops.llmint8.kbit_linear(x, *tensors, *operands[6:])

    expected = cpu.CpuKBit(operands)(x)
    doubled = [others[0], others[1] * 2, *others[2:5], None]
    other = cpu.CpuKBit(KBitOperands(*doubled, *operands[6:]))
    wide = {"x has shape [2, 131], expected [any, 130]": inputs(2, 131), "x is torch.float64": x.double()}
    for _ in range(2):  # of which it knows the weights in the second
        for message, wrong in wide.items():
            with pytest.raises(ValueError, match=re.escape(message)):
                run(operands[:6], wrong)
        assert torch.equal(run(operands[:6]), expected)
        assert torch.equal(run(others), expected)
        assert torch.equal(run(doubled), other(x))
    with pytest.raises(ValueError, match=r"absmax has shape \[39, 3\], expected \[40, 3\]"):
        run([operands[0], operands[1][1:], *operands[2:6]])
    others[0].data = 255 - others[0].data
    others[0].data = operands[0].data.clone()  # where it was before may hold anything by now
    assert torch.equal(run(others), expected)
    kept = weakref.ref(others[1])
    del others, doubled, other
    assert kept() is None


def test_the_facade_takes_it_and_agrees_for_few_rows_and_many() -> None:
    weight = layer(70, 200, 4, 64)
    prepared = prepare(weight)
    assert prepared.runs_on == f"4 bits: {cpu.kinds()[0]} on the CPU"
    for m, dtype in itertools.product((0, 1, 31, 200), DTYPES):
        x = inputs(m, 200, dtype)
        found = kbit_linear(x, prepared)
        assert_close(found, x, weight, more=2.0**-8)
        assert torch.equal(torch.ops.llmint8.kbit_linear(x, *prepared.operands), found)
        assert_close(plain_linear(x, prepared.operands), x, weight)
        wide = torch.stack([x, x], 2)[:, :, 0]
        assert torch.equal(kbit_linear(wide, prepared), found)


@pytest.mark.parametrize("shape", [(0, 64, 3), (5, 0, 3), (5, 64, 0)], ids=lambda shape: "N{}-K{}-M{}".format(*shape))
def test_layers_of_nothing(shape: tuple[int, int, int]) -> None:
    n, k, m = shape
    whole = layer(5, k, 4, 64, "float", outliers=0).rows(torch.arange(n))
    weight, x = replace(whole, bias=torch.randn(n)), torch.randn(m, k)
    found = cpu.CpuKBit(KBitOperands.prepare(weight))(x)
    assert torch.equal(found, torch.zeros(m, n) + weight.bias)


def test_dims_that_are_not_in_the_layer_are_refused() -> None:
    operands = KBitOperands.prepare(layer(5, 64, 4, 64))
    for dims in ([0, 1, 64], [-1, 0, 1], [3, 3, 4]):
        native = cpu.CpuKBit(operands._replace(outlier_dims=torch.tensor(dims)))
        for m in (1, 100):
            with pytest.raises(ValueError, match=r"outlier_dims is .* expected rising numbers from 0 to 63"):
                native(torch.randn(m, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize("wrong", ["sums", "a level", "the last level"])
def test_no_set_is_believed_that_gets_something_wrong(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, dequantize = cpu.CpuKBit.run, cpu.CpuKBit.dequantize

    def dequantized(self: cpu.CpuKBit, *of: Any) -> Tensor:
        found = dequantize(self, *of)
        level = {"sums": 0, "a level": 3, "the last level": -1}[wrong]
        amount = found.unique()[level] if len(found.unique()) > 3 else torch.inf
        return found.where(found != amount, amount * (1 + 2.0**-6))

    if wrong == "sums":
        monkeypatch.setattr(cpu.CpuKBit, "run", lambda self, *of: run(self, *of) * (1 + 2.0**-16))
    else:
        monkeypatch.setattr(cpu.CpuKBit, "dequantize", dequantized)
    assert not any(cpu._is_exact(kind) for kind in get_args(cpu.Kind) if kind in cpu.kinds())


def test_every_set_that_is_there_gets_its_sums_right() -> None:
    library = cpu._library()
    assert not isinstance(library, str)
    there = library.llmint8_supported()
    found = cpu.kinds.__wrapped__()  # asked anew
    assert ("AVX2" in found) == bool(there >> 1 & 1)
    assert ("AVX512-VBMI" in found) == bool(there >> 3 & library.llmint8_kbit_features() & 1)
    assert found == sorted(found, key=[*cpu.KINDS].index) == cpu.kinds()


def stub(version: int = cpu._VERSION, supported: int = 3, features: int = 0) -> Any:
    """A library that says what it can do, and does nothing."""
    library = mock.MagicMock()
    library.llmint8_kbit_version.return_value = version
    library.llmint8_supported.return_value = supported
    library.llmint8_kbit_features.return_value = features
    return library


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put something in the place of the library; what was asked before is forgotten."""

    def put(library: Any, exact: bool) -> None:
        monkeypatch.setattr(cpu, "compiled", lambda: library)
        monkeypatch.setattr(cpu, "_is_exact", lambda kind: exact)
        for name in ("_library", "kinds", "_multiplies_bfloat16"):
            asked = getattr(cpu, name)
            monkeypatch.setattr(cpu, name, asked.__wrapped__ if hasattr(asked, "__wrapped__") else asked)

    return put


@pytest.mark.parametrize(
    ("library", "exact", "why"),
    [
        ("it was not built", True, "it was not built"),
        (stub(cpu._VERSION + 1), True, "the compiled layer is one of another version"),
        (mock.MagicMock(spec=["llmint8_version"]), True, "the compiled layer is one of another version"),
        (stub(supported=1), True, "the compiled layer of 3 to 8 bits needs AVX2"),
        (stub(supported=3), False, "the compiled layer got sums wrong on this processor"),
    ],
    ids=["none", "another version", "none of k bits", "an old processor", "wrong sums"],
)
def test_without_the_library_a_layer_runs_and_says_why(
    library: Any, exact: bool, why: str, answer: Callable[..., None]
) -> None:
    answer(library, exact)
    weight, x = layer(70, 200, 4, 64), inputs(30, 200, torch.bfloat16)
    prepared = prepare(weight)
    assert prepared.runs_on == f"4 bits: plain PyTorch on cpu ({why})"
    found = kbit_linear(x, prepared)
    assert_close(found, x, weight)
    for _ in range(2):
        assert torch.equal(torch.ops.llmint8.kbit_linear(x, *prepared.operands), found)
    meta = replace(weight, **{name: getattr(weight, name).to("meta") for name in TENSORS})
    assert prepare(meta).runs_on == "4 bits: plain PyTorch on meta"


@pytest.mark.parametrize(
    ("supported", "features", "kinds", "bfloat16"),
    [
        (0b0011, 0b00, ["AVX2"], False),
        (0b1010, 0b01, ["AVX512-VBMI", "AVX2"], False),
        (0b1010, 0b10, ["AVX2"], True),
        (0b0111, 0b01, ["AVX2"], False),
        (0b1001, 0b11, ["AVX512-VBMI"], True),
    ],
)
def test_what_the_processor_has_is_used(
    supported: int, features: int, kinds: list[str], bfloat16: bool, answer: Callable[..., None]
) -> None:
    answer(stub(supported=supported, features=features), True)
    assert cpu.kinds() == kinds
    assert cpu._multiplies_bfloat16() == bfloat16


@pytest.mark.parametrize("kind", get_args(cpu.Kind))
def test_many_rows_are_multiplied_in_floating_point_where_that_is_faster(
    kind: cpu.Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []
    native = cpu.CpuKBit(KBitOperands.prepare(layer(5, 64, 4, 64)))
    monkeypatch.setattr(cpu, "kinds", lambda: [kind])
    monkeypatch.setattr(native, "run", lambda x, *how: ran.append((len(x), "integers")))
    monkeypatch.setattr(native, "run_dequantized", lambda x, dtype, *how: ran.append((len(x), dtype)))
    whole = torch.float32 if kind == "AVX2" else "integers"
    for has_bfloat16 in (False, True):
        monkeypatch.setattr(cpu, "_multiplies_bfloat16", lambda has=has_bfloat16: has)
        for dtype in DTYPES:
            for m in (23, 24):
                native(torch.ones(m, 64, dtype=dtype))
            many = torch.bfloat16 if has_bfloat16 and dtype == torch.bfloat16 else whole
            assert ran == [(23, "integers"), (24, many)]
            ran.clear()
