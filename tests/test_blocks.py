"""What is done a block at a time: nothing large is made on the way, and blocks are joined to what is made in one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_leaves

from llmint8.kernels import gradient, reference
from llmint8.kernels.cpu import linear as cpu
from llmint8.kernels.cpu import native, weights
from llmint8.kernels.kbit import cpu as kbit_cpu
from llmint8.kernels.kbit import gradient as kbit_gradient
from llmint8.kernels.kbit import linear as kbit_linear
from llmint8.kernels.kbit import operands as kbit_operands
from llmint8.kernels.kbit import reference as kbit_reference
from llmint8.kernels.reference import Group, Int8Weight

N, K = 70, 640


class Largest(TorchDispatchMode):
    """Looks at what operators return: the bytes of the largest memory that is new."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {one.untyped_storage()._cdata for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)}
        for one in tree_iter(found):
            if isinstance(one, Tensor) and one.untyped_storage()._cdata not in given:
                self.nbytes = max(self.nbytes, one.untyped_storage().nbytes())
        return found


class Case(NamedTuple):
    """A function with its arguments, and the constant that says how many elements a block of it has."""

    module: Any
    constant: str
    run: Callable[[], Any]
    elements: int = 4 * K  # of four rows
    most: int = N * K  # bytes that what is made may take, as many as the weight in int8


def int8_weight(group: Group | None = None) -> Int8Weight:
    values, absmax = reference.quantize_weight(torch.randn(N, K))
    return Int8Weight(values, absmax, torch.tensor([3, 630]), torch.randn(N, 2), torch.randn(N), group=group)


def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    weight, turned = torch.randn(N, K), torch.randn(K, N).t()
    x, of_out = torch.randn(40, K), torch.randn(4, N)
    stored, grouped = int8_weight(), cpu.CpuWeight.prepare(int8_weight(group=64))
    dims = stored.outlier_dims
    rows = reference.quantize_rows(x[:2], dims).values
    kbit = kbit_reference.from_float(weight, 4, "nf4", 64, dims, torch.randn(N))
    operands = kbit_operands.KBitOperands.prepare(kbit)
    found = {
        "quantize": Case(reference, "_BLOCK_ELEMENTS", lambda: reference.quantize_weight(weight)),
        "rotate and quantize": Case(reference, "_BLOCK_ELEMENTS", lambda: reference.quantize_weight(weight, 64)),
        "integers": Case(reference, "_PRODUCT_ELEMENTS", lambda: reference.int8_product(rows, stored.values), 4096),
        "gradient": Case(gradient, "_BLOCK_ELEMENTS", lambda: gradient.linear_gradient(of_out, stored), 1),
        "inputs": Case(cpu, "_QUANTIZE_ELEMENTS", lambda: cpu.quantize_in_blocks(x, dims, "zeropoint"), most=40 * K),
        "inputs in groups": Case(cpu, "_OUTPUT_ELEMENTS", lambda: grouped._product(x[:2])),
        "quantize to k bits": Case(kbit_reference, "_STEP_ELEMENTS", lambda: kbit_quantized(weight, kbit.levels)),
        "gradient of k bits": Case(
            kbit_gradient, "_BLOCK_ELEMENTS", lambda: kbit_gradient.kbit_linear_gradient(of_out, kbit)
        ),
        "k bits": Case(kbit_linear, "_STEP_ELEMENTS", lambda: kbit_linear.plain_linear(x[:2], operands)),
        "columns of k bits": Case(
            kbit_operands, "_STEP_ELEMENTS", lambda: kbit_operands.coded_columns(kbit), most=4 * K
        ),
    }
    if native.kinds():
        found["quantize by the library"] = Case(weights, "_BLOCK_ELEMENTS", lambda: weights.quantize_weight(turned))
    if kbit_cpu.kinds():
        layer, how = kbit_cpu.CpuKBit(operands), (torch.float32, kbit_cpu.kinds()[0], 1)
        found["k bits by the library"] = Case(kbit_cpu, "_STEP_ELEMENTS", lambda: layer.run_dequantized(x[:2], *how))
    return found


def kbit_quantized(weight: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    return kbit_reference.quantize_to(weight, levels, 64)


BY_THE_LIBRARY = "quantize by the library", "k bits by the library"
NAMES = [name for name in cases() if name not in BY_THE_LIBRARY] + [*BY_THE_LIBRARY]


@pytest.mark.parametrize("name", NAMES)
def test_little_is_made_at_a_time_and_blocks_are_joined_without_a_gap(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases().get(name)
    if case is None:
        pytest.skip("the compiled layer is not there")
    with Largest() as largest:
        whole = case.run()
    assert largest.nbytes > case.most  # or the bound says nothing
    monkeypatch.setattr(case.module, case.constant, case.elements)
    with Largest() as largest:
        blocks = case.run()
    assert largest.nbytes <= case.most
    for one, other in zip(tree_leaves(blocks), tree_leaves(whole), strict=True):
        if isinstance(one, Tensor) and one.is_floating_point():
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-4)  # the same sums in any order
        else:
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
