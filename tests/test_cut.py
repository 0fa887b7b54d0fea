"""What a layer and a plan become when a model is cut, computed in one process; `test_parallel.py` has two of them."""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from llmint8.formats import LLMInt8Error
from llmint8.runtime import Int8Linear
from llmint8.runtime.parallel.cut import cut_layers, cut_of, plan_cut, settle_cuts
from llmint8.runtime.parallel.plan import Parallel, _pattern, settle
from llmint8.runtime.parallel.state import is_cut


def mesh(size: int, rank: int) -> Any:
    return SimpleNamespace(size=lambda: size, get_local_rank=lambda: rank)


class Placed(nn.Parameter):
    """What transformers leaves of a parameter: its part of it, and how it was cut."""

    placements: tuple[str, ...] = ("shard",)


def layer_of(rank: int, size: int, by: Any, matrices: int, stored: int | None) -> tuple[Int8Linear, Int8Linear]:
    """Return a layer of 12 outputs and 10 inputs, whole, and what is left of it on a process, by definition."""
    torch.manual_seed(0)
    linear = nn.Linear(10, 12).requires_grad_(False)
    whole, part = (Int8Linear.from_linear(linear, torch.tensor([0, 3, 4, 9])) for _ in range(2))
    if stored is None:
        part.outlier_dims = part.outlier_weight = None
    plan_cut(part, by, matrices, mesh(size, rank))
    cut = cut_of(part)
    assert cut is not None
    here = [number for piece in cut.pieces for number in piece]
    weight = whole.unpacked_weight()
    values = weight[here] if by == "outputs" else weight[:, here]
    part._parameters["weight"] = Placed(values, requires_grad=False)
    part.prepared = None
    bias = linear.bias[here] if by == "outputs" else linear.bias
    part._parameters["bias"] = nn.Parameter(bias.clone(), requires_grad=False)
    return whole, part


@pytest.mark.parametrize("stored", [4, None], ids=["with outliers", "without"])
@pytest.mark.parametrize(
    ("by", "matrices", "size"),
    [("outputs", 1, 2), ("outputs", 1, 4), ("outputs", 2, 3), ("outputs", 3, 2), ("inputs", 1, 2), ("inputs", 1, 4)],
)
def test_parts_are_of_equal_size_and_make_up_the_layer(by: Any, matrices: int, size: int, stored: int | None) -> None:
    sums, pieces = torch.zeros(3, 12), []
    x = torch.randn(3, 10)
    for rank in range(size):
        whole, part = layer_of(rank, size, by, matrices, stored)
        assert cut_layers(nn.Sequential(part))["0"][0] is part
        assert is_cut(nn.Sequential(part))
        settle_cuts(nn.Sequential(part))
        cut = cut_of(part)
        assert cut is not None
        assert (cut.by, cut.shape, cut.placements, len(cut.pieces)) == (by, (12, 10), ("shard",), matrices)
        here = [number for piece in cut.pieces for number in piece]
        pieces += here
        assert cut.width == len(here) > 0
        shape = (len(here), 10) if by == "outputs" else (12, len(here))
        assert (part.out_features, part.in_features) == tuple(part.unpacked_weight().shape) == shape
        assert (part.bias is not None) == (by == "outputs" or rank == 0)
        rows, columns = (here, list(range(10))) if by == "outputs" else (list(range(12)), here)
        expected = whole.dequantize()[rows][:, columns]
        if stored is None:
            assert (part.outlier_dims, part.outlier_weight) == (None, None)
            expected = (whole.unpacked_weight() * whole.row_absmax[:, None] / 127)[rows][:, columns]
        assert torch.allclose(part.dequantize(), expected, atol=1e-7)
        assert not any(parameter.requires_grad for parameter in part.parameters())
        part.prepare()
        sums[:, rows] += part(x[:, columns])
    assert sorted(pieces) == list(range(12 if by == "outputs" else 10))
    if stored is not None:  # inputs have a scale for each part, so they are as near, and not the same
        assert float((sums - whole(x)).norm() / whole(x).norm()) < (1e-6 if by == "outputs" else 0.02)


@pytest.mark.parametrize(
    ("by", "matrices", "size", "message"),
    [
        ("outputs", 5, 2, "12?0? outputs cannot be cut for 2 processes: they are those of 5 matrices of one size"),
        ("outputs", 1, 9, "12 outputs cannot be cut for 9 processes: one would have none; start fewer"),
        ("inputs", 1, 6, "10 inputs cannot be cut for 6 processes: one would have none; start fewer"),
        ("inputs", 1, 20, "10 inputs cannot be cut for 20 processes: one would have none; start fewer"),
    ],
)
def test_no_process_is_left_without_a_part(by: Any, matrices: int, size: int, message: str) -> None:
    layer = Int8Linear(10, 12, device="meta")
    layer.name = "up"
    with pytest.raises(LLMInt8Error, match=f"^up: {message}$"):
        plan_cut(layer, by, matrices, mesh(size, 0))
    assert cut_of(layer) is None


def test_a_rotated_block_stays_whole() -> None:
    for features, size, fits in ((128, 2, True), (192, 2, False), (192, 3, True)):
        layer = Int8Linear(features, 192, device="meta", rotation=64)
        plan_cut(layer, "outputs", 1, mesh(size, 0))  # which cuts no block
        if fits:
            plan_cut(layer, "inputs", 1, mesh(size, size - 1))
            cut = cut_of(layer)
            assert cut is not None
            assert (cut.by, cut.shape, cut.pieces) == ("inputs", (192, features), (range(features - 64, features),))
        else:
            with pytest.raises(LLMInt8Error, match="each would have 96, and it is rotated in blocks of 64"):
                plan_cut(layer, "inputs", 1, mesh(size, 0))


