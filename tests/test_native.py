"""The compiled layer of the CPU: its integers to the bit, its threads, and what happens where it is not there.

That it computes the layer is in `test_operators.py`, for every instruction set the machine has.
"""

import ctypes
import subprocess
import sys
import weakref
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llmint8 import runtime
from llmint8.kernels import reference
from llmint8.kernels.cpu import checked, native, weights
from llmint8.kernels.kbit import cpu as kbit_cpu
from llmint8.kernels.kbit.operands import KBitOperands
from llmint8.kernels.kbit.reference import from_float
from llmint8.kernels.linear import prepare
from llmint8.kernels.operands import Operands
from llmint8.kernels.reference import Activation, Group, Int8Weight, Rotation, row_sums

needs_it = pytest.mark.skipif(not native.kinds(), reason=native.why_not() if not native.kinds() else "")
activations = pytest.mark.parametrize("activation", ["absmax", "zeropoint"])
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def hard_rows(k: int, dtype: torch.dtype) -> Tensor:
    """Rows that are hard to divide and to round: ties, quotients beside them, and scales at the ends of the range."""
    random = torch.Generator().manual_seed(k)
    rows = [torch.zeros(k), torch.full((k,), 3.0), torch.full((k,), -3.0)]
    for exponent in range(-149, 110, 7):  # from 2**121 on the reference overflows itself
        magnitude = torch.tensor(2.0, dtype=torch.float64).pow(exponent)
        steps = torch.randint(-127, 128, (k,), generator=random) + 0.5 * torch.randint(2, (k,), generator=random)
        rows.append((steps * magnitude).float())  # ties, where the scale is a power of two
        rows[-1][0] = (127 * magnitude).float()
        rows.append((torch.randn(k, generator=random).double() * magnitude).float())
    for scale in (1.0, 3.0, 0.7, 2.0 - 2.0**-23, 16777215.0, 1.1):  # of a significand of ones, too
        ties = (torch.randint(-127, 127, (k,), generator=random) + 0.5) * scale
        rows += [ties, ties.nextafter(torch.tensor(1e30)), ties.nextafter(torch.tensor(-1e30))]
        for row in rows[-3:]:
            row[0], row[1] = 127 * scale, -127 * scale
    found = torch.stack(rows).to(dtype)
    return found[found.isfinite().all(1)]


def quotients_beside_ties() -> Tensor:
    """Rows [0, 254 s, x] whose x / s lies as near as it can to the middle between a tie and the next float32.

    A division rounds them to the tie or to its neighbour, so the integer shows whether it was rounded correctly.
    Numerators and divisors have 24 bits. With a middle of A / 2**18, A odd, the remainder is smallest where
    A s = +-1 modulo 2**25.
    """
    rows = []
    for tie in range(129, 255, 2):
        for middle in ((tie << 17) + 1, (tie << 17) - 1):
            for sign in (1, -1):
                s = sign * pow(middle, -1, 1 << 25) % (1 << 25)
                x = (middle * s - sign) >> 25
                if 1 << 23 <= s < 1 << 24 and x < 1 << 24:
                    # x / s is now nearly middle / 2**25, which is the quotient of 64 to 128 divided by 2**7.
                    rows.append([0.0, 254.0 * s / 2**20, 2.0**7 * x / 2**20])
    return torch.tensor(rows, dtype=torch.float64).float()


