"""The experts of a mixture give what each of them gives as a layer: in the interpreter or on a GPU, and on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llmint8.kernels import reference
from llmint8.kernels.experts import prepare_experts
from llmint8.kernels.gpu.tiles import MatmulTile

gpu = pytest.importorskip("llmint8.kernels.gpu.experts")

pytestmark = pytest.mark.usefixtures("poisoned_memory")

TILE = MatmulTile(16, 32, 64, 8, 4, 2)
# Rows of experts in turn, some without any, one with all, and some of experts that are elsewhere.
ROUTES = {
    "some": ([3, 0, 3, 1, 3, 0], 4),
    "one has all": ([2] * 40, 4),
    "a single expert": ([0] * 5, 1),
    "of others": ([4, 0, -1, 3], 4),
    "no rows": ([], 3),
}


def make_experts(
    count: int, n: int, k: int, outliers: int, dtype: torch.dtype = torch.float16, **how: Any
) -> list[reference.Int8Weight]:
    """Experts of which each has its own outlier dims, the first none."""
    random = torch.Generator().manual_seed(n)
    experts = []
    for expert in range(count):
        weight = torch.randn(n, k, generator=random).to(dtype)
        dims = torch.randperm(k, generator=random)[: outliers * expert].sort().values
        bias = torch.randn(n, generator=random).to(dtype)
        quantized = reference.quantize_weight(weight, how.get("rotation"))
        experts.append(reference.Int8Weight(*quantized, dims.int(), weight[:, dims], bias, **how))
    return experts


def tokens(count: int, k: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(count, k, generator=torch.Generator().manual_seed(count)) * 3 + 0.5).to(dtype)


def moved(experts: list[reference.Int8Weight], device: torch.device) -> list[reference.Int8Weight]:
    fields = ("values", "absmax", "outlier_dims", "outlier_weight", "bias")
    return [
        reference.Int8Weight(*(getattr(e, field).to(device) for field in fields), group=e.group, rotation=e.rotation)
        for e in experts
    ]


def assert_as_the_reference(
    experts: list[reference.Int8Weight], x: Tensor, of_row: Tensor, device: torch.device, tile: Any = TILE
) -> None:
    run = gpu.GpuExperts(moved(experts, device), tile)
    for activation in ("absmax", "zeropoint"):
        expected = reference.grouped_int8_linear(x, experts, of_row, activation)
        found = run(x.to(device), of_row.to(device), activation == "zeropoint").cpu()
        close(found, expected)
        close(prepare_experts(experts).linear(x, of_row, activation), expected)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    eps = torch.finfo(expected.dtype).eps
    limit = 4 * max(eps, 2**-20) * float(expected.float().abs().max()) if expected.numel() else 0
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)


# Rows of experts that are elsewhere are not quantized, and what a block has of them is not stored.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("outliers", [0, 6])
def test_rows_go_to_their_experts(route: str, outliers: int, device: torch.device) -> None:
    of_row, count = ROUTES[route]
    experts = make_experts(count, 40, 100, outliers)
    of = torch.tensor(of_row, dtype=torch.long)
    assert_as_the_reference(experts, tokens(len(of), 100, torch.float16), of, device)


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("rotation", [None, 64])
@pytest.mark.parametrize(("dtype", "k"), [(torch.float16, 192), (torch.bfloat16, 130), (torch.float32, 200)])
def test_every_kind_of_layer(
    dtype: torch.dtype, k: int, rotation: int | None, group: int | None, device: torch.device
) -> None:
    """With two rows of each token, and with the tile that is chosen in one case."""
    experts = make_experts(3, 33, k, 5, dtype, group=group, rotation=rotation)
    of_row = torch.tensor([2, 0, 1, 2, 2, 1, 0, 2, 1, 2])
    assert_as_the_reference(experts, tokens(5, k, dtype), of_row, device, TILE if k != 192 else None)


def test_experts_that_differ_are_refused() -> None:
    wrong = make_experts(2, 8, 64, 0), make_experts(1, 9, 64, 0)
    with pytest.raises(ValueError, match="expert 2 is"):
        prepare_experts([*wrong[0], *wrong[1]])
    with pytest.raises(ValueError, match="weights is empty"):
        prepare_experts([])
    with pytest.raises(ValueError, match="expert_of_row is"):
        prepare_experts(wrong[0]).linear(tokens(2, 64, torch.float16), torch.tensor([0, 1, 0]))
