"""What `llmint8 report` counts: outlier features by the paper's definition, sizes, and statistics that are refused."""

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from llmint8.formats import BITSANDBYTES, NATIVE, KBit, LLMInt8Error, TensorInfo
from llmint8.formats.int8.checkpoint import Checkpoint
from llmint8.formats.int8.manifest import Manifest
from llmint8.formats.int8.records import Int8Record
from llmint8.formats.int8.schemes import Scheme
from llmint8.runtime.report.findings import Findings, sizes
from llmint8.runtime.report.labels import block_of, joined, layer_kinds
from llmint8.runtime.report.statistics import LayerInput, hidden_inputs, read_inputs, table4

Q = "h.0.q"
STATISTICS: dict[str, Any] = {
    "dims": [3, 1],
    "absmax": [9.0, 2.5],
    "positions": [0.5, 0.0],
    "quartiles": [[-1.0, 0.0, 1.5], [0, 1, 2]],
    "ks": [0, 2],
    "errors": [1.5, 0.25],
    "absmax_median": 2.25,
    "outlier_features": 1,
}


def record(name: str, out_features: int = 8, in_features: int = 64, count: int | None = 2, **scheme: Any) -> Int8Record:
    return Int8Record(name, out_features, in_features, count, False, Scheme(**scheme))


def opened(*records: Int8Record, tensors: dict[str, TensorInfo] | None = None, layout: Any = NATIVE) -> Any:
    quantization: Any = type("Quantization", (), {"criterion": "none", "layout": layout})
    return Checkpoint(Path("x"), {}, quantization, tensors or {}, {one.name: one for one in records})


def read(modules: dict[str, Any], *records: Int8Record) -> list[LayerInput]:
    manifest = Manifest("1.0", "", {}, {}, modules)
    return read_inputs(opened(*(records or [record(Q)])), manifest, Path("manifest"))


def test_statistics_are_read_as_they_are() -> None:
    names = [Q, "h.0.k", "h.1.k", "h.0.v"]
    others = {"h.0.k": {"shares_input_with": Q}, "h.1.k": {"shares_input_with": Q}, "h.0.v": {"absmax": [1.0]}}
    (found,) = read({"h.0.v": others.pop("h.0.v"), Q: STATISTICS, **others, "gone": STATISTICS}, *map(record, names))
    assert (found.layers, found.kinds, found.block, found.blocks) == ((*names[:3],), "q, k", "h.0", ["h.0", "h.1"])
    assert (found.in_features, found.kept, found.absmax_median, found.outlier_features) == (64, 2, 2.25, 1)
    lists = found.dims, found.absmax, found.positions, found.quartiles, found.ks, found.errors
    assert lists == ([3, 1], [9, 2.5], [0.5, 0], [(-1, 0, 1.5), (0, 1, 2)], [0, 2], [1.5, 0.25])
    errors = [found.relative_error(kept) for kept in range(4)]
    assert errors == [math.sqrt(error / 3) for error in (1.5, 1.5, 0.25, 0.25)]
    assert read({Q: STATISTICS}, record(Q, count=None))[0].kept == 0
    one = {key: values[:1] if isinstance(values, list) else values for key, values in STATISTICS.items()}
    assert read({Q: one})[0].dims == [3]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dims": [3, 64]}, "a dim is not in 0 to 63"),
        ({"dims": [3, -1]}, "a dim is not in 0 to 63"),
        ({"dims": [3, True]}, "True is not a finite number"),
        ({"dims": [3, "1"]}, "'1' is not a finite number"),
        ({"dims": [3]}, "not of one length"),
        ({"absmax": [9.0]}, "not of one length"),
        ({"positions": [0.5, 0.0, 0.0]}, "not of one length"),
        ({"quartiles": [[0, 1, 2]]}, "not of one length"),
        ({"quartiles": [[0, 1, 2], [0, 1]]}, "not of one length"),
        ({"quartiles": [[0, 1, 2], [0, 1, math.nan]]}, "nan is not a finite number"),
        ({"dims": [], "absmax": [], "positions": [], "quartiles": []}, "not of one length"),
        ({"ks": [1, 2]}, "ks do not begin with 0"),
        ({"ks": [0]}, "ks do not begin with 0"),
        ({"ks": [], "errors": []}, "ks do not begin with 0"),
        ({"errors": [1.5, -1e-9]}, "ks do not begin with 0"),
        ({"errors": [1.5, math.inf]}, "inf is not a finite number"),
        ({"errors": None}, "TypeError"),
        ({"absmax_median": "1"}, "'1' is not a finite number"),
        ({"outlier_features": 10**400}, "OverflowError"),
    ],
    ids=str,
)
def test_statistics_that_mean_nothing_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LLMInt8Error, match=rf"^manifest: {Q}: malformed statistics \(.*{words}.*convert the source"):
        read({Q: STATISTICS | changes})