@pytest.mark.parametrize("rotation", [None, 64])
@activations
@dtypes
def test_the_integers_are_those_of_the_reference(
    dtype: torch.dtype, activation: Activation, rotation: Rotation | None, kind: native.Kind
) -> None:
    """With 127 on its diagonal and 0 elsewhere a weight shows them: each output is one, times what is known."""
    k = 200
    dims, columns = torch.tensor([5, 77], dtype=torch.int32), torch.zeros(k, 2)
    values = 127 * torch.eye(k, dtype=torch.int8)
    weight = Int8Weight(values, torch.full((k,), 127.0), dims, columns, rotation=rotation)
    layer = native.NativeLinear(Operands.prepare(weight))
    x = hard_rows(k, dtype)
    rows = reference.quantize_rows(x, dims, activation, rotation=rotation)
    shifted = rows.values.float() if rows.zero_point is None else rows.values.float() - rows.zero_point
    expected = 127 * shifted * rows.scale
    # In float32, so that nothing of them is rounded away.
    found = layer.run(x.float(), activation == "zeropoint", kind, 2)
    assert len(x) > native._TILE_ROWS
    assert torch.equal(found, expected)
    rounded = layer.run(x, activation == "zeropoint", kind, 1)
    normal = expected.abs() >= 2.0**-126  # the instruction that rounds to bfloat16 takes what is smaller for 0
    assert torch.equal(torch.where(normal, rounded, 0), torch.where(normal, expected.to(dtype), 0))
    assert (rounded[~normal].float().abs() < 2.0**-125).all()
    for m in (0, 7, 40):
        assert torch.equal(layer.run(x[m : m + 3].float(), activation == "zeropoint", kind, 1), expected[m : m + 3])


def test_quotients_are_rounded_as_those_of_the_reference(kind: native.Kind) -> None:
    x = quotients_beside_ties()
    assert len(x) == 64
    dims = torch.empty(0, dtype=torch.int32)
    weight = Int8Weight(127 * torch.eye(3, dtype=torch.int8), torch.full((3,), 127.0), dims, torch.empty(3, 0))
    rows = reference.quantize_rows(x, dims, "zeropoint")
    assert rows.zero_point is not None
    expected = 127 * (rows.values.float() - rows.zero_point) * rows.scale
    found = native.NativeLinear(Operands.prepare(weight)).run(x, True, kind, 1)
    assert torch.equal(found, expected)


def test_a_row_that_is_not_finite_is_nan_and_the_others_are_what_they_were(kind: native.Kind) -> None:
    weight = Int8Weight(
        torch.randint(-127, 128, (70, 90), dtype=torch.int8), torch.rand(70), torch.tensor([3]), torch.randn(70, 1)
    )
    layer = native.NativeLinear(Operands.prepare(weight))
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(80, 90)
        expected = layer.run(x, True, kind, 1)
        x[4, 17] = value
        found = layer.run(x, True, kind, 1)
        assert found[4].isnan().all()
        assert torch.equal(found[5:], expected[5:])


