"""Weights of 3 to 8 bits from the converter: how they are rounded, which columns stay, and what is written."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from llmint8 import converter
from llmint8.converter.calibration import gptq
from llmint8.converter.coding import (
    KBitGrid,
    coded_in,
    coding_in_words,
    levels_of_rows,
    method_in_words,
    round_to_nearest,
)
from llmint8.converter.conversion.comparison import compare_with_source
from llmint8.converter.hub.resolve import resolve
from llmint8.converter.outliers.choosing import spend
from llmint8.converter.outliers.measuring import column_norms, error_curve
from llmint8.converter.outliers.proxy import Linear, deviations, layers_before, proxy_count, proxy_dims
from llmint8.converter.planning.options import Options
from llmint8.converter.planning.plan import make_plan
from llmint8.formats import NATIVE, LLMInt8Error, Quantization, Scheme, check_values, open_checkpoint, open_source
from llmint8.formats.int8.schemes import KBit
from llmint8.kernels.kbit import levels as kbit_levels
from llmint8.kernels.kbit import reference
from llmint8.kernels.kbit.packing import pack

pytestmark = pytest.mark.usefixtures("quiet_transformers")

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
def test_gptq_on_any_levels_is_what_elimination_gives(kbit: KBit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "_BLOCK", 32)  # the last of three is not full
    torch.manual_seed(5)
    x, weight = correlated(150, 72), torch.randn(5, 72)
    weight[2], weight[3, 32:64] = 0, 0  # of a block without a scale everything stays 0
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
SHAPES = [Linear("a", 64, 48), Linear("narrow", 32, 64), Linear("b", 48, 64), Linear("c", 8, 32), Linear("d", 8, 7)]
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
        (SHAPES, {"narrow": "a", "b": "a", "c": "narrow"}),
    ],
    ids=["llama", "bert", "opt", "gpt2", "shapes"],
)
def test_the_layer_before_is_the_one_that_makes_the_inputs(linears: Any, expected: dict[str, str]) -> None:
    def short(name: str) -> str:
        return name.removeprefix("layers.").removesuffix("_proj")

    found = {short(name): short(before) for name, before in layers_before(linears, 4).items()}
    assert found == expected


@pytest.mark.parametrize(
    ("in_features", "share", "count"), [(96, 0.05, 5), (10, 0.01, 1), (1, 0.25, 1), (40, 0.25, 10)]
)
def test_a_share_of_the_columns_is_one_at_least(in_features: int, share: float, count: int) -> None:
    assert proxy_count(in_features, share) == count
    assert proxy_dims(torch.rand(in_features), in_features, share).shape == (count,)


def test_of_columns_that_spread_alike_the_first_stay() -> None:
    assert proxy_dims(torch.ones(64), 64, 0.1).tolist() == [0, 1, 2, 3, 4, 5]
    # As many rows as columns are no heads, whatever the config says.
    assert proxy_dims(torch.arange(6.0), 6, 0.25, kv_heads=4).tolist() == [4, 5]


def test_proxy_columns_are_those_of_the_largest_deviations() -> None:
    weight = torch.randn(96, 40) * torch.rand(96, 1)
    weight[[7, 90]] = 9 * torch.randn(2, 40)
    spread = deviations(torch.split(weight.half(), 10))
    expected = np.sort(np.argsort(-weight.half().numpy().astype(np.float64).std(1), kind="stable")[:5])
    assert proxy_dims(spread, 96, 0.05).tolist() == expected.tolist()
    assert {7, 90} <= set(expected.tolist())


def test_proxy_columns_of_values_count_for_every_head_that_they_serve() -> None:
    spread = torch.rand(16)  # 2 heads of 8
    spread[[3, 12]] = torch.tensor([2.0, 3.0])
    assert proxy_dims(spread, 48, 0.125, 2).tolist() == [3, 11, 19, 28, 36, 44]


# Conversions.

_SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 144, "num_attention_heads": 4}
_SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
HOW: dict[str, Any] = {"format": 2, "calibration_tokens": 64}
OPTIONS: dict[str, dict[str, Any]] = {
    "nf4": {"bits": 4, "data_type": "nf4"},
    "quantile": {"bits": 3, "data_type": "quantile", "block_size": 32, "quantize_head": True},
    "proxy": {"bits": 5, "data_type": "int", "block_size": "row", "outliers": "proxy=0.05"},
    "gptq": {"bits": 4, "rounding": "gptq", "outliers": "top-k=3"},
    "gptq and proxy": {"bits": 3, "data_type": "quantile", "rounding": "gptq", "outliers": "proxy=0.05"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, quiet_transformers: None) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("kbit") / "source"
    config = transformers.LlamaConfig(**_SIZES, num_hidden_layers=2)
    transformers.LlamaForCausalLM(config).half().save_pretrained(path)
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_is_written_is_the_definition_and_the_source(
    options: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    report = converter.convert(source, tmp_path / "out", **HOW, **options)
    checkpoint, original = open_checkpoint(tmp_path / "out"), open_source(source)
    kbit = Options(**HOW, **options).kbit
    assert kbit is not None
    assert len(checkpoint.records) == report.layers == 14 + options.get("quantize_head", 0)
    for name, record in checkpoint.records.items():
        weight = original.read(f"{name}.weight")
        codes, absmax, levels = reference.quantize_weight(weight, kbit.bits, kbit.data_type, kbit.block)
        stored = {end: checkpoint.read(f"{name}.{end}") for end in ("absmax", "outlier_dims", "outlier_weight")}
        assert record.scheme == Scheme(kbit=kbit)
        assert (record.out_features, record.in_features) == tuple(weight.shape)
        assert torch.equal(stored["absmax"], absmax)
        assert torch.equal(stored["outlier_weight"], weight[:, stored["outlier_dims"].long()])
        assert (f"{name}.codebook" in checkpoint.tensors) == (kbit.data_type == "quantile")
        if kbit.data_type == "quantile":
            assert torch.equal(checkpoint.read(f"{name}.codebook"), levels.half())
        same = torch.equal(checkpoint.read(f"{name}.weight"), pack(codes, kbit.bits))
        assert same == (options.get("rounding") != "gptq")
    assert check_values(checkpoint) == []
    assert compare_with_source(checkpoint, original).problems == []
    again = converter.convert(source, tmp_path / "out", **HOW, **options)
    assert (again.already, again.coding) == (True, f"{kbit.bits}-bit {kbit.data_type}")


def test_proxy_columns_are_written_and_planned(source: Path, tmp_path: Path) -> None:
    plan = make_plan(resolve(source, None, "source"), tmp_path / "out", Options(**HOW, **OPTIONS["proxy"]))
    report = converter.convert(source, tmp_path / "out", **HOW, **OPTIONS["proxy"])
    assert report.bytes_after == plan.bytes_after
    checkpoint, original = open_checkpoint(tmp_path / "out"), open_source(source)
    assert checkpoint.quantization.criterion == "proxy=0.05"
    counts = {name.removeprefix("model.layers."): count for name, count in checkpoint.quantization.outliers.items()}
    assert counts["0.self_attn.q_proj"] == counts["0.self_attn.v_proj"] == 0  # nothing is before them
    assert (counts["0.self_attn.o_proj"], counts["1.self_attn.k_proj"], counts["1.mlp.down_proj"]) == (3, 3, 7)
    up = original.read("model.layers.1.mlp.up_proj.weight").numpy().astype(np.float64)
    found = checkpoint.read("model.layers.1.mlp.down_proj.outlier_dims")
    assert found.tolist() == sorted(np.argsort(-up.std(1), kind="stable")[:7].tolist())


@pytest.mark.parametrize(
    "options",
    [OPTIONS["quantile"], OPTIONS["gptq and proxy"], {"target_size": 70_000}],
    ids=["quantile", "gptq", "target size"],
)
def test_what_is_interrupted_goes_on_to_the_same_bytes(options: dict[str, Any], source: Path, tmp_path: Path) -> None:
    converter.convert(source, tmp_path / "whole", **HOW, **options)
    for stop in (3, 9):
        seen: list[str] = []

        def progress(name: str, nbytes: int, stop: int = stop, seen: list[str] = seen) -> None:
            seen.append(name)
            if len(seen) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            converter.convert(source, tmp_path / "out", progress=progress, **HOW, **options)
    converter.convert(source, tmp_path / "out", **HOW, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("kbit", SCHEMES, ids=lambda kbit: kbit.name)
def test_a_record_takes_the_bits_that_it_says(kbit: KBit) -> None:
    specs = NATIVE.weight_specs("m", 512, 4096, Scheme(kbit=kbit))
    bits = 8 * sum(spec.nbytes for spec in specs) / (512 * 4096)
    assert bits == pytest.approx(kbit.bits + 16 / (kbit.block or 4096), rel=0.01)


def test_levels_of_rows_are_those_of_the_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kbit_levels, "_SAMPLE", 100)
    weight, how = torch.randn(37, 70), KBit(4, "quantile", 32)
    expected = reference.quantize_weight(weight, 4, "quantile", 32)[2]
    found = levels_of_rows(torch.split(weight, 5), (37, 70), how)
    assert torch.equal(found, expected)


def test_weights_alone_pass_on_their_error() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(400, 96) * torch.rand(96).mul(4).exp(), torch.randn(300, 96)
    scheme = Scheme(kbit=KBit(8, "int", 32))  # of which the error is not above that of inputs in int8
    codes, grid = round_to_nearest(weight, scheme)
    out = x @ weight.t()
    dims = x.square().sum(0).argsort(descending=True)
    norms = column_norms(weight, codes, grid)
    ks, errors = error_curve(x, [norms], [out.square().sum(1)], dims[:24], scheme)
    for k, predicted in zip(ks, errors, strict=True):
        lost = (x.index_fill(1, dims[:k], 0) @ (grid.dequantize(codes) - weight).t()).square().sum(1)
        overall, per_token = lost.sum() / out.square().sum(), (lost / out.square().sum(1)).mean()
        assert predicted == pytest.approx(float(overall + per_token) / 2, rel=0.1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bits": 8}, None),
        ({"bits": 8, "data_type": "int", "block_size": "row"}, KBit(8, "int", None)),
        ({"block_size": "128"}, KBit(4, "nf4", 128)),
        ({"data_type": "float"}, KBit(4, "float", 64)),
        ({"bits": 3}, KBit(3, "quantile", 64)),
        ({"bits": 6}, KBit(6, "int", 64)),
        ({"target_size": "1MB", "bits": 4}, "--target-size chooses the bits"),
        ({"target_size": "1MB", "format": 1}, "--target-size 1MB takes --format 2"),
        ({"target_size": "much"}, "expected a number and a unit"),
        ({"bits": 9}, "9 bits"),
        ({"bits": 3, "data_type": "nf4"}, "'nf4' with 3 bits"),
        ({"bits": 4, "block_size": 48}, "block size 48"),
        ({"bits": 4, "format": 1}, "--bits 4 takes --format 2"),
        ({"outliers": "proxy=0.02", "format": 1}, "--outliers proxy=0.02 takes --format 2"),
        ({"bits": 4, "rotate": True}, "--rotate is for int8"),
    ],
    ids=str,
)
def test_options_that_go_together(options: dict[str, Any], expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            Options(**{"format": 2, **options})
    else:
        chosen = Options(**{"format": 2, **options})
        assert (chosen.kbit, chosen.outliers) == (expected, "none" if expected else "top-k=16")


def test_embeddings_and_experts_are_of_k_bits_too(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**_SIZES, num_hidden_layers=1, num_local_experts=2)
    transformers.MixtralForCausalLM(config).bfloat16().save_pretrained(tmp_path / "source")
    how = {"bits": 4, "outliers": "proxy=0.05", "quantize_embeddings": True}
    converter.convert(tmp_path / "source", tmp_path / "out", format=2, **how)
    checkpoint = open_checkpoint(tmp_path / "out")
    schemes = {name: record.scheme for name, record in checkpoint.records.items()}
    assert len(schemes) == 4 + 6 + 1
    assert schemes["model.embed_tokens"] == Scheme(lookup="only", kbit=KBit(4, "nf4", 64))
    counts = {name.split(".", 3)[-1]: count for name, count in checkpoint.quantization.outliers.items()}
    # The last matrix of an expert has that expert's `up` before it, and the first ones the attention's output.
    experts = {name: count for name, count in counts.items() if "experts" in name}
    assert sorted(experts.values()) == [3, 3, 3, 3, 7, 7]
    assert check_values(checkpoint) == []
    assert compare_with_source(checkpoint, open_source(tmp_path / "source")).problems == []


@pytest.mark.parametrize(
    ("schemes", "rounding", "coded", "words"),
    [
        ([Scheme()] * 2, "nearest", "int8", "one scale per row (absmax)"),
        (
            [Scheme("zeropoint", 128, 64)],
            "gptq",
            "int8",
            "one scale per row (absmax), rotated in blocks of 64, rounded by GPTQ",
        ),
        ([Scheme(kbit=SCHEMES[0])] * 2, "nearest", "4 bits", "nf4-block64"),
        ([Scheme(kbit=SCHEMES[0])], "gptq", "4 bits", "nf4-block64, rounded by GPTQ"),
        (
            [*[Scheme(kbit=SCHEMES[1])] * 2, Scheme(kbit=SCHEMES[2]), Scheme()],
            "nearest",
            "3 to 5 bits",
            "float3-block32 in 2, int5-row in 1",
        ),
    ],
    ids=str,
)
def test_how_layers_are_coded_is_told(schemes: list[Scheme], rounding: str, coded: str, words: str) -> None:
    names = [f"layer {number}" for number in range(len(schemes))]
    quantization = Quantization(
        [],
        dict.fromkeys(names, 0),
        schemes={scheme.name: scheme for scheme in schemes},
        layers={name: scheme.name for name, scheme in zip(names, schemes, strict=True)},
        rounding=rounding,
        layout=NATIVE,
    )
    assert (coded_in(quantization), coding_in_words(quantization)) == (coded, words)
    assert ("8-bit integers" in method_in_words(quantization)[0]) == (coded == "int8")
    assert ("2208.07339" in method_in_words(quantization)[1]) == (coded == "int8")


@pytest.mark.parametrize(
    ("options", "lookup", "expected"),
    [
        ({}, None, Scheme("zeropoint", 128)),
        ({"rotate": True}, None, Scheme("zeropoint", 128, 64)),
        ({"rotate": True}, "too", Scheme("zeropoint", 128, 64, "too")),
        ({"rotate": True}, "only", Scheme(lookup="only")),
        ({"bits": 4}, None, Scheme(kbit=KBit(4, "nf4", 64))),
        ({"bits": 4}, "only", Scheme(lookup="only", kbit=KBit(4, "nf4", 64))),
        # It is what int8 is for a table of rows, and has that name.
        ({"bits": 8, "data_type": "int", "block_size": "row"}, "only", Scheme(lookup="only")),
        ({"bits": 8, "data_type": "int", "block_size": "row"}, "too", Scheme(lookup="too", kbit=KBit(8, "int", None))),
    ],
    ids=str,
)
def test_what_options_make_of_a_layer_and_of_an_embedding(options: Any, lookup: Any, expected: Scheme) -> None:
    assert Options(**{"format": 2, **options}).scheme_of(lookup) == expected


def test_how_many_tensors_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, threads in ((1, 1), (3, 3), (8, 8), (96, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)), raising=False)
        assert (Options().threads, Options(jobs=12).threads, Options(jobs=1).threads) == (threads, 12, 1)
    for options in ({"jobs": 0}, {"calibration_tokens": 0}, {"format": 3}):
        with pytest.raises(ValueError, match="expected"):
            Options(**options)


# `--target-size`.


def test_bytes_go_where_the_error_falls_most_for_each() -> None:
    sizes = {"a": [30, 40, 50], "b": [300, 400, 500], "c": [30, 40, 50]}
    errors = {"a": [9.0, 3.0, 1.0], "b": [9.0, 5.0, 4.0], "c": [1.0, 0.9, 0.85]}
    assert spend(sizes, errors, 0) == {"a": 0, "b": 0, "c": 0}
    assert spend(sizes, errors, 25) == {"a": 2, "b": 0, "c": 0}
    assert spend(sizes, errors, 120) == {"a": 2, "b": 1, "c": 0}
    assert spend(sizes, errors, 139) == {"a": 2, "b": 1, "c": 1}  # a step of b does not fit
    # What is off the hull is taken where nothing else fits.
    assert spend({"a": [30, 40, 50]}, {"a": [9.0, 8.5, 1.0]}, 10) == {"a": 1}


def test_a_target_size_is_kept_by_the_bits_of_each_layer(source: Path, tmp_path: Path) -> None:
    uniform = {bits: converter.convert(source, tmp_path / str(bits), format=2, bits=bits) for bits in (4, 5)}
    target = (uniform[4].bytes_after + uniform[5].bytes_after) // 2
    how = {**HOW, "target_size": target, "quantize_head": False}
    report = converter.convert(source, tmp_path / "out", **how)
    assert 0.98 * target < report.bytes_after <= target
    checkpoint = open_checkpoint(tmp_path / "out")
    bits = {record.scheme.kbit.bits for record in checkpoint.records.values() if record.scheme.kbit}
    assert report.coding == f"{min(bits)} to {max(bits)} bits"
    assert min(bits) < max(bits)
    assert checkpoint.quantization.calibration is not None
    assert check_values(checkpoint) == []
    assert compare_with_source(checkpoint, open_source(source)).problems == []
    assert converter.convert(source, tmp_path / "out", **how).already
    with pytest.raises(LLMInt8Error, match="with 3 bits in all layers OUT takes"):
        converter.convert(source, tmp_path / "none", **{**how, "target_size": "10KB"})
