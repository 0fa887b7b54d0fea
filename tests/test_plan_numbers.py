"""What `llmint8 plan` counts with: bytes of layers and tables, names of parts and blocks, GPUs and their memory."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from llmint8.formats import BITSANDBYTES, NATIVE, KBit, TensorSpec
from llmint8.kernels.kbit.operands import KBitOperands
from llmint8.kernels.operands import Operands
from llmint8.runtime.layers.embedding import Int8Embedding
from llmint8.runtime.layers.kbit import KBitLinear
from llmint8.runtime.layers.layer import Int8Linear
from llmint8.runtime.placement.blocks import block_of, natural, unit_of
from llmint8.runtime.placement.gpus import COMMON, Gpu, card, parse_machine
from llmint8.runtime.placement.parts import Part, half_bytes, kbit_bytes, kind_of, layer_bytes, table_bytes
from llmint8.runtime.placement.plan import Plan
from llmint8.runtime.placement.sized import Sized
from llmint8.runtime.placement.split import Unit, split


def bytes_held(module: Any, more: tuple[Any, ...] = ()) -> int:
    """Return the bytes of what a module and its kernels read hold, what they share counted once."""
    tensors = [*module._parameters.values(), *module._buffers.values(), *more]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if isinstance(tensor, torch.Tensor) and tensor.numel()
    }
    return sum(storages.values())


@pytest.mark.parametrize(
    ("n", "k", "outliers", "group", "layout"),
    [
        (33, 300, 5, 128, BITSANDBYTES),
        (64, 128, 0, 128, BITSANDBYTES),
        (17, 96, 40, None, NATIVE),
    ],
    ids=lambda value: str(getattr(value, "major", value)),
)
def test_a_layer_holds_as_much_as_a_plan_says(n: int, k: int, outliers: int, group: Any, layout: Any) -> None:
    """The bytes of all that a layer and what its kernels read have in memory of their own, as on a GPU."""
    torch.manual_seed(0)
    layer = Int8Linear(k, n, bias=False, outlier_count=outliers, layout=layout, dtype=torch.float16)
    layer.configure(activation_group=group or "row")
    operands = Operands.prepare(layer.stored())
    assert bytes_held(layer, operands) == layer_bytes(n, k, outliers, layout, group).total


@pytest.mark.parametrize(
    ("n", "k", "outliers", "kbit"),
    [
        (33, 300, 5, KBit(4, "int", 64)),
        (16, 96, 0, KBit(3, "float", 32)),
        (17, 40, 40, KBit(5, "quantile", None)),
    ],
    ids=["int4", "float3", "quantile5"],
)
def test_a_layer_of_k_bits_holds_as_much_as_a_plan_says(n: int, k: int, outliers: int, kbit: KBit) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(k, n, bias=False).half()
    layer = KBitLinear.from_linear(linear, kbit, torch.arange(outliers))
    counted = kbit_bytes(n, k, outliers + 1000 * (outliers == k), kbit)  # a layer has no more columns than inputs
    assert bytes_held(layer, KBitOperands.prepare(layer.stored())) == counted.total  # type: ignore[arg-type]
    assert bytes_held(layer) == counted.total - counted.prepared
    assert layer.state_dict()["weight"].nbytes == counted.values
    columns = [layer.state_dict()[name] for name in ("outlier_dims", "outlier_weight")]
    assert sum(tensor.nbytes for tensor in columns) == counted.columns


def test_a_table_by_itself_has_nothing_prepared_and_one_with_a_head_has() -> None:
    table = Int8Embedding.in_place_of(nn.Embedding(50, 64), 0, layout=NATIVE, dtype=torch.float16)
    counted = layer_bytes(50, 64, 0, NATIVE, None)
    assert bytes_held(table) == table_bytes(counted, "only").total == counted.total - counted.prepared
    assert counted.prepared > 0
    assert table_bytes(counted, "too") == counted


def test_experts_that_are_multiplied_at_once_are_prepared_twice() -> None:
    alone, stacked = (layer_bytes(48, 64, 4, NATIVE, 64, stacked) for stacked in (False, True))
    assert stacked.prepared == 2 * alone.prepared
    assert stacked.total - stacked.prepared == alone.total - alone.prepared


def test_a_part_takes_what_it_is_stored_in() -> None:
    layer = layer_bytes(8, 64, 0, NATIVE, None)
    assert [Part("a", "a", "linear", 1024, 0, layer).taken(int8) for int8 in (True, False)] == [layer.total, 1024]
    assert [Part("a", "a", "norm", 128, 256).taken(int8) for int8 in (True, False)] == [256, 128]
    sizes = {dtype: half_bytes(TensorSpec("a", dtype, (3, 5))) for dtype in ("F32", "F16", "BF16", "I64", "U8")}
    assert sizes == {"F32": 30, "F16": 30, "BF16": 30, "I64": 120, "U8": 15}


def test_parts_go_by_their_module_and_where_there_is_none_by_their_names() -> None:
    model = nn.ModuleDict({"norm_head": nn.Linear(2, 2), "position": nn.LayerNorm(2), "head": nn.Embedding(2, 2)})
    model["act"], model["lm"] = nn.GELU(), nn.Linear(2, 2)
    of_model = {"norm_head": "kept", "position": "norm", "head": "embedding", "act": "rest", "lm": "head"}
    assert {name: kind_of(model, f"{name}.weight", {"lm"}) for name in of_model} == of_model
    by_name = {
        "model.embed_tokens.weight": "embedding",
        "transformer.wte.weight": "embedding",
        "transformer.wpe.weight": "embedding",
        "shared.weight": "embedding",
        "lm_head.weight": "head",
        "classifier.bias": "head",
        "score.weight": "head",
        "model.norm.weight": "norm",
        "h.0.ln_1.weight": "norm",
        "transformer.ln_f.bias": "norm",
        "h.0.mlp.weight": "rest",
        "model.kiln.weight": "rest",
    }
    assert {name: kind_of(None, name, set()) for name in by_name} == by_name
    assert {name: kind_of(model, f"not_there.{name}", set()) for name in by_name} == by_name


def test_blocks_are_whole_and_in_order() -> None:
    units = {
        "model.layers.3.mlp.up_proj.weight": "model.layers.3",
        "encoder.block.11.layer.0.SelfAttention.q.weight": "encoder.block.11",
        "h.0": "h.0",
        "lm_head.weight": "lm_head",
        "model.norm.weight": "model.norm",
        "logit_scale": "logit_scale",
    }
    assert {name: unit_of(name) for name in units} == units
    assert [block_of(name) for name in units] == ["model.layers.3", "encoder.block.11", "h.0", None, None, None]
    ordered = ["h.2", "h.2.ln", "h.10", "h.10.1", "h.10.a", "h.ln", "wte"]
    for names in itertools.permutations(ordered[:5]):
        assert sorted([*ordered[:4:-1], *names], key=natural) == ordered


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("24GB", [24 << 30]),
        ("2x1.5GB", [3 << 29] * 2),
        ("80G,16 GiB", [80 << 30, 16 << 30]),
        ("T4", [15_360 << 20]),
        ("V100,L4", [32_768 << 20, 23_034 << 20]),
    ],
)
def test_a_size_is_in_gib_and_a_card_has_what_it_shows(text: str, memory: list[int]) -> None:
    gpus = parse_machine(text)
    assert [gpu.memory for gpu in gpus] == memory
    for gpu in gpus:
        assert gpu.reserved == (1 << 29) + gpu.memory // 100


def test_a_card_has_what_it_is_sold_for_less_its_error_correction() -> None:
    for sold_as, names in COMMON:
        for name in names:
            assert 0.935 < card(name).memory / (sold_as << 30) <= 1, name  # it takes a sixteenth


def test_a_machine_has_a_thousand_gpus_at_most() -> None:
    assert len(parse_machine("1000x24GB,T4:23,T4")) == 1024
    for text in ("1025x24GB", "1000x24GB,25xT4", "T4:0", "24GB,", "", "x24GB", "24 GB GB", "8x24GB:2", "A100"):
        with pytest.raises(ValueError, match=r"^--gpu"):
            parse_machine(text)


UNITS = [Unit("a", 50, 0), *(Unit(f"b.{i}", 20, 3) for i in range(7)), Unit("c", 1, 0)]


@pytest.mark.parametrize(
    "rooms", [(100, 100, 100), (80, 80, 80), (60, 150), (30, 200, 30), (10, 10), (300,), (5, 5, 5, 5)]
)
def test_a_split_is_as_even_as_one_in_this_order_can_be(rooms: tuple[int, ...]) -> None:
    room_of = [Gpu("", room) for room in rooms]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gpu, "reserved", 0)
        shares = split(UNITS, room_of, 0)
        assert [unit for share in shares for unit in share.units] == UNITS
        loads = [share.weights + share.cache for share in shares]
        fullest = max(load / room for load, room in zip(loads, rooms, strict=True))
    best = float("inf")
    for cuts in itertools.combinations_with_replacement(range(len(UNITS) + 1), len(rooms) - 1):
        ends = [0, *cuts, len(UNITS)]
        sums = [sum(u.weights + u.cache for u in UNITS[a:b]) for a, b in itertools.pairwise(ends)]
        best = min(best, max(total / room for total, room in zip(sums, rooms, strict=True)))
    assert fullest == pytest.approx(best)


def test_what_fits_nowhere_is_all_on_the_first() -> None:
    first, second = split(UNITS, [Gpu("", 1 << 20), Gpu("", 0)], 7)
    assert (first.units, second.units) == (UNITS, [])
    assert (first.weights, first.cache, first.activations) == (191, 21, 7)
    assert first.room == (1 << 20) - first.gpu.reserved - 7
    assert first.free == first.room - 191 - 21


def test_every_kind_is_counted_with_what_belongs_to_its_layers() -> None:
    int8 = layer_bytes(8, 64, 4, NATIVE, 64)
    parts = [
        Part("e", "e", "embedding", 100, 200),
        Part("h.0.a", "h.0.a", "linear", 1024, 0, int8, 72),
        Part("h.0.b", "h.0.b", "linear", 1024, 0, int8, 72),
        Part("h.0.c", "h.0.c", "linear", 16, 16),  # a bias
        Part("n", "n", "norm", 6, 6),
        Part("head", "head", "head", 0, 0, twice=50),
    ]
    plan = Plan(Sized("m", "m", None, parts, 4, NATIVE), 10, 3)
    rows = {row["what"]: (row["half"], row["int8"]) for row in plan.by_kind()}
    assert rows == {
        "Linear layers": (2064, 2 * int8.values + 16),
        "- outlier columns": (0, 2 * int8.columns),
        "- scales of rows": (0, 2 * int8.scales),
        "- prepared on loading": (0, 2 * int8.prepared),
        "Embeddings": (100, 200),
        "Norms": (6, 6),
        "Output head": (0, 0),
    }
    assert (plan.taken(False), plan.taken(True)) == (2170, 2 * int8.total + 222)
    assert plan.on_disk == plan.taken(True) - 2 * int8.prepared + 50
    assert plan.sized.parameters == 2170 // 2
    assert plan.activations == 10 * 10 * 3 * 72
    assert [(unit.name, unit.weights) for unit in plan.units(False)] == [("e", 100), ("h.0", 2064), ("n", 6)]
    assert plan.notices == [
        "its config does not say what keys and values, or states in their place, take: none are counted"
    ]


WIDTH, BLOCK_BYTES = 1 << 14, 3 << 28


@pytest.fixture
def blocks_alone() -> Sized:
    """Twenty blocks of 768 MiB in 16 bit, stored in half of that, of a model that transformers does not know."""
    return some_blocks(20)


def some_blocks(count: int) -> Sized:
    places = [f"h.{number}.w" for number in range(count)]
    return Sized(
        "m", "m", None, [Part(p, p, "kept", BLOCK_BYTES, BLOCK_BYTES // 2, None, WIDTH) for p in places], 0, NATIVE
    )


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("limit", [None, 500])
def test_the_longest_context_is_the_last_that_fits_or_all_that_there_is(
    blocks_alone: Sized, batch: int, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations are all that grows here: five times the widest layer's, in 16 bit."""
    monkeypatch.setattr("llmint8.runtime.placement.plan.most_tokens", lambda model: limit)
    plan = Plan(blocks_alone, 1, batch)
    assert (plan.taken(False), plan.taken(True)) == (20 * BLOCK_BYTES, 10 * BLOCK_BYTES)
    for text in ("24GB", "8GB", "2xT4"):
        gpus = parse_machine(text)
        for int8 in (False, True):
            blocks = -(-20 // len(gpus)) * (BLOCK_BYTES // 2 if int8 else BLOCK_BYTES)
            room = gpus[0].memory - gpus[0].reserved - blocks
            expected = max(0, room // (10 * batch * WIDTH))
            assert plan.longest_context(gpus, int8) == (expected if limit is None else min(limit, expected)), text
    assert plan.longest_context(parse_machine("9000GB"), True) == (limit or 1 << 24)  # more is not looked for


@pytest.mark.parametrize("count", [16, 17, 20])
def test_the_smallest_set_is_looked_for_among_sixteen(count: int) -> None:
    """Of all blocks a GPU holds as many as fit into what it has left."""
    sized = some_blocks(count)
    for context, memory in itertools.product((1, 4096, 1 << 16), (0.5, 1, 1.5, 2, 2.5, 3, 24)):
        plan = Plan(sized, context, 1)
        (gpu,) = parse_machine(f"{memory}GB")
        for int8 in (False, True):
            each = (gpu.memory - gpu.reserved - 10 * context * WIDTH) // (BLOCK_BYTES // 2 if int8 else BLOCK_BYTES)
            expected = -(-count // each) if each > 0 else 17
            assert plan.smallest(gpu, int8) == (expected if expected <= 16 else None), (context, memory)
    full = Plan(sized, 4096, 1)
    about = round((full.activations + (1 << 29)) / 0.99)
    memory = next(m for m in range(about - 3, about + 3) if m - Gpu("", m).reserved == full.activations)
    assert full.smallest(Gpu("", memory), True) is None  # nothing is left


def test_the_smallest_sets_are_of_cards_by_their_memory(blocks_alone: Sized) -> None:
    found = {
        name: (one["int8"], one["half"]) for one in Plan(blocks_alone, 1, 1).smallest_sets() for name in one["gpus"]
    }
    assert found == dict.fromkeys(found, (1, 1)) | {"T4": (1, 2)}
