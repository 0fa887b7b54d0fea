"""What a weight is prepared as, and what is chosen for it: none of it is seen in the numbers of one machine."""

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from llmint8.kernels import checks, linear, operators, prepared, reference
from llmint8.kernels.cpu import checked, native
from llmint8.kernels.cpu import linear as cpu
from llmint8.kernels.cpu import product as products
from llmint8.kernels.kbit import linear as kbit_linear
from llmint8.kernels.kbit import reference as kbit_reference
from llmint8.kernels.kbit.packing import pack
from llmint8.kernels.operands import Operands
from llmint8.kernels.reference import Int8Weight

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
NO_DIMS = torch.empty(0, dtype=torch.int32)


def int8_weight(n: int = 6, k: int = 70, outliers: int = 2, **how: Any) -> Int8Weight:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k))
    dims = torch.arange(outliers, dtype=torch.int32)
    return Int8Weight(*reference.quantize_weight(weight), dims, weight[:, dims.long()], torch.randn(n), **how)


@pytest.mark.parametrize(
    "kind",
    [
        Int8Weight,
        kbit_reference.KBitWeight,
        prepared.ReferenceWeight,
        cpu.CpuWeight,
        operators.NativeWeight,
        kbit_linear.PreparedKBit,
    ],
)
def test_a_weight_is_itself_alone_and_stays_as_it_is(kind: Any) -> None:
    """Two of the same tensors are two, and may be keys; nothing is put in the place of a tensor."""
    values = dict.fromkeys((field.name for field in dataclasses.fields(kind)), torch.ones(2))
    one, other = kind(**values), kind(**values)
    assert one != other
    assert len({one, other}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.bias = None
    if issubclass(kind, prepared.PreparedWeight):
        with pytest.raises(TypeError):
            kind(*values.values())


def test_what_runs_a_weight_is_chosen_by_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_triton in (True, False):
        for kinds in (["AVX2"], []):
            monkeypatch.setattr(linear, "has_triton", lambda has=has_triton: has)
            monkeypatch.setattr(native, "kinds", lambda kinds=kinds: kinds)
            assert linear._kernels(CUDA) is (operators.GpuWeight if has_triton else None)
            assert linear._kernels(CPU) is (operators.NativeWeight if kinds else None)
            assert linear._kernels(META) is None
            assert [linear.has_groups(device) for device in (CUDA, CPU, META)] == [has_triton, bool(kinds), False]
    weight = int8_weight()
    parts = {name: part.to(META) for name, part in vars(weight).items() if isinstance(part, Tensor)}
    assert linear.prepare(dataclasses.replace(weight, **parts)).runs_on == "plain PyTorch on meta"
    assert isinstance(linear.prepare(weight), cpu.CpuWeight)


def test_only_large_weights_that_are_not_searched_are_laid_out_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_is_exact", lambda name: name == "packed")
    large, small = (torch.empty(2048, k, dtype=torch.int8) for k in (2048, 2047))
    assert products.packable(large)
    assert not products.packable(small)
    assert not products.packable(large.to(META))
    weight = dataclasses.replace(int8_weight(), values=large)
    kbit = kbit_reference.from_float(torch.randn(2, 64), 4, "nf4", 64, NO_DIMS)
    for kinds in (["AVX2"], []):
        monkeypatch.setattr(native, "kinds", lambda kinds=kinds: kinds)
        assert linear.is_laid_out_anew(weight) == (not kinds)
        assert linear.is_laid_out_anew(dataclasses.replace(weight, threshold=6.0)) is False
        assert linear.is_laid_out_anew(dataclasses.replace(weight, values=small)) is False
        assert linear.is_laid_out_anew(kbit) is False


def test_a_product_is_tried_with_the_largest_sums_before_it_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return (x.long() @ weight.long()).int()

    def refused(x: Tensor, weight: Tensor) -> Tensor:
        raise RuntimeError("built without it")

    wrong = [
        lambda x, weight: exact(x, weight).clamp(max=2**22),
        lambda x, weight: exact(x, weight).clamp(min=-(2**22)),
    ]
    wrong += [lambda x, w, m=m: exact(x, w) + (len(x) > 1 if m else len(x) == 1) for m in (True, False)]
    for function, expected in [(exact, True), (refused, False), *((one, False) for one in wrong)]:
        monkeypatch.setattr(torch, "_int_mm", function)
        assert products._keeps_largest("int_mm") is expected


def test_the_product_of_a_weight_as_it_is_is_that_of_the_machine_but_for_one_column(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "_int_mm", lambda x, weight: "int_mm")
    monkeypatch.setattr(reference, "int8_product", lambda x, weight: "reference")
    for k, n, product, expected in [
        (2, 3, "int_mm", "int_mm"),
        (1, 3, "int_mm", "reference"),  # for which PyTorch's returns garbage
        (2, 0, "int_mm", "reference"),
        (2, 3, "reference", "reference"),
    ]:
        x, weight = torch.ones(4, k, dtype=torch.int8), torch.ones(n, k, dtype=torch.int8)
        found: Any = products.multiply(x, weight, n, product)  # type: ignore[arg-type]
        assert found == expected
        monkeypatch.setattr(products, "unpacked_product", lambda product=product: product)
        assert linear.int8_product(x, weight) == expected  # type: ignore[comparison-overlap]
    assert linear.int8_product(x.to(META), weight) == "reference"  # type: ignore[comparison-overlap]


def test_compilers_know_what_a_packed_weight_gives() -> None:
    packed, x = torch.empty(70, 6, device="meta"), torch.empty(3, 70, dtype=torch.int8, device="meta")
    unpacked, found = torch.ops.llmint8.unpack(packed), torch.ops.llmint8.packed_product(x, packed, 6)
    assert (unpacked.shape, unpacked.dtype) == ((6, 70), torch.int8)
    assert (found.shape, found.dtype) == ((3, 6), torch.float32)


def test_rows_are_aligned_where_they_begin_and_end_at_16_bytes() -> None:
    room = torch.zeros(200, dtype=torch.int8)
    start = -room.data_ptr() % 16
    for offset, k, aligned in [
        (0, 32, True),
        (0, 16, True),
        (8, 32, False),
        (0, 40, False),
        (8, 40, False),
        (0, 0, False),
    ]:
        values = room[start + offset :][: 2 * k].view(2, k)
        operands = Operands.prepare(dataclasses.replace(int8_weight(2, max(1, k), 0), values=values))
        assert operands.values.data_ptr() % 16 == offset or not k
        assert operands.aligned is aligned, (offset, k)


@pytest.mark.parametrize("found", [True, False])
def test_triton_is_there_where_it_can_be_imported(found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if found else None)
    assert operators.has_triton.__wrapped__() is found


def test_on_a_gpu_without_triton_and_on_a_cpu_without_the_library_the_operator_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, x = int8_weight(), torch.randn(3, 70)
    expected = reference.int8_linear(x, weight, "zeropoint")
    operands = Operands.prepare(weight)
    monkeypatch.setattr(native, "kinds", list)
    # A few units in the last place: `absmax / 127`, times 127 again, and the order of sums.
    assert torch.allclose(operators._run(x, operands, True), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(Operands, "device", CUDA)
    monkeypatch.setattr(operators, "has_triton", lambda: False)
    assert torch.allclose(operators._run(x, operands, True), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["absmax", "zeropoint"])
def test_under_a_compiler_the_cpu_searches_by_the_operator(
    activation: reference.Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(9, 70), int8_weight(threshold=2.0)
    monkeypatch.setattr(native, "kinds", list)
    layer, whole = cpu.CpuWeight.prepare(weight), cpu.CpuWeight.prepare(int8_weight())
    expected, blocks = layer.linear(x, activation), whole.linear(x, activation)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(cpu, "_OUTPUT_ELEMENTS", 1)
    monkeypatch.setattr(cpu, "_QUANTIZE_ELEMENTS", 1)
    monkeypatch.setattr(torch, "split", None)  # it makes blocks of its own
    assert torch.equal(whole.linear(x, activation), blocks)
    monkeypatch.undo()
    monkeypatch.setattr(native, "kinds", list)
    answers = iter([True])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: next(answers, False))
    assert torch.allclose(layer.linear(x, activation), expected, rtol=1e-5, atol=1e-5)


def test_autocast_of_another_device_changes_nothing() -> None:
    layer, x = linear.prepare(int8_weight()), torch.randn(3, 70)
    expected = linear.int8_linear(x, layer)
    torch.set_autocast_enabled("cuda", True)
    try:
        found = linear.int8_linear(x, layer)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert torch.equal(found, expected)


def test_a_layer_without_a_bias_runs_where_gradients_are_wanted() -> None:
    layer, x = linear.prepare(dataclasses.replace(int8_weight(), bias=None)), torch.randn(3, 70)
    with torch.enable_grad():
        found = linear.int8_linear(x, layer)
        assert not found.requires_grad
        assert linear.int8_linear(x.requires_grad_(), layer).requires_grad


def test_the_part_of_a_layers_inputs_has_its_outliers() -> None:
    dims, columns = torch.tensor([0, 3, 4, 7, 9], dtype=torch.int32), torch.arange(10.0).view(2, 5)
    for inputs, found, chosen in [
        (range(3, 7), [0, 1], [1, 2]),
        (range(4), [0, 3], [0, 1]),
        (range(7, 10), [0, 2], [3, 4]),
    ]:
        here, part = reference.outliers_among(dims, columns, inputs)
        assert here.tolist() == found
        assert torch.equal(part, columns[:, chosen])


@pytest.mark.parametrize("repeats", [1, 3])
def test_every_row_is_multiplied_by_the_weight_of_its_expert(repeats: int) -> None:
    weights = [dataclasses.replace(int8_weight(), bias=torch.randn(6)) for _ in range(3)]
    x = torch.randn(4, 70)
    experts = torch.randint(-1, 4, (4 * repeats,), generator=torch.Generator().manual_seed(0))
    found = reference.grouped_int8_linear(x, weights, experts, "zeropoint")
    for row, expert in enumerate(experts.tolist()):
        inputs = x[row // repeats][None]
        expected = reference.int8_linear(inputs, weights[expert], "zeropoint")[0] if 0 <= expert < 3 else torch.zeros(6)
        assert torch.allclose(found[row], expected, rtol=1e-5, atol=1e-5)  # the same sums in any order
    assert reference.grouped_int8_linear(x[:0], weights, experts[:0]).shape == (0, 6)
    each = len(experts) // len(x)
    one = reference.grouped_int8_linear(x[:1], weights, experts[:each], "zeropoint")
    assert torch.allclose(one, found[:each], rtol=1e-5, atol=1e-5)


def test_there_are_the_groups_and_rotations_that_the_spec_has() -> None:
    for group in (None, 64, 128, 256):
        checks.check_group(group)
    for rotation in (None, 64):
        checks.check_rotation(rotation)
    for other in (0, 1, 32, 63, 65, 127, 512):
        with pytest.raises(ValueError, match=f"group is {other}, expected one of"):
            checks.check_group(other)
        with pytest.raises(ValueError, match=f"rotation is {other}, expected one of"):
            checks.check_rotation(other)


@pytest.mark.skipif(not native.kinds(), reason="nothing is remembered without the library")
def test_a_weight_that_the_operator_knows_is_found_and_another_of_its_tensors_is_not() -> None:
    operands, x = Operands.prepare(int8_weight(6, 200)), torch.randn(2, 200)
    run = torch.ops.llmint8.int8_linear
    assert checked.layout_of(operands) is None
    for rotation in (None, 64, None, 64):
        other = operands._replace(rotation=rotation)
        found = run(x, *operands[:6], None, rotation, False)
        assert torch.equal(found, native.NativeLinear(other)(x, False))
        assert checked.layout_of(other) is not None
    wide = operands._replace(bias=torch.randn(6).double())  # which is copied, and may be written to
    run(x, *wide[:6], None, None, False)
    assert checked.layout_of(wide) is None


def test_codes_of_a_row_may_be_those_of_rows_of_several_lengths() -> None:
    """Tensors of one layer of k bits with a single block are those of another with fewer inputs, too."""
    codes = torch.randint(0, 16, (5, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    levels, absmax = torch.linspace(-1, 1, 16), torch.rand(5, 1).half()
    tensors = pack(codes, 4), absmax, levels, NO_DIMS, torch.empty(5, 0), None
    for k in (128, 100, 128, 100):
        x = torch.randn(2, k)
        expected = x @ (levels[codes[:, :k].int()] * absmax.float()).t()
        found = torch.ops.llmint8.kbit_linear(x, *tensors, k, None)
        # x and levels in steps of 2^-14 of their largest
        assert torch.allclose(found, expected, atol=2.0**-13 * float(x.abs().max()) * k, rtol=0)
        meta = [part.to(META) if isinstance(part, Tensor) else part for part in tensors]
        with pytest.raises(ValueError, match=rf"x has shape \[2, {k + 1}\], expected \[any, {k}\]"):
            torch.ops.llmint8.kbit_linear(torch.empty(2, k + 1, device="meta"), *meta, k, None)