def test_our_styles_take_the_place_of_those_that_cut() -> None:
    importlib.import_module("transformers.distributed.tensor_parallel")  # which registers theirs
    from llmint8.runtime.parallel.styles import of_experts, ours

    known = {
        "colwise": "llmint8_colwise",
        "colwise_rep": "llmint8_colwise_gather_output",
        "colwise_gather_output": "llmint8_colwise_gather_output",
        "rowwise": "llmint8_rowwise",
        "rowwise_rep": "llmint8_rowwise_split_input",
        "packed_colwise": None,
        "sequence_parallel": None,
        "replicate": None,
    }
    assert {style: ours(style) for style in known} == known
    of_one = {"colwise": "expert_colwise", "packed_colwise": "expert_packed_colwise", "rowwise": "expert_rowwise"}
    assert {style: of_experts(style, 1) for style in of_one} == {k: f"llmint8_{v}" for k, v in of_one.items()}
    # Of two layers each is one of the matrices that stood one behind the other.
    assert of_experts("packed_colwise", 2) == "llmint8_expert_colwise"
    assert of_experts("rowwise_rep", 1) is None


def tiny(**layers: dict[str, Any]) -> Any:
    """Return a Llama on the meta device, with int8 layers of this shape in the place of its own."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 32}
    with torch.device("meta"):
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2} | layers.pop("heads", {})
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            made = Int8Linear(module.in_features, module.out_features, False, device="meta")
            made.name = name
            model.set_submodule(name, made)
    model.tp_plan = dict(model.tp_plan or type(model)._tp_plan or {})
    return model


PLAN = {
    **{f"model.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
    "lm_head": "colwise_gather_output",
    "model.layers.*.mlp.of_another_model": "colwise",
}


class Planned:
    """A model as `fit` sees it, with plans of its own."""

    def __init__(self, model: Any, plan: dict[str, str]) -> None:
        self.tp_plan, self.ep_plan, self._model = plan, {}, model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def fitted(size: int, rules: dict[str, str] | None = None, plan: dict[str, str] = PLAN, **heads: int) -> dict[str, str]:
    model = Planned(tiny(heads=heads), dict(plan))
    Parallel(SimpleNamespace(tp_size=size, ep_size=1), rules or {}).fit(model)
    return model.tp_plan


def test_a_plan_is_fitted_to_int8_layers(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    int8 = {rule: f"llmint8_{style}" for rule, style in PLAN.items() if "another" not in rule}
    assert fitted(2) == int8
    assert not caplog.messages
    # Attention whose heads cannot be dealt out stays whole, and that is said once.
    whole = {rule: style for rule, style in int8.items() if "attn" not in rule}
    for size, said in (
        (3, "num_attention_heads = 4 and num_key_value_heads = 2 on 3"),
        (4, "num_key_value_heads = 2 on 4"),
    ):
        caplog.clear()
        assert fitted(size) == whole
        assert [message.partition(": ")[2] for message in caplog.messages] == [
            f"{said} processes, so attention is whole on each"
        ]
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    caplog.clear()
    assert fitted(4) == whole
    assert not caplog.messages


def test_the_callers_rules_come_first_and_name_something() -> None:
    up = "model.layers.*.mlp.up_proj"
    assert fitted(2, {up: "colwise_rep"})[up] == "llmint8_colwise_gather_output"
    assert fitted(2, {up: "replicate"})[up] == "replicate"
    assert fitted(2, {up: "rowwise"}, {}) == {up: "llmint8_rowwise"}
    for rules, plan, message in (
        (
            {"model.layers.*.mlp.up": "colwise"},
            PLAN,
            r"^tp_plan: 'model\.layers\.\*\.mlp\.up' names nothing in Planned$",
        ),
        (
            {up: "sequence_parallel"},
            PLAN,
            r"^tp_plan: model\.layers\.0\.mlp\.up_proj: no style 'sequence_parallel' for",
        ),
        ({}, {}, "^Planned: transformers has no plan of how to cut it; give one, as "),
    ):
        with pytest.raises(LLMInt8Error, match=message):
            fitted(2, rules, plan)
    assert _pattern("model.layers.11.experts.3.w1") == "model.layers.*.experts.*.w1"


def test_what_is_asked_for_is_settled(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.distributed import DistributedConfig

    rules = {"a": "colwise"}
    assert settle(None, None, "cpu", "auto") is None
    assert settle("auto", None, None, None) is None
    assert caplog.messages == ["One process, so nothing is cut; torchrun --nproc-per-node 2 starts two"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for plan, config, expected in (
        ("auto", None, {}),
        (rules, None, rules),
        (None, DistributedConfig(tp_plan=rules), rules),
        (None, DistributedConfig(tp_size=2), {}),
    ):
        found = settle(plan, config, None, None)
        assert found is not None
        assert (found.rules, found.config.tp_plan, found.size) == (expected, "auto", 2)
    caplog.clear()
    assert settle(None, DistributedConfig(tp_size=1), None, None) is None
    assert not caplog.messages  # there are two processes, and it is asked for
    for arguments, message in (
        (("auto", None, "cpu", None), "leave out device and device_map"),
        (("auto", None, None, "auto"), "leave out device and device_map"),
        (("all", None, None, None), "^tp_plan is 'all', expected 'auto' or a dict of names and styles$"),
        (("auto", DistributedConfig(), None, None), "are both given"),
        ((None, DistributedConfig(pp_size=2), None, None), "only tp_size and ep_size may be more than 1"),
        ((None, DistributedConfig(fsdp_size=2), None, None), "only tp_size and ep_size may be more than 1"),
    ):
        with pytest.raises(ValueError, match=message):
            settle(*arguments)