def test_without_statistics_there_is_no_report() -> None:
    for modules in ({}, {Q: {}}, {"h.0.k": STATISTICS}, {Q: {"shares_input_with": "h.0.k"}}):
        with pytest.raises(LLMInt8Error, match=r"^manifest: holds no statistics, .* \(outliers none\)"):
            read(modules)


def one_input(block: str, dims: list[int], absmax: list[float], positions: list[float], **more: Any) -> LayerInput:
    quartiles = [(-float(dim), float(position), float(dim)) for dim, position in zip(dims, positions, strict=True)]
    values: dict[str, Any] = {"kinds": "q", "in_features": 32, "kept": 0, "absmax_median": 1.0, "outlier_features": 0}
    values |= {"ks": [0], "errors": [1.0]} | more
    return LayerInput(
        (f"{block}.q",), block=block, dims=dims, absmax=absmax, positions=positions, quartiles=quartiles, **values
    )


def test_outlier_features_are_those_of_the_definition() -> None:
    """Magnitude 6 in 6 % of the positions of an input, in a fourth of the blocks; drawn at these very limits."""
    draw = np.random.default_rng(4)
    for _ in range(40):
        blocks = int(draw.integers(1, 9))
        hidden = []
        for number in range(2 * blocks):
            order = draw.permutation(6)[:4]
            absmax = np.sort(draw.choice([0.0, 5.99, 6.0, 7.0], 4))[::-1]
            positions = draw.choice([0.0, 0.0599, 0.06, 0.5], 4)
            arrays = (array.tolist() for array in (order, absmax, positions))
            hidden.append(one_input(f"h.{number // 2}", *arrays))
        share = np.zeros((blocks, 6))
        for number, one in enumerate(hidden):
            for dim, largest, often in zip(one.dims, one.absmax, one.positions, strict=True):
                if largest >= 6 and often >= 0.06:
                    share[number // 2, dim] = max(share[number // 2, dim], often)
        counts = (share > 0).sum(0)
        expected = {dim for dim in range(6) if counts[dim] / blocks >= 0.25 and counts[dim]}
        found = table4(hidden)
        assert {feature.dim for feature in found.features} == expected
        assert found.blocks == blocks
        assert found.layer_share == (share[:, sorted(expected)] > 0).any(1).sum() / blocks
        means = {dim: share[:, dim].sum() / max(1, counts[dim]) for dim in range(6)}
        assert found.position_share == pytest.approx(fmean(means[dim] for dim in expected) if expected else 0)
        order = [counts[one.dim] for one in found.strongest]
        assert order == sorted(order, reverse=True)
        for feature in found.strongest:
            places = [(one, one.dims.index(feature.dim)) for one in hidden if feature.dim in one.dims]
            assert feature.absmax == max(one.absmax[index] for one, index in places)
            assert feature.layer_share == counts[feature.dim] / blocks
            assert feature.position_share == pytest.approx(means[feature.dim])
            assert feature.quartiles[::2] == (-feature.dim, feature.dim)


def test_dims_that_occur_as_often_go_by_where_they_reach_six_and_then_by_size() -> None:
    def strongest(*inputs: LayerInput) -> list[int]:
        return [feature.dim for feature in table4(inputs).strongest]

    # 1 reaches 6 in two blocks, if in few positions; 2 in one, where it is larger.
    assert strongest(
        one_input("h.0", [2, 1], [99.0, 6.0], [0.01] * 2), one_input("h.1", [1, 3], [6.0, 1.0], [0.01, 0.0])
    )[:2] == [1, 2]
    assert strongest(one_input("h.0", [1, 2, 3], [5.0, 4.0, 4.0], [0.0] * 3)) == [1, 2, 3]
    # Where a dimension is not recorded it may be as large as the smallest that is: 5 * 3 is less than 4 * 4.
    assert (
        strongest(one_input("h.0", [1, 2], [5.0, 4.0], [0.0] * 2), one_input("h.1", [2, 3], [4.0, 3.0], [0.0] * 2))[0]
        == 2
    )
    assert strongest(one_input("h.0", [1, 2], [0.0, 0.0], [0.0] * 2)) == [1, 2]
    assert strongest(one_input("h.0", [2, 1], [0.5, 0.4], [0.0] * 2)) == [2, 1]


def test_a_quartile_is_of_the_inputs_at_which_it_occurs() -> None:
    often = [one_input("h.0", [1], [9.0], [share]) for share in (0.1, 0.2, 0.4)]
    seldom = one_input("h.1", [1], [5.0], [0.5])
    assert table4([*often, seldom]).features[0].quartiles == (-1, 0.2, 1)
    assert table4([seldom, one_input("h.1", [1], [5.0], [0.25])]).strongest[0].quartiles == (-1, 0.375, 1)


def test_more_outliers_than_recorded_make_a_lower_bound() -> None:
    for features, complete in ((0, True), (1, True), (2, False)):
        one = one_input("h.0", [1, 2], [9.0, 9.0], [0.06, 0.0599], outlier_features=features)
        assert table4([one]).complete == complete


def test_hidden_states_are_of_the_commonest_width_and_read() -> None:
    """In a block a single layer that gives the width again, after one that read it, writes; the head is no block."""
    names = ["h.0.qkv", "h.0.out", "h.0.up", "h.0.down", "h.1.first", "h.1.up", "h.2.qkv", "h.2.out", "h.2.fc", "head"]
    shapes = [(96, 32), (32, 32), (64, 32), (32, 64), (32, 32), (64, 32), (96, 32), (32, 32), (32, 32), (99, 32)]
    records = [record(name, *shape) for name, shape in zip(names, shapes, strict=True)]
    inputs = [
        one_input(name.rpartition(".")[0], [1], [1.0], [0.0], in_features=shape[1])
        for name, shape in zip(names, shapes, strict=True)
    ]
    inputs = [LayerInput(**{**vars(one), "layers": (name,)}) for one, name in zip(inputs, names, strict=True)]
    found = hidden_inputs(inputs, opened(*records))
    assert [one.layers[0] for one in found] == ["h.0.qkv", "h.0.up", "h.1.first", "h.1.up", "h.2.qkv", "h.2.fc"]
    assert [one.layers[0] for one in hidden_inputs(inputs[-1:], opened(*records))] == ["head"]


@pytest.mark.parametrize(
    ("layout", "dtype", "scheme"),
    [
        (BITSANDBYTES, "F16", {}),
        (NATIVE, "F32", {"rotation": 64}),
        (NATIVE, "BF16", {"kbit": KBit(4, "quantile", 32)}),
    ],
    ids=["format 1", "format 2", "4 bits"],
)
def test_every_byte_is_of_something(layout: Any, dtype: str, scheme: dict[str, Any]) -> None:
    one = record(Q, 8, 64, 3, **scheme)
    specs = layout.record_specs(Q, 8, 64, 3, dtype, one.scheme)
    infos = [TensorInfo(spec.name, spec.dtype, spec.shape, "", 0) for spec in specs]
    infos += [TensorInfo(name, "F16", (10,), "", 0) for name in (f"{Q}.bias", "norm.weight")]
    checkpoint = opened(one, tensors={info.name: info for info in infos}, layout=layout)
    found = sizes(checkpoint)
    nbytes = {info.name: info.nbytes for info in infos}
    columns = nbytes[f"{Q}.outlier_dims"] + nbytes[f"{Q}.outlier_weight"]
    scales = sum(nbytes.get(f"{Q}.{suffix}", 0) for suffix in (layout.absmax, "weight_format", "codebook"))
    assert list(found.after.values()) == [nbytes[f"{Q}.weight"], scales, columns, 40]
    assert scales > 0
    assert list(found.before.values()) == [8 * 64 * (4 if dtype == "F32" else 2), 40]
    whole: Any = (None, None, None, None)
    assert Findings("x", checkpoint, [], [], *whole).precision == ("float32" if dtype == "F32" else "16 bit")


@pytest.mark.parametrize(
    ("block", "kinds"),
    [
        ("model.layers.11", {"mlp.up_proj": "up_proj", "self_attn.q_proj": "q_proj"}),
        ("h.2", {"attn.c_attn": "c_attn", "attn.c_proj": "attn.c_proj", "mlp.c_proj": "mlp.c_proj"}),
        ("blocks.3", {"ffn.0": "ffn.0", "ffn.2": "ffn.2"}),
        ("b.0", {"0": "0", "ffn.0": "ffn.0"}),
        (
            "bert.encoder.layer.0",
            {
                "attention.output.dense": "attention.output.dense",
                "intermediate.dense": "intermediate.dense",
                "output.dense": "output.dense",
            },
        ),
        (
            "decoder.block.0",
            {
                "layer.0.SelfAttention.q": "SelfAttention.q",
                "layer.1.EncDecAttention.q": "EncDecAttention.q",
                "layer.2.DenseReluDense.wi": "wi",
            },
        ),
        ("b.1", {"layer.0.attn.q": "layer.0.attn.q", "layer.1.attn.q": "layer.1.attn.q", "layer.1.attn.k": "k"}),
        (
            "model.layers.0",
            {f"mlp.experts.{i}.{part}": f"experts.*.{part}" for i in range(8) for part in ("up_proj", "down_proj")}
            | {"mlp.shared_expert.up_proj": "shared_expert.up_proj", "mlp.gate": "gate"}
            | {"mlp.shared_expert.down_proj": "shared_expert.down_proj"},
        ),
        ("model.layers.0", {f"moe.experts.{i}.w1": "w1" for i in range(8)}),
    ],
)
def test_layers_go_by_what_tells_them_apart(block: str, kinds: dict[str, str]) -> None:
    found = layer_kinds([f"{block}.{path}" for path in kinds])
    assert found == {f"{block}.{path}": kind for path, kind in kinds.items()}
    assert {block_of(name) for name in found} == {block}


def test_the_same_name_in_two_stacks_is_one_kind() -> None:
    """Blocks of another stack that have one attention only call it as those that have two."""
    names = ["encoder.layers.0.self_attn.q_proj", "decoder.layers.0.self_attn.q_proj"]
    found = layer_kinds([*names, "decoder.layers.0.encoder_attn.q_proj", "vision.layers.0.mlp.fc1", "head", "proj.0"])
    assert [found[name] for name in names] == ["self_attn.q_proj"] * 2
    assert (found["vision.layers.0.mlp.fc1"], found["head"], found["proj.0"]) == ("fc1", "head", "proj.0")
    assert (block_of("head"), block_of("proj.0"), block_of("bert.pooler.dense")) == ("", "", "")


def test_kinds_that_begin_alike_are_named_together() -> None:
    assert joined(["self_attn.q_proj", "self_attn.k_proj"]) == "self_attn: q_proj, k_proj"
    assert joined(["q_proj", "k_proj", "q_proj"]) == "q_proj, k_proj"
    assert joined(["attn.q", "mlp.up"]) == "attn.q, mlp.up"
    assert joined(["attn.q"]) == "attn.q"
