"""Weights of 3 to 8 bits from the converter: how they are rounded, which columns stay, and what is written."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmint8.converter.calibration import gptq
from llmint8.converter.coding import KBitGrid, round_to_nearest
from llmint8.converter.outliers.proxy import Linear, deviations, layers_before, proxy_dims
from llmint8.formats import Scheme
from llmint8.formats.int8.schemes import KBit
from llmint8.kernels.kbit import reference

SCHEMES = [KBit(4, "nf4", 64), KBit(3, "float", 32), KBit(5, "int", None), KBit(4, "quantile", 32)]


def correlated(rows: int, k: int) -> Tensor:
    return torch.randn(rows, k) @ torch.randn(k, k) / k**0.5


def by_elimination(x: Tensor, weight: Tensor, grid: KBitGrid) -> tuple[Tensor, float]:
    """GPTQ as the paper derives it: after each column the inverse of what is left of H, by elimination, in float64.

    Returns the codes, and how near a value came to the middle between two levels, in those of the absmax.
    """
    levels = grid.levels.double()
    middles = ((levels[1:] + levels[:-1]) / 2)[: int((levels < 1).sum())]  # the last one may stand there more than once
    hessian = (x.t() @ x).double()
    order = hessian.diagonal().argsort(descending=True).tolist()
    hessian.diagonal().add_(0.1 * float(hessian.diagonal().mean()))
    inverse, left = torch.linalg.inv(hessian), weight.double()
    codes, nearest = torch.empty(weight.shape, dtype=torch.uint8), 1.0
    for dim in order:
        scale = grid.absmax[:, 0 if grid.block is None else dim // grid.block].double()
        values = torch.where(scale > 0, left[:, dim] / scale, 0)
        nearest = min(nearest, float((values[:, None] - middles).abs()[scale > 0].min()))
        codes[:, dim] = (values[:, None] > middles).sum(1)
        error = (left[:, dim] - levels[codes[:, dim].int()] * scale) / inverse[dim, dim]
        left -= error[:, None] * inverse[dim]
        inverse = inverse - inverse[:, dim, None] * inverse[dim] / inverse[dim, dim]
        inverse[dim, dim] = 1.0  # it is not asked for again
    return codes, nearest


@pytest.mark.parametrize("kbit", SCHEMES, ids=lambda kbit: kbit.name)
def test_gptq_on_any_levels_is_what_elimination_gives(kbit: KBit) -> None:
    torch.manual_seed(5)
    x, weight = correlated(150, 72), torch.randn(5, 72)
    weight[2] = 0
    codes, grid = round_to_nearest(weight, Scheme(kbit=kbit))
    assert isinstance(grid, KBitGrid)
    expected, nearest = by_elimination(x, weight, grid)
    assert nearest > 1e-5  # else sums in another order might decide
    rounded = gptq.Correlations(x).round(weight, grid)
    assert torch.equal(rounded, expected)
    errors = [float(((grid.dequantize(one) - weight) @ x.t()).norm()) for one in (codes, rounded)]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("kbit", SCHEMES, ids=lambda kbit: kbit.name)
def test_gptq_on_levels_without_correlations_is_rounding_to_nearest(kbit: KBit) -> None:
    weight = torch.randn(9, 200)
    codes, grid = round_to_nearest(weight, Scheme(kbit=kbit))
    assert torch.equal(codes, reference.quantize_weight(weight, kbit.bits, kbit.data_type, kbit.block)[0])
    assert torch.equal(gptq.Correlations(torch.zeros(5, 200)).round(weight, grid), codes)


def test_gptq_on_levels_is_done_in_blocks_of_wide_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = correlated(100, 150), torch.randn(9, 150)
    _, grid = round_to_nearest(weight, Scheme(kbit=KBit(4, "int", 32)))
    monkeypatch.setattr(gptq, "MAX_DIMENSIONS", 64)
    parts = []
    for first in (0, 64, 128):
        part = slice(first, min(150, first + 64))
        own = grid.with_absmax(grid.absmax[:, first // 32 : -(-part.stop // 32)])
        parts.append(gptq.Correlations(x[:, part]).round(weight[:, part], own))
    assert torch.equal(gptq.Correlations(x).round(weight, grid), torch.cat(parts, 1))


# Proxy quantization.

_BLOCK = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
_BLOCK |= {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
LLAMA = [Linear(f"layers.{block}.{name}", *shape) for block in range(2) for name, shape in _BLOCK.items()]
_BERT = {"query": (64, 64), "key": (64, 64), "value": (64, 64), "attention.dense": (64, 64), "up": (96, 64)}
BERT = [Linear(f"{block}.{name}", *s) for block in range(2) for name, s in {**_BERT, "down": (64, 96)}.items()]
OPT = [Linear(f"{block}.{name}_proj", 64, 64) for block in range(2) for name in ("k", "v", "q", "out")]
GPT2 = [Linear("c_attn", 192, 64), Linear("attn.c_proj", 64, 64), Linear("c_fc", 96, 64), Linear("mlp.c_proj", 64, 96)]


@pytest.mark.parametrize(
    ("linears", "expected"),
    [
        (
            LLAMA,
            {"0.o": "0.v", "0.gate": "0.o", "0.up": "0.o", "0.down": "0.up", "1.q": "0.down", "1.k": "0.down"}
            | {"1.v": "0.down", "1.o": "1.v", "1.gate": "1.o", "1.up": "1.o", "1.down": "1.up"},
        ),
        (
            BERT,
            {"0.attention.dense": "0.value", "0.up": "0.attention.dense", "0.down": "0.up", "1.query": "0.down"}
            | {"1.key": "0.down", "1.value": "0.down", "1.attention.dense": "1.value", "1.up": "1.attention.dense"}
            | {"1.down": "1.up"},
        ),
        (OPT, {"0.out": "0.v", "1.k": "0.out", "1.v": "0.out", "1.q": "0.out", "1.out": "1.v"}),
        (GPT2, {"c_fc": "attn.c", "mlp.c": "c_fc"}),
    ],
    ids=["llama", "bert", "opt", "gpt2"],
)
def test_the_layer_before_is_the_one_that_makes_the_inputs(linears: Any, expected: dict[str, str]) -> None:
    def short(name: str) -> str:
        return name.removeprefix("layers.").removesuffix("_proj")

    found = {short(name): short(before) for name, before in layers_before(linears, 4).items()}
    assert found == expected


def test_proxy_columns_are_those_of_the_largest_deviations() -> None:
    weight = torch.randn(96, 40) * torch.rand(96, 1)
    weight[[7, 90]] *= 9
    spread = deviations(torch.split(weight.half(), 10))
    expected = np.sort(np.argsort(-weight.half().numpy().astype(np.float64).std(1), kind="stable")[:5])
    assert proxy_dims(spread, 96, 0.05).tolist() == expected.tolist()
    assert {7, 90} <= set(expected.tolist())


def test_proxy_columns_of_values_count_for_every_head_that_they_serve() -> None:
    spread = torch.rand(16)  # 2 heads of 8
    spread[[3, 12]] = torch.tensor([2.0, 3.0])
    assert proxy_dims(spread, 48, 0.125, 2).tolist() == [3, 11, 19, 28, 36, 44]