@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize("m", [1, 6, 23, 24, 27, 64, 65, 130])
def test_the_result_does_not_depend_on_the_threads(m: int, group: Group | None, kind: native.Kind) -> None:
    weight = Int8Weight(
        torch.randint(-127, 128, (150, 301), dtype=torch.int8),
        torch.rand(150),
        torch.tensor([3, 150]),
        torch.randn(150, 2).half(),
        torch.randn(150),
        group=group,
        rotation=64 if m % 2 else None,
    )
    layer, x = native.NativeLinear(Operands.prepare(weight)), torch.randn(m, 301, dtype=torch.float16)
    one = layer.run(x, True, kind, 1)
    for threads in (2, 3, 7):
        assert torch.equal(layer.run(x, True, kind, threads), one)
    for row in (0, m // 2, m - 1):
        assert torch.equal(layer.run(x, True, kind, 1)[row], one[row])


@pytest.mark.parametrize("wrong", [None, 128])
def test_instructions_that_get_a_sum_wrong_are_found_out(
    wrong: Group | None, kind: native.Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = native.NativeLinear.run

    def broken(self: native.NativeLinear, x: Tensor, *how: Any) -> Tensor:
        out = run(self, x, *how)
        if self.operands.group == wrong and len(x) > 5:
            out[-1, -1] += 1
        return out

    assert native._is_exact(kind)
    monkeypatch.setattr(native.NativeLinear, "run", broken)
    assert not native._is_exact(kind)


def test_every_set_of_instructions_that_is_there_is_used() -> None:
    """Else all that is tried with them here would be skipped, and layers be slow."""
    library = native.compiled()
    if isinstance(library, str) or not library.llmint8_supported() & 1:
        pytest.skip(native.why_not())
    there = library.llmint8_supported()
    numbers = {"AVX2": 1, "AVX-VNNI": 2, "AVX512-VNNI": 3, "AMX": 4, "Arm dotprod": 5}
    found = native.kinds.__wrapped__()  # asked anew
    assert {numbers[kind] for kind in found} == {number for number in numbers.values() if there >> number & 1}
    assert found == sorted(found, key=[*native.KINDS].index)


def test_the_instructions_that_are_named_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    library = mock.MagicMock()
    for name in ("quantize_weight", "rotate", "row_sums"):
        getattr(library, f"llmint8_{name}").side_effect = lambda *arguments: taken.append(arguments[-2])
    monkeypatch.setattr(weights, "_functions", lambda: library)
    monkeypatch.setattr(native, "kinds", lambda: ["AMX", "AVX2"])
    x = torch.ones(2, 64)
    for kind, number in (("AVX2", 1), ("Arm dotprod", 5), (None, 4)):
        weights.quantize_weight(x, None, kind)  # type: ignore[arg-type]
        weights.rotate(x, kind)  # type: ignore[arg-type]
        weights.row_sums(x.to(torch.int8), None, kind)  # type: ignore[arg-type]
        assert taken == [number] * 3
        taken.clear()


@pytest.mark.parametrize(("kinds", "few"), [(["AMX", "AVX512-VNNI", "AVX2"], "AVX512-VNNI"), (["AVX2"], "AVX2")])
def test_tiles_are_for_more_than_a_few_rows(kinds: list[Any], few: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    layer = native.NativeLinear(
        Operands.prepare(
            Int8Weight(torch.ones(3, 64).to(torch.int8), torch.ones(3), torch.empty(0).int(), torch.empty(3, 0))
        )
    )
    monkeypatch.setattr(native, "kinds", lambda: kinds)
    monkeypatch.setattr(layer, "run", lambda x, zeropoint, kind, threads: ran.append(kind))
    for m in (1, 3, 4, 70):
        layer(torch.ones(m, 64), True)
    assert ran == [few, few, kinds[0], kinds[0]]


@needs_it
def test_one_runtime_of_openmp_is_loaded() -> None:
    """Two would keep each other's threads from the cores."""
    code = """
import torch
from llmint8.kernels.cpu import checked, native
assert native.kinds()
torch.ones(1 << 20).sum()
print(*{line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]})
"""
    if not Path("/proc/self/maps").exists():
        pytest.skip("lists what is loaded on Linux")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 1, done.stdout


@needs_it
def test_a_layer_says_which_instructions_it_uses() -> None:
    layer = runtime.Int8Linear.from_linear(torch.nn.Linear(64, 24))
    assert layer.prepared is not None
    assert layer.prepared.runs_on == f"{native.kinds()[0]} on the CPU"


@pytest.mark.parametrize("missing", ["the library", "another version", "not a library"])
def test_without_the_library_layers_run_and_say_why(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    library = tmp_path / ("_layer" + native.importlib.machinery.EXTENSION_SUFFIXES[0])
    if missing == "not a library":
        library.write_bytes(b"no")
    if missing == "another version":
        if not native.kinds():
            pytest.skip(native.why_not())
        library.write_bytes(Path(native.compiled()._name).read_bytes())  # type: ignore[union-attr]
        monkeypatch.setattr(native, "_VERSION", -1)
    expected = {
        "the library": "was not built",
        "another version": "compiled from another version",
        "not a library": "cannot be loaded",
    }
    native.compiled.cache_clear()
    native.kinds.cache_clear()
    try:
        assert native.kinds() == []
        assert expected[missing] in native.why_not()
        weight = Int8Weight(
            torch.randint(-127, 128, (5, 9), dtype=torch.int8), torch.rand(5), torch.tensor([3]), torch.randn(5, 1)
        )
        prepared = prepare(weight)
        assert expected[missing] in prepared.runs_on
        x = torch.randn(2, 9)
        torch.testing.assert_close(prepared.linear(x, "absmax"), reference.int8_linear(x, weight, "absmax"))
    finally:
        native.compiled.cache_clear()
        native.kinds.cache_clear()


@needs_it
def test_an_instruction_set_that_saturates_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturated(self: Any, x: Tensor, *how: Any) -> Tensor:
        return (x @ self.operands.values.float().t()).clamp(max=2.0**22)

    monkeypatch.setattr(native.NativeLinear, "run", saturated)
    native.kinds.cache_clear()
    try:
        assert native.kinds() == []
    finally:
        native.kinds.cache_clear()


@needs_it
def test_where_tensors_have_no_values_the_instructions_are_tried_on_some_that_have() -> None:
    before = native.kinds()
    native.kinds.cache_clear()
    with FakeTensorMode():
        assert native.kinds() == before


@needs_it
def test_too_little_memory_is_an_error() -> None:
    operands = Operands.prepare(
        Int8Weight(torch.ones(3, 4, dtype=torch.int8), torch.ones(3), torch.empty(0).int(), torch.empty(3, 0))
    )
    layer = native.NativeLinear(operands)
    layer.layout.of(layer.operands).padded = 1 << 48  # the columns of each thread
    with pytest.raises(MemoryError, match="2 rows of 4 values"):
        layer(torch.ones(2, 4), False)


def test_a_thread_is_taken_for_as_much_as_it_is_worth_and_no_more_than_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In all functions of the library, whose last argument they are; of 2 products for each, 1 is too few for it."""
    taken: list[int] = []
    library = mock.MagicMock()
    for name in ("linear", "quantize_weight", "rotate", "row_sums", "kbit_linear", "kbit_dequantize"):
        getattr(library, f"llmint8_{name}").side_effect = lambda *arguments: taken.append(arguments[-1]) or 0
    for module, name in ((native, "compiled"), (weights, "_functions"), (kbit_cpu, "_library")):
        monkeypatch.setattr(module, name, lambda: library)
    monkeypatch.setattr(native, "kinds", lambda: [*native.KINDS])
    monkeypatch.setattr(kbit_cpu, "kinds", lambda: [*kbit_cpu.KINDS])
    for module, name in (
        (native, "_PRODUCTS_PER_THREAD"),
        (kbit_cpu, "_PER_THREAD"),
        (weights, "_ELEMENTS_PER_THREAD"),
    ):
        monkeypatch.setattr(module, name, 2 * 64 * 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    dims = torch.empty(0, dtype=torch.int32)
    values, absmax = torch.ones(64, 64, dtype=torch.int8), torch.ones(64)
    layer = native.NativeLinear(Operands.prepare(Int8Weight(values, absmax, dims, torch.empty(64, 0))))
    kbit = kbit_cpu.CpuKBit(KBitOperands.prepare(from_float(torch.ones(64, 64), 4, "nf4", 64, dims)))
    for rows, threads in ((1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 3), (20, 3)):
        x = torch.ones(rows, 64)
        layer(x, True)
        kbit(x)
        many = torch.ones(rows, 4096)  # elements, and not products
        weights.quantize_weight(many)
        weights.rotate(many)
        weights.row_sums(many.to(torch.int8))
        kbit.dequantize(0, torch.empty(64 * rows, 64), "AVX2", 3)
        assert taken == [threads] * 6, rows
        taken.clear()


@needs_it
def test_weights_that_move_are_found() -> None:
    """Pickled for another process, they go to shared memory; and code may put other data under a parameter."""
    layer, x = runtime.Int8Linear.from_linear(torch.nn.Linear(900, 700)), torch.randn(3, 900)
    expected = layer(x)
    ForkingPickler.dumps(layer)
    assert layer._parameters["weight"].is_shared()  # type: ignore[union-attr]
    assert torch.equal(layer(x), expected)
    weight: Any = layer._parameters["weight"]
    weight.data = weight.data.clone()
    assert torch.equal(layer(x), expected)


@needs_it
def test_the_operator_remembers_weights_and_keeps_none_of_their_tensors() -> None:
    layer = runtime.Int8Linear.from_linear(torch.nn.Linear(130, 40), torch.tensor([3, 9]))
    operands, x = layer.prepared.operands, torch.randn(2, 130)  # type: ignore[attr-defined]
    others = [None if part is None else part.clone() for part in operands[:6]]

    def run(tensors: Any, x: Tensor = x) -> Tensor:
        return torch.ops.llmint8.int8_linear(x, *tensors, operands.group, None, False)

    expected = layer(x)
    doubled = [others[0], others[1] * 2, *others[2:5], None]
    other = Operands(*doubled, *operands[6:])  # type: ignore[arg-type]
    for _ in range(2):
        assert torch.equal(run(operands[:6]), expected)
        assert torch.equal(run(others), expected)
        assert torch.equal(run(doubled), native.NativeLinear(other)(x, False))
    with pytest.raises(ValueError, match=r"x has shape \[2, 131\], expected \[any, 130\]"):
        run(operands[:6], torch.randn(2, 131))
    with pytest.raises(ValueError, match=r"scale has shape \[39\], expected \[40\]"):
        run([operands[0], operands[1][1:], *operands[2:6]])
    others[0].data = others[0].data.neg()
    others[0].data = operands[0].data.clone()  # where it was before may hold anything by now
    assert torch.equal(run(others), expected)
    kept, known = weakref.ref(others[1]), len(checked._KNOWN)
    del others, doubled, other
    assert kept() is None
    assert len(checked._KNOWN) < known


@needs_it
@pytest.mark.parametrize("dim", [-1, 64, 2**30])
def test_outlier_dims_beyond_the_layer_are_an_error(dim: int) -> None:
    operands = Operands.prepare(
        Int8Weight(torch.ones(3, 64, dtype=torch.int8), torch.ones(3), torch.tensor([3, 9]), torch.ones(3, 2))
    )
    operands.outlier_dims[1] = dim
    with pytest.raises(ValueError, match=rf"outlier_dims is \[3, {dim}\], expected numbers from 0 to 63"):
        torch.ops.llmint8.int8_linear(torch.ones(2, 64), *operands[:6], None, None, True)


@needs_it
def test_an_input_that_stands_for_its_negative_or_for_zeros_is_taken_for_it() -> None:
    layer, x = runtime.Int8Linear.from_linear(torch.nn.Linear(64, 24)), torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(layer(torch._neg_view(x)), layer(-x))
        assert torch.equal(layer(torch._efficientzerotensor((3, 64))), layer(torch.zeros(3, 64)))


@needs_it
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    expected = native.kinds()
    torch.set_default_dtype(dtype)
    try:
        assert native.kinds.__wrapped__() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_longest_rows_there_may_be_are_summed_exactly(kind: native.Kind) -> None:
    k = 133_144  # 127 * 127 * k < 2**31
    values = torch.full((3, k), 127, dtype=torch.int8)
    values[1] = -127
    values[2, ::2] = -127
    none = torch.empty(0, dtype=torch.int32), torch.empty(3, 0)
    operands = Operands(values, torch.ones(3), row_sums(values, None), *none, None, None, None, None)
    x = torch.full((70, k), 127.0)
    for rows in (x[:1], x):
        found = native.NativeLinear(operands).run(rows, False, kind, 1)
        assert torch.equal(found, (rows.double() @ values.double().t()).float())


def test_the_structure_has_the_size_that_c_gives_it() -> None:
    assert ctypes.sizeof(native._Weight) == 7 * 8 + 6 * ctypes.sizeof(ctypes.c_void_p) + 2 * 4


@needs_it
def test_the_compiled_layer_is_one_operator_in_a_graph() -> None:
    torch._dynamo.reset()
    layer = runtime.Int8Linear.from_linear(torch.nn.Linear(64, 24).requires_grad_(False), torch.tensor([3, 9]))
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    x = torch.randn(3, 64)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend=backend)(x), layer(x))
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert [name for name in called if "llmint8" in name] == ["llmint8.int8_linear.default"]
    exported = torch.export.export(layer, (x,))
    assert torch.equal(exported.module()(x), layer(x))
