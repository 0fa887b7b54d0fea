"""What sources are put together from: rows and pieces of tensors, models in memory, names of files, packed weights."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from llmint8.formats import CorruptFileError, SourceError, open_source, source_in_memory
from llmint8.formats.containers import tensors as containers
from llmint8.formats.containers.tensors import TensorInfo, as_bytes, is_shape, is_tensor_name, read_blocks
from llmint8.formats.disk.lending import OpenFiles
from llmint8.formats.disk.reading import open_regular
from llmint8.formats.sources.dequantized import stored_weights
from llmint8.formats.sources.metaseq.config import derive_config
from llmint8.formats.sources.metaseq.merged import Merged, merge
from llmint8.formats.sources.metaseq.names import metaseq_files
from llmint8.formats.sources.metaseq.parts import _parse
from llmint8.formats.sources.metaseq.pieces import Extent, Piece, joined
from llmint8.formats.sources.metaseq.tokenizer import tokenizer_files
from llmint8.formats.sources.packed import packed_weights
from llmint8.formats.sources.tiles import has_tiles, layout_name

# Rows.


def test_rows_and_blocks_of_a_tensor_are_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(42, dtype=torch.int16).reshape(7, 3, 2)
    (tmp_path / "x").write_bytes(b"12345" + bytes(as_bytes(tensor)))
    info = TensorInfo("t", "I16", (7, 3, 2), "x", 5)
    assert info.rows(2, 5) == TensorInfo("t", "I16", (3, 3, 2), "x", 5 + 2 * 12)
    for block_bytes, sizes in ((1, [1] * 7), (12, [1] * 7), (24, [2, 2, 2, 1]), (83, [6, 1]), (84, [7]), (1000, [7])):
        monkeypatch.setattr(containers, "BLOCK_BYTES", block_bytes)
        with open_regular(tmp_path / "x") as file:
            blocks = list(read_blocks(file, tmp_path / "x", info))
        assert [len(block) for block in blocks] == sizes
        assert torch.equal(torch.cat(blocks), tensor)
    scalar = TensorInfo("s", "F32", (), "x", 5)
    assert scalar.blocks() == [scalar]
    for shape in ((0, 3), (3, 0)):
        assert sum(block.shape[0] for block in TensorInfo("e", "F32", shape, "x", 5).blocks()) == shape[0]


@pytest.mark.parametrize(
    ("value", "right"),
    [
        ([], True),
        ([0], True),
        ([2**63 - 1], True),
        ([2**63], False),
        ([2**62, 2], False),
        ([2**62, 0, 2], False),
        ([2**31, 2**31], True),
        ([1] * 64, True),
        ([1] * 65, False),
        ([-1], False),
        ([True], False),
        ((1,), False),
    ],
)
def test_what_is_a_shape(value: Any, right: bool) -> None:
    assert is_shape(value) == right


@pytest.mark.parametrize(
    ("name", "right"), [("a", True), ("a" * 1024, True), ("a" * 1025, False), ("", False), (1, False)]
)
def test_what_is_a_name(name: Any, right: bool) -> None:
    assert is_tensor_name(name) == right


# Sources: stacks in parts, and in memory.


def stack_source(tmp_path: Path, kind: str) -> tuple[Any, Tensor]:
    stack = torch.arange(24.0).reshape(3, 2, 4)
    if kind == "memory":
        return source_in_memory("model", {"a": 1}, {"x": torch.ones(2), "m.stack": stack}, TemporaryDirectory()), stack
    (tmp_path / "config.json").write_text("{}")
    if kind == "bin":
        torch.save({"m.stack": stack}, tmp_path / "pytorch_model.bin")
    else:
        safetensors.torch.save_file({"x": torch.ones(2), "m.stack": stack}, tmp_path / "model.safetensors")
    return open_source(tmp_path), stack


@pytest.mark.parametrize("kind", ["safetensors", "memory", "bin"])
def test_a_stack_is_read_in_parts_and_put_together_again(tmp_path: Path, kind: str) -> None:
    source, stack = stack_source(tmp_path, kind)
    before = dict(source.tensors)
    parts = source.parts("m.stack")
    if kind == "bin":
        assert parts == []
        return
    assert [(part.name, part.shape) for part in parts] == [(f"m.stack.{number}", (2, 4)) for number in range(3)]
    source.split(["m.stack"])
    assert source.tensors.keys() == {"x", "m.stack.0", "m.stack.1", "m.stack.2"}
    for number in range(3):
        assert torch.equal(source.read(f"m.stack.{number}"), stack[number])
        assert torch.equal(torch.cat(list(source.read_rows(f"m.stack.{number}"))), stack[number])
    source.join(["m.stack"])
    assert source.tensors == before
    assert torch.equal(source.read("m.stack"), stack)
    assert source.in_blocks("m.stack")


def test_a_model_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "BLOCK_BYTES", 16)
    (tmp_path / "beside").mkdir()
    beside = TemporaryDirectory()
    (Path(beside.name) / "tokenizer.json").touch()
    held = {
        "a": torch.arange(12.0).reshape(4, 3).t(),
        "s": torch.tensor(1.5),
        "e": torch.ones(0, 3),
        "z": torch.ones(3, 0),
    }
    source = source_in_memory("model", {"k": 1}, dict(held), beside)
    assert (source.path, source.config, source.beside) == (Path("model"), {"k": 1}, Path(beside.name))
    assert [file.name for file in source.small_files] == ["tokenizer.json"]
    assert source.stored == {}
    assert source.differences == []
    for name, tensor in held.items():
        assert (source.tensors[name].dtype, source.tensors[name].shape) == ("F32", tuple(tensor.shape))
        assert torch.equal(source.read(name), tensor)
        assert source.read(name).is_contiguous()
        blocks = list(source.read_rows(name))
        assert torch.equal(torch.cat(blocks) if tensor.ndim else blocks[0], tensor)
    assert [len(block) for block in source.read_rows("a")] == [1, 1, 1]
    assert source.tensors["s"].offset == 48
    assert not source.read("a").requires_grad
    source.release("a")
    source.release("a")
    with pytest.raises((KeyError, ValueError)):
        source.read("a")
    for tensor, message in (
        (torch.ones(2, device="meta"), "x: on the meta device, it has no numbers"),
        (torch.ones(2, dtype=torch.complex128), "x: is torch.complex128, which no checkpoint holds"),
    ):
        with pytest.raises(SourceError, match=message):
            source_in_memory("model", {}, {"x": tensor}, beside)


# Pieces of metaseq.


def piece_of(tmp_path: Path, tensor: Tensor, cuts: list[int], name: str = "p") -> Piece:
    """Lay a float16 tensor out over files, cut at these elements, with other bytes around."""
    raw, ends, extents = bytes(as_bytes(tensor.half().contiguous())), [*cuts, tensor.numel()], []
    for number, (start, end) in enumerate(zip([0, *cuts], ends, strict=True)):
        path = tmp_path / f"{name}{number}"
        path.write_bytes(b"#" * (3 + number) + raw[2 * start : 2 * end] + b"#")
        extents.append(Extent(path, 3 + number, 2 * (end - start)))
    return Piece("F16", tuple(tensor.shape), joined("F16", extents).extents)


def read(piece: Piece) -> Tensor:
    found = torch.full(piece.shape, 7.0, dtype=torch.float16)
    piece.read(OpenFiles(open_regular), "t", as_bytes(found))
    return found


@pytest.mark.parametrize("cuts", [[], [5], [4, 8, 12], [1, 1, 19], [0, 20]])
def test_any_part_of_pieces_is_read(tmp_path: Path, cuts: list[int]) -> None:
    whole = torch.arange(20.0).reshape(5, 4)
    piece = piece_of(tmp_path, whole, cuts)
    assert piece.nbytes == 40
    assert torch.equal(read(piece), whole.half())
    for start in range(6):
        for stop in range(start, 6):
            rows = piece.rows(start, stop)
            assert torch.equal(read(rows), whole[start:stop].half())
            assert sum(extent.nbytes for extent in rows.extents) == rows.nbytes
            assert all(extent.nbytes for extent in rows.extents)
    part = piece.part(3, (2, 5)).rows(1, 2)
    assert read(part).tolist() == [[8, 9, 10, 11, 12]]
    flat = joined("F16", piece.extents)
    assert flat.shape == (20,)


@pytest.mark.parametrize("dim", [0, 1])
def test_rows_of_what_is_merged_are_those_of_the_whole(tmp_path: Path, dim: int) -> None:
    parts = [torch.arange(12.0).reshape(3, 4), -torch.arange(12.0).reshape(3, 4)]
    pieces = tuple(piece_of(tmp_path, part, [5], f"q{number}") for number, part in enumerate(parts))
    whole = torch.cat(parts, dim).half()
    merged = Merged(pieces, dim, copies=(Merged(pieces, dim),), tied=True)
    assert (merged.dtype, merged.shape) == ("F16", tuple(whole.shape))
    for start in range(len(whole)):
        for stop in range(start + 1, len(whole) + 1):
            rows = merged.rows(start, stop)
            assert rows.shape == tuple(whole[start:stop].shape)
            assert torch.equal(torch.cat([read(piece) for piece in rows.pieces], dim), whole[start:stop])
            assert (rows.copies[0].shape, rows.tied, rows.dim) == (rows.shape, True, dim)
            assert all(piece.shape[0] for piece in rows.pieces)


def flat(*shape: int, dtype: str = "F16") -> Piece:
    return Piece(dtype, shape, ())


EMBEDDING = {"decoder.embed_tokens.weight": flat(4, 8)}


def test_names_and_parts_become_those_of_transformers() -> None:
    part = {
        **EMBEDDING,
        "decoder.version": flat(1),
        "decoder.embed_positions._float_tensor": flat(1),
        "decoder.layer_norm.bias": flat(8),
        "decoder.project_in_dim.weight": flat(8, 8),
        "decoder.layers.10.fc2.weight": flat(8, 6),
        "decoder.layers.2.fc1.bias": flat(6),
        "decoder.layers.2.self_attn.qkv_proj.weight": flat(12, 8),
        "decoder.layers.2.self_attn.out_proj.bias": flat(8),
    }
    found = merge(Path("x"), [part, part])
    assert {name: (merged.shape, len(merged.copies)) for name, merged in found.items()} == {
        "model.decoder.embed_tokens.weight": ((8, 8), 0),
        "model.decoder.final_layer_norm.bias": ((8,), 1),
        "model.decoder.layers.2.fc1.bias": ((12,), 0),
        "model.decoder.layers.2.self_attn.k_proj.weight": ((8, 8), 0),
        "model.decoder.layers.2.self_attn.out_proj.bias": ((8,), 1),
        "model.decoder.layers.2.self_attn.q_proj.weight": ((8, 8), 0),
        "model.decoder.layers.2.self_attn.v_proj.weight": ((8, 8), 0),
        "model.decoder.layers.10.fc2.weight": ((8, 12), 0),
        "model.decoder.project_in.weight": ((8, 8), 1),
    }
    assert list(found) == [
        *list(found)[:2],
        *(name for name in found if ".layers.2." in name),
        "model.decoder.layers.10.fc2.weight",
        "model.decoder.project_in.weight",
    ]
    # One file for both is no second tensor; another must be of the same size.
    assert not merge(
        Path("x"), [{**EMBEDDING, "decoder.output_projection.weight": EMBEDDING["decoder.embed_tokens.weight"]}]
    )["model.decoder.embed_tokens.weight"].copies


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{}], "decoder.embed_tokens.weight: missing"),
        ([{**EMBEDDING, "decoder.x": flat(1)}], "decoder.x: not a tensor of OPT"),
        ([{**EMBEDDING, "decoder.layers.0.self_attn.qkv_proj.bias": flat(7)}], "qkv_proj.bias: 7 rows, expected three"),
        ([EMBEDDING, {}], "embed_tokens.weight: in 1 of 2 model parts"),
        (
            [{**EMBEDDING, "decoder.layers.0.fc2.weight": flat(8)}],
            r"fc2.weight: in 1 of 1 model parts, with shape \[8\]",
        ),
        ([{"decoder.embed_tokens.weight": flat()}], r"embed_tokens.weight: in 1 of 1 model parts, with shape \[\]"),
        ([EMBEDDING, {"decoder.embed_tokens.weight": flat(4, 9)}], r"\[4, 9\] in model part 1, F16 \[4, 8\] in part 0"),
        ([EMBEDDING, {"decoder.embed_tokens.weight": flat(4, 8, dtype="F32")}], r"F32 \[4, 8\] in model part 1"),
        ([EMBEDDING, {**EMBEDDING, "decoder.layers.0.fc1.bias": flat(1)}], "fc1.bias: not in model part 0"),
        (
            [{**EMBEDDING, "decoder.output_projection.weight": flat(4, 9)}],
            r"output_projection.weight: \[4, 9\], the embedd",
        ),
        ([{**EMBEDDING, "decoder.output_projection.weight": flat(4, 8, dtype="F32")}], "output_projection.weight"),
    ],
)
def test_parts_that_are_not_of_one_model(parts: list[dict[str, Piece]], message: str) -> None:
    with pytest.raises(SourceError, match=f"^x: .*{message}"):
        merge(Path("x"), parts)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x.pt", "notes.txt", "part-0.pt"], None),
        (["reshard.pt"], ("reshard.pt", [["reshard.pt"]])),
        (["checkpoint_last.pt", "other.pt"], ("checkpoint_last.pt", [["checkpoint_last.pt"]])),
        (["opt_consolidated.pt"], ("opt_consolidated.pt", [["opt_consolidated.pt"]])),
        (["a-shard0.pt", "a-shard1.pt"], ("a-shard*.pt", [["a-shard0.pt", "a-shard1.pt"]])),
        (
            ["a-model_part-1.pt", "a-model_part-0.pt"],
            ("a-model_part-*.pt", [["a-model_part-0.pt"], ["a-model_part-1.pt"]]),
        ),
        (["reshard.pt", "model.safetensors"], None),
        (["reshard.pt", "restored.pt"], r"several checkpoints: reshard.pt \(1\); restored.pt \(1\)"),
        (["a-shard0.pt", "a-shard00.pt"], "a-shard0.pt and a-shard00.pt are the same part"),
        (["a-shard0.pt", "a-shard2.pt"], "a-shard1.pt is missing: 2 of 3 are there"),
        (["a-shard3.pt"], "a-shard0.pt, a-shard1.pt, a-shard2.pt are missing: 1 of 4"),
        (["a-shard5.pt"], "a-shard0.pt, a-shard1.pt, a-shard2.pt and 2 more are missing: 1 of 6"),
        (
            ["a-model_part-1-shard1.pt"],
            "a-model_part-0-shard0.pt, .*part-0-shard1.pt, .*part-1-shard0.pt are missing: 1 of 4",
        ),
    ],
)
def test_which_files_are_a_checkpoint_of_metaseq(tmp_path: Path, names: list[str], expected: Any) -> None:
    for name in names:
        (tmp_path / name).touch()
    if isinstance(expected, str):
        with pytest.raises(SourceError, match=expected):
            metaseq_files(tmp_path)
        return
    found = metaseq_files(tmp_path)
    assert (found and (found.pattern, found.parts)) == expected


def opt(hidden: int = 96, layers: int = 2, dtype: str = "F16", **more: tuple[int, ...]) -> dict[str, TensorInfo]:
    shapes = {"embed_tokens.weight": (50, 32), "embed_positions.weight": (18, hidden)}
    for number in range(layers):
        shapes[f"layers.{number}.self_attn.out_proj.weight"] = (hidden, hidden)
        shapes[f"layers.{number}.fc1.weight"] = (200, hidden)
    return {
        f"model.decoder.{name}": TensorInfo(name, dtype, shape, "", 0)
        for name, shape in (shapes | more).items()
        if shape
    }


def test_the_config_says_what_the_tensors_do() -> None:
    config, notices = derive_config(Path("x"), opt(), {"activation_fn": "gelu", "decoder_attention_heads": 8})
    assert not notices
    told = {
        "activation_function": "gelu",
        "num_attention_heads": 8,
        "do_layer_norm_before": False,
        "enable_bias": False,
    }
    told |= {"dtype": "float16", "ffn_dim": 200, "hidden_size": 96, "layer_norm_elementwise_affine": False}
    told |= {"max_position_embeddings": 16, "num_hidden_layers": 2, "vocab_size": 50, "word_embed_proj_dim": 32}
    told |= {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    assert told.items() <= config.items()
    more: dict[str, Any] = {"final_layer_norm.weight": (96,), "layers.0.fc1.bias": (200,)}
    more["layers.0.self_attn_layer_norm.weight"] = (96,)
    config, _ = derive_config(Path("x"), opt(dtype="BF16", **more), {})
    assert (config["activation_function"], config["dtype"]) == ("relu", "bfloat16")
    assert config["do_layer_norm_before"] is config["enable_bias"] is config["layer_norm_elementwise_affine"] is True


@pytest.mark.parametrize(
    ("hidden", "said", "heads", "guessed"),
    [
        (96, 8, 8, False),
        (96, 7, 1, True),
        (96, 0, 1, True),
        (96, -8, 1, True),
        (96, "8", 1, True),
        (128, None, 2, True),
        (64, None, 1, True),
        (100, None, 1, True),
        (768, None, 12, False),
        (768, 24, 24, False),
        (96, 96, 96, False),
    ],
)
def test_how_many_heads_there_are(hidden: int, said: Any, heads: int, guessed: bool) -> None:
    config, notices = derive_config(Path("x"), opt(hidden), {"decoder_attention_heads": said})
    assert config["num_attention_heads"] == heads
    assert [notice.startswith(f"num_attention_heads is taken to be {heads}, for") for notice in notices] == [
        True
    ] * guessed


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (opt(layers=0), "decoder.layers.0: missing; there are 0 layers"),
        (opt(**{"embed_tokens.weight": (5,)}), "decoder.embed_tokens.weight: missing, or of another shape"),
        (opt(**{"embed_positions.weight": ()}), "decoder.embed_positions.weight: missing"),
        (
            opt(**{"layers.1.self_attn.out_proj.weight": (96, 48)}),
            r"decoder.layers.1.self_attn.out_proj.weight has 48 of 96 columns",
        ),
        (opt(**{"layers.3.self_attn.out_proj.weight": (96, 96)}), "decoder.layers.2: missing; there are 3 layers"),
    ],
)
def test_a_config_that_cannot_be_derived(tensors: dict[str, TensorInfo], message: str) -> None:
    with pytest.raises(SourceError, match=f"^x: {message}"):
        derive_config(Path("x"), tensors, {})


SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"vocab.json": "{}"}, ([], [], "")),
        ({"tokenizer.json": "{}", "gpt2-unified.json": "{}"}, ([], [], "")),
        ({"gpt2-unified.json": '{"a": 1}'}, (["tokenizer.json", "tokenizer_config.json"], {"a": 1}, "")),
        ({}, ([], [], "no tokenizer goes along: gpt2-vocab.json and gpt2-merges.txt of metaseq's")),
        (
            {"gpt2-vocab.json": "{}", "gpt2-merges.txt": ""},
            ([], [], "does not begin with <s>, <pad>, </s>, <unk>, and there"),
        ),
        (
            {"gpt2-vocab.json": json.dumps({**SPECIAL, "a": 4}), "gpt2-merges.txt": "m"},
            (["merges.txt", "tokenizer_config.json", "vocab.json"], {**SPECIAL, "a": 4}, ""),
        ),
        (
            {"gpt2-vocab.json": '{"a": 0, "b c": 1}', "gpt2-merges.txt": "m", "dict.txt": "1 9\n0 8\nmadeup 0\n"},
            (["merges.txt", "tokenizer_config.json", "vocab.json"], {**SPECIAL, "b c": 4, "a": 5, "madeup": 6}, ""),
        ),
        (
            {"gpt2-vocab.json": '{"a": 0}', "gpt2-merges.txt": "", "dict.txt": "0 9\na 8\n"},
            "line 2 is 'a 8', expected a new",
        ),
        (
            {"gpt2-vocab.json": '{"a": 0}', "gpt2-merges.txt": "", "dict.txt": "0 9\n8\n"},
            "line 2 is '8', expected a new",
        ),
        ({"gpt2-vocab.json": '{"a": 0}', "gpt2-merges.txt": "", "dict.txt": "<s> 9\n"}, "line 1 is '<s> 9'"),
        ({"gpt2-vocab.json": '{"a": 0}', "gpt2-merges.txt": "", "dict.txt": b"\xff 9\n"}, "dict.txt: not a text file"),
    ],
)
def test_the_tokenizer_that_is_made(tmp_path: Path, files: dict[str, Any], expected: Any) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(expected, str):
        with pytest.raises(CorruptFileError, match=expected):
            tokenizer_files(tmp_path)
        return
    names, vocabulary, notice = expected
    made, used, notices = tokenizer_files(tmp_path)
    assert sorted(made) == names
    assert notice in "".join(notices)
    assert len(notices) == bool(notice)
    if names:
        assert made.get("vocab.json", made.get("tokenizer.json")) == vocabulary
        assert made.get("merges.txt", "m") == "m"
        assert (made["tokenizer_config.json"]["add_bos_token"], made["tokenizer_config.json"]["add_prefix_space"]) == (
            True,
            False,
        )
        assert {"gpt2-vocab.json", "gpt2-merges.txt", "dict.txt"} <= used
        assert ("gpt2-unified.json" in used) == ("gpt2-unified.json" in files)


def parsed(state: Any) -> Any:
    import pickle

    return _parse(pickle.dumps(state, protocol=2))


def unit(**changes: Any) -> dict[str, Any]:
    params = {"names": ["a", "_fsdp_wrapped_module.b"], "shapes": [[2, 3], [4]], "padding": 1} | changes
    return {"param_metadata": [{"fsdp_path": "m._fpw_module.x", "params": {"flat": params}}]}


def test_what_a_part_says_of_its_flat_parameters() -> None:
    assert parsed([1]) is parsed({"model": 3}) is None
    state = {"model": {"a": 1}, "shard_metadata": unit(), "args": [{"num_updates": 5}, {"activation_fn": "relu"}]}
    state |= {"last_optimizer_state": {"num_updates": 9}, "x": {"decoder_attention_heads": True, "other": 2}}
    content = parsed(state)
    assert (content.model, content.padding) == ({"a": 1}, {"m.x.flat": 1})
    assert content.values == {"num_updates": 5, "activation_fn": "relu"}
    assert (content.units["m.x.flat"].names, content.units["m.x.flat"].numel) == (("m.x.a", "m.x.b"), 10)
    at_the_top = parsed(
        {"model": {}, "shard_metadata": {"param_metadata": [{**unit()["param_metadata"][0], "fsdp_path": ""}]}}
    )
    assert list(at_the_top.units) == ["flat"]
    itself: list[Any] = [{"num_updates": "7"}]
    itself.append(itself)
    assert parsed({"model": {}, "args": itself}).values == {"num_updates": "7"}


@pytest.mark.parametrize(
    "metadata",
    [
        *(
            unit(**{key: value})
            for key, value in (("names", ["a"]), ("names", ["a", "\x1b"]), ("padding", 1.0), ("padding", None))
        ),
        *(unit(shapes=[shape, [4]]) for shape in ([-1], [2**40], [True], 3, "23")),
        *({"param_metadata": value} for value in (None, [3], [{}], [{"fsdp_path": "", "params": []}])),
        [3],
        {},
    ],
)
def test_metadata_of_something_else(metadata: Any) -> None:
    with pytest.raises(ValueError, match=r"^shard_metadata is not fairscale's: "):
        parsed({"model": {}, "shard_metadata": metadata})


# Quantized weights.


def infos(**shapes: Any) -> dict[str, TensorInfo]:
    """Tensors of a layer by their suffixes: a shape, or a dtype and a shape."""
    return {
        f"m.{name}": TensorInfo(f"m.{name}", *(value if isinstance(value[0], str) else ("I32", value)), "x", 0)  # type: ignore[misc]
        for name, value in shapes.items()
    }


def scales(*shape: int) -> tuple[str, tuple[int, ...]]:
    return ("F16", shape)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (infos(qweight=(8, 32), qzeros=(4, 4), scales=scales(4, 32)), (4, 0, (32, 64), 1)),
        (infos(qweight=(8, 32), qzeros=(4, 8), scales=scales(4, 32)), (8, 0, (32, 32), 1)),
        (infos(qweight=(8, 32), qzeros=(4, 2), scales=scales(4, 32)), (2, 0, (32, 128), 1)),
        (infos(qweight=(8, 32), qzeros=(4, 4), scales=scales(4, 32), g_idx=(64,)), (4, 0, (32, 64), 1)),
        (infos(qweight=(64, 4), qzeros=(4, 4), scales=scales(4, 32)), (4, 1, (32, 64), 0)),
        (infos(qweight=(8, 32), qzeros=(4, 4), scales=scales(4, 32), g_idx=(63,)), None),
        (infos(qweight=(64, 4), qzeros=(4, 4), scales=scales(4, 32), g_idx=(64,)), None),
        (infos(qweight=(63, 4), qzeros=(4, 4), scales=scales(4, 32)), None),
        (infos(qweight=(8, 32), qzeros=(3, 4), scales=scales(3, 32)), None),
        (infos(qweight=(8, 32), qzeros=(5, 4), scales=scales(4, 32)), None),
        (infos(qweight=(8, 36), qzeros=(4, 4), scales=scales(4, 36)), None),
        (infos(qweight=(64, 8), qzeros=(4, 8), scales=scales(4, 32)), None),
        (infos(qweight=(8, 32), qzeros=(0, 4), scales=scales(0, 32)), None),
        (infos(qweight=(8, 32), qzeros=("F16", (4, 4)), scales=scales(4, 32)), None),
        (infos(qweight=(8, 32, 1), qzeros=(4, 4), scales=scales(4, 32)), None),
    ],
)
def test_the_layout_of_packed_weights_is_told_from_their_shapes(tensors: dict[str, TensorInfo], expected: Any) -> None:
    if expected is None:
        with pytest.raises(
            SourceError, match=r"x: m\.qweight is .* known are GPTQ and AWQ \(gemm\) of 2, 4 and 8 bits"
        ):
            packed_weights(Path(), tensors, None)
        return
    (found,) = packed_weights(Path(), tensors, {"checkpoint_format": "gptq"}).values()
    assert (found.bits, found.along, found.info.shape, found.added) == expected
    assert (found.info.name, found.info.dtype, set(found.tensors)) == ("m.weight", "F32", set(tensors))
    second = packed_weights(Path(), tensors, {"checkpoint_format": "gptq_v2"})["m.weight"]
    assert second.added == 0
    for without in ("qzeros", "scales"):
        assert not packed_weights(Path(), {n: i for n, i in tensors.items() if not n.endswith(without)}, None)


@pytest.mark.parametrize(
    ("tensors", "block"),
    [
        (infos(weight=("I8", (6, 8)), SCB=("F32", (6,))), (1, 8)),
        (infos(weight=("I8", (6, 8)), weight_scale=("F32", ())), (6, 8)),
        (infos(weight=("I8", (6, 8)), weight_scale=("F32", (1,))), (6, 8)),
        (infos(weight=("F8_E4M3", (6, 8)), weight_scale=scales(6, 1)), (1, 8)),
        (infos(weight=("F8_E5M2", (6, 8)), weight_scale=scales(6, 4)), (1, 2)),
        (infos(weight=("F8_E4M3", (200, 136)), weight_scale_inv=scales(2, 2)), (128, 128)),
        (infos(weight=("F8_E4M3", (256, 100)), weight_scale_inv=scales(2, 1)), (128, 100)),
        (infos(weight=("I8", (6, 8)), SCB=scales(6), weight_scale=scales(2, 2)), (1, 8)),
        (infos(weight=("F8_E4M3", (200, 136)), weight_scale=scales(2, 3)), None),
        (infos(weight=("I8", (6, 8)), SCB=("F32", (5,))), None),
        (infos(weight=("I8", (6, 8)), weight_scale=("F32", (6, 1, 1))), None),
        (infos(weight=("I8", (6, 8)), weight_scale=("I32", (6, 1))), None),
        (infos(weight=("I8", (0, 8)), weight_scale=scales(1)), None),
        (infos(weight=("I8", (6, 0)), weight_scale=scales(6, 1)), None),
        (infos(weight=("I8", (6, 8)), weight_scale=scales(6, 0)), None),
        (infos(weight=("F8_E4M3", (200, 136)), weight_scale_inv=scales(3, 2)), None),
    ],
)
def test_for_which_block_of_a_weight_a_scale_is(tensors: dict[str, TensorInfo], block: tuple[int, int] | None) -> None:
    if block is None:
        with pytest.raises(SourceError, match=r"known are scales for a tensor, a row, a group of a row, and a block"):
            stored_weights(Path(), tensors, None)
        return
    (found,) = stored_weights(Path(), tensors, None).values()
    assert found.block == block  # type: ignore[union-attr]
    assert found.info.shape == tensors["m.weight"].shape
    assert found.info.dtype == "F32"
    for ours in ("outlier_dims", "outlier_weight", "absmax"):
        assert stored_weights(Path(), tensors | infos(**{ours: (1,)}), None) == {}


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (torch.tensor(0), "row"),
        (torch.tensor([2], dtype=torch.uint8), "col_turing"),
        (torch.tensor(3), "col_ampere"),
        (torch.tensor(4), "4"),
        (torch.tensor(-1), "-1"),
        (torch.tensor([1, 2]), "-1"),
        (torch.tensor([*b"row\0\0"], dtype=torch.int8), "row"),
    ],
)
def test_what_a_layout_is_called(value: Tensor, name: str) -> None:
    assert layout_name(value) == name


def test_which_shapes_are_tiles() -> None:
    right: Callable[..., bool] = has_tiles
    assert [right((64, 64), rows, "col_ampere") for rows in (32, 33, 64, 65)] == [False, True, True, False]
    assert [right((16, 64), rows, "col_turing") for rows in (8, 9, 16, 17)] == [False, True, True, False]
    assert not right((64, 48), 64, "col_ampere")
    assert not right((64, 64), 64, "row")
