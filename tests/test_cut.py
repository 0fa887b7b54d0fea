"""What a layer and a plan become when a model is cut, computed in one process; `test_parallel.py` has two of them."""

import copy
import importlib
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from llmint8.formats import LLMInt8Error
from llmint8.runtime import Int8Linear
from llmint8.runtime.parallel.cut import _joined, cut_layers, cut_of, plan_cut, settle_cuts, whole_tensors
from llmint8.runtime.parallel.plan import Parallel, _pattern, settle
from llmint8.runtime.parallel.state import is_cut, is_first, whole_state


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


@pytest.fixture
def alone() -> Iterator[Any]:
    """A group of this process alone, whose collectives are what they are of several, and its mesh."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def cut_here(mesh: Any, by: Any, *, stored: bool = True, bias: bool = True) -> tuple[Int8Linear, Int8Linear]:
    """Return a layer, and the same cut for one process."""
    linear = nn.Linear(10, 12, bias).requires_grad_(False)
    whole = Int8Linear.from_linear(linear, torch.tensor([0, 4, 9]))
    if not stored:
        whole.outlier_dims = whole.outlier_weight = None
    part = copy.deepcopy(whole)
    plan_cut(part, by, 1, mesh)
    placed = [Shard(0 if by == "outputs" else 1)]
    part._parameters["weight"] = nn.Parameter(distribute_tensor(part.unpacked_weight(), mesh, placed), False)
    part.prepared = None
    settle_cuts(nn.Sequential(part))
    part.prepare()
    return whole, part


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("by", ["outputs", "inputs"])
def test_what_was_cut_is_put_together_again(alone: Any, by: Any, bias: bool, stored: bool) -> None:
    whole, part = cut_here(alone, by, stored=stored, bias=bias)
    cut, state = cut_of(part), whole.state_dict()
    assert cut is not None
    found = whole_tensors(part, cut)
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
    expected = {"weight"} | ({"outlier_weight"} if stored else set())
    expected |= ({"SCB"} | ({"bias"} if bias else set())) if by == "outputs" else {"outlier_dims"} if stored else set()
    assert found.keys() == expected
    model: Any = nn.Sequential(part, nn.Linear(2, 2))
    model.all_tied_weights_keys = {}
    saved = whole_state(model)
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[f"0.{name}"], tensor) for name, tensor in state.items())
    assert is_first()
    assert (is_cut(model), is_cut(nn.Linear(2, 2))) == (True, False)


@pytest.mark.parametrize("style", ["colwise", "colwise_rep", "rowwise", "rowwise_rep"])
def test_a_layer_that_is_cut_takes_part_in_what_all_compute(alone: Any, style: str) -> None:
    importlib.import_module("transformers.distributed.tensor_parallel")
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    from llmint8.runtime.parallel.styles import ours

    whole, part = cut_here(alone, "outputs" if "col" in style else "inputs")
    made: Any = ALL_PARALLEL_STYLES[ours(style)]
    made.install_forward(part, alone)
    assert len(part._forward_pre_hooks) == (style != "rowwise")
    assert len(part._forward_hooks) == (style != "colwise")
    inputs = [torch.linspace(-1, 1, 30).reshape(3, 10).requires_grad_() for _ in range(2)]
    outputs = [layer(x) for layer, x in zip((whole, part), inputs, strict=True)]
    assert torch.equal(*outputs)
    for y in outputs:
        y.square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)  # type: ignore[arg-type]
    fresh = copy.deepcopy(whole)
    fresh.weight = nn.Parameter(fresh.unpacked_weight(), requires_grad=False)
    made.shard_param(fresh, "weight", alone)
    assert cut_of(fresh) is not None
    assert cut_of(whole) is None


def test_a_style_changes_what_enters_and_leaves_and_leaves_other_layers_to_theirs(alone: Any) -> None:
    importlib.import_module("transformers.distributed.tensor_parallel")
    from llmint8.runtime.parallel.styles import CutStyle, _added, _gathered, _own_part, _shared

    calls: list[Any] = []
    names = ("validate_param", "shard_param", "install_forward")
    plain: Any = SimpleNamespace(**{name: lambda *a, name=name, **_: calls.append((name, *a)) for name in names})
    whole, part = cut_here(alone, "outputs")
    cut, x = cut_of(part), torch.randn(3, 10)
    assert cut is not None
    style = CutStyle(plain, "outputs", enter=lambda x, cut: 2 * x, leave=lambda y, cut: y + cut.width)
    style.install_forward(part, alone)
    assert torch.equal(part(x), whole(2 * x) + 12)
    linear, fresh = nn.Linear(10, 12), copy.deepcopy(whole)
    style.install_forward(linear, alone)
    style.validate_param(linear, "weight", alone)
    for layer, name, is_cut_then in ((linear, "weight", False), (fresh, "bias", False), (fresh, "weight", True)):
        style.shard_param(layer, name, alone)
        assert (cut_of(layer) is not None) == is_cut_then
    expected = [("install_forward", linear, alone), ("validate_param", linear, "weight", alone)]
    expected += [("shard_param", *what, alone) for what in ((linear, "weight"), (fresh, "bias"), (fresh, "weight"))]
    assert calls == expected
    y = torch.randn(3, 12)
    assert torch.equal(_shared(x, cut), x)
    assert torch.equal(_own_part(x, replace(cut, pieces=(range(2, 5),))), x[:, 2:5])
    assert torch.equal(_added(y, cut), y)
    assert torch.equal(_gathered(y, cut), y)


def test_parts_of_unequal_length_are_joined_in_the_order_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three is here; the others send what they would."""
    others = {0: torch.arange(8).reshape(4, 2), 2: torch.empty(0, 2, dtype=torch.int64)}
    mine = torch.tensor([[90, 91], [92, 93]])

    def all_gather(found: list[Any], tensor: torch.Tensor, group: str) -> None:
        assert group == "group"
        for rank, one in enumerate(found):
            if rank == 1:
                one.copy_(tensor)
            elif tensor.dim() == 0:
                one.fill_(len(others[rank]))
            else:
                assert tensor.shape == (4, 2)  # as many rows as any has
                one.fill_(-1)[: len(others[rank])] = others[rank]

    monkeypatch.setattr(dist, "all_gather", all_gather)
    mesh: Any = SimpleNamespace(size=lambda: 3, get_group=lambda: "group")
    assert _joined(mine, mesh).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [90, 91], [92, 93]]
