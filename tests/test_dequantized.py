"""Sources that are stored in 8 bits: what is read of them, what a conversion makes of it, and what is refused."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmint8 import converter, runtime
from llmint8.converter.conversion.comparison import compare_with_source
from llmint8.formats import SourceError, open_checkpoint, open_source, read_manifest
from llmint8.formats.containers import tensors as containers
from llmint8.kernels.reference import dequantize_weight, quantize_weight
from llmint8.runtime.accuracy.compare import load_reference
from llmint8.runtime.commands.main import main

# 200 and 136 are no multiples of the blocks of 128.
SIZES = {"vocab_size": 96, "hidden_size": 136, "intermediate_size": 200, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 34, "max_position_embeddings": 64}
Stored = dict[str, Tensor]  # suffix -> tensor


def bitsandbytes(weight: Tensor) -> tuple[Stored, Tensor]:
    values, absmax = quantize_weight(weight)
    stored = {"weight": values, "SCB": absmax, "weight_format": torch.zeros((), dtype=torch.uint8)}
    return stored, dequantize_weight(values, absmax)


def int8_channel(weight: Tensor) -> tuple[Stored, Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    values = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": values, "weight_scale": scale}, values.float() * scale.float()


def int8_group_with_zero_points(weight: Tensor) -> tuple[Stored, Tensor]:
    grouped = weight.view(len(weight), -1, 8)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale, zero = (high - low) / 255, (-128 - low / ((high - low) / 255)).round()
    values = (grouped / scale[..., None] + zero[..., None]).round().clamp(-128, 127)
    restored = (values - zero[..., None]) * scale[..., None]
    stored = {"weight": values.view_as(weight).to(torch.int8), "weight_scale": scale}
    return {**stored, "weight_zero_point": zero.to(torch.int8)}, restored.view_as(weight)


def float8_tensor(weight: Tensor) -> tuple[Stored, Tensor]:
    scale = weight.abs().max().reshape(1) / 448
    values = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale, "input_scale": torch.ones(1)}, values.float() * scale


def float8_blocks(weight: Tensor) -> tuple[Stored, Tensor]:
    n, k = (-(-size // 128) for size in weight.shape)
    scale, values, restored = torch.empty(n, k), weight.to(torch.float8_e4m3fn), torch.empty_like(weight)
    for i in range(n):
        for j in range(k):
            place = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale[i, j] = weight[place].abs().max() / 448
            values[place] = (weight[place] / scale[i, j]).to(torch.float8_e4m3fn)
            restored[place] = values[place].float() * scale[i, j]
    return {"weight": values, "weight_scale_inv": scale}, restored


def gptq(weight: Tensor, added: int = 1, bits: int = 4) -> tuple[Stored, Tensor]:
    """Groups of 8 rows of [K, N] in another order than they stand, as `desc_act` leaves them."""
    rows, pack = weight.t().contiguous(), 32 // bits
    k, n = rows.shape
    group = torch.randperm(k, generator=torch.Generator().manual_seed(1)) // 8
    scale, zero = torch.empty(k // 8, n), torch.empty(k // 8, n, dtype=torch.int64)
    for number in range(k // 8):
        low, high = rows[group == number].amin(0).clamp(max=0), rows[group == number].amax(0).clamp(min=0)
        scale[number] = ((high - low) / (2**bits - 1)).half()
        zero[number] = (-low / scale[number]).round().clamp(added, 2**bits - 1)
    values = (rows / scale[group] + zero[group]).round().clamp(0, 2**bits - 1).long()
    stored = {
        "qweight": words(values.view(-1, pack, n), 1, range(pack), bits),
        "qzeros": words((zero - added).view(k // 8, -1, pack), 2, range(pack), bits),
        "scales": scale.half(),
        "g_idx": group.int(),
    }
    return stored, ((values - zero[group]).float() * scale[group]).t()


def awq(weight: Tensor) -> tuple[Stored, Tensor]:
    rows = weight.t().contiguous()
    k, n = rows.shape
    grouped = rows.view(-1, 8, n)
    low, high = grouped.amin(1).clamp(max=0), grouped.amax(1).clamp(min=0)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(0, 15).long()
    values = (grouped / scale[:, None] + zero[:, None]).round().clamp(0, 15).long()
    order = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ: the value that each place of a word has
    stored = {
        "qweight": words(values.view(k, -1, 8)[..., order], 2, range(8), 4),
        "qzeros": words(zero.view(k // 8, -1, 8)[..., order], 2, range(8), 4),
        "scales": scale.half(),
    }
    return stored, ((values - zero[:, None]).float() * scale[:, None]).view(k, n).t()


def words(values: Tensor, dim: int, places: Iterable[int], bits: int) -> Tensor:
    """Pack values that stand side by side along a dimension into 32-bit words."""
    word = sum(values.select(dim, place) << (bits * place) for place in places)
    assert isinstance(word, Tensor)
    return (((word + 2**31) % 2**32) - 2**31).int()


METHODS: dict[str, tuple[Callable[[Tensor], tuple[Stored, Tensor]], dict[str, Any]]] = {
    "bitsandbytes": (bitsandbytes, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "compressed-tensors int-quantized": (
        int8_channel,
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
    ),
    "compressed-tensors int-quantized, groups": (
        int8_group_with_zero_points,
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
    ),
    "compressed-tensors float-quantized": (
        float8_tensor,
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
    ),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True}),
    "gptq, 8 bits, second version": (
        partial(gptq, added=0, bits=8),
        {"quant_method": "gptq", "bits": 8, "group_size": 8, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}),
    "fp8": (float8_blocks, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
}


def make(folder: Path, method: str, shards: int = 1) -> tuple[Path, dict[str, Tensor]]:
    """Save a model whose linear layers are stored in 8 bits; return what they stand for, too."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).bfloat16()
    model.save_pretrained(folder)
    store, quantization = METHODS[method]
    saved: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "_proj" not in name:
            saved[name] = expected[name] = tensor
            continue
        parts, expected[name] = store(tensor.float())
        saved |= {name.replace("weight", suffix): part.contiguous() for suffix, part in parts.items()}
    if shards == 1:
        save_file(saved, folder / "model.safetensors")
    else:  # a weight and its scales in different files
        (folder / "model.safetensors").unlink()
        weight_map = {name: f"model-{place % shards}.safetensors" for place, name in enumerate(sorted(saved))}
        for file in set(weight_map.values()):
            save_file({name: saved[name] for name in saved if weight_map[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return folder, expected


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_weights_are_read_as_what_they_stand_for(
    method: str, shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = make(tmp_path / "source", method, shards)
    monkeypatch.setattr(containers, "BLOCK_BYTES", 3000)
    source = open_source(path)
    assert source.tensors.keys() == expected.keys()
    assert "quantization_config" not in source.config
    for name, tensor in expected.items():
        assert torch.equal(source.read(name), tensor), name
        assert torch.equal(torch.cat(list(source.read_rows(name))), tensor)
    (notice,) = source.notices
    assert notice.startswith(f"7 weights of the source are quantized ({method.split(',')[0]}), and are read as")


@pytest.mark.parametrize("method", METHODS)
def test_they_are_converted_and_what_they_were_is_recorded(method: str, tmp_path: Path) -> None:
    path, expected = make(tmp_path / "source", method)
    converter.convert(path, tmp_path / "out", outliers="top-k=4")
    checkpoint = open_checkpoint(tmp_path / "out")
    for name in checkpoint.records:
        values, absmax = quantize_weight(expected[f"{name}.weight"])
        assert torch.equal(checkpoint.read(f"{name}.weight"), values)
        assert torch.equal(checkpoint.read(f"{name}.SCB"), absmax)
        dims = checkpoint.read(f"{name}.outlier_dims").long()
        assert torch.equal(checkpoint.read(f"{name}.outlier_weight"), expected[f"{name}.weight"][:, dims])
    assert read_manifest(tmp_path / "out").source["quantized"] == method.split(",")[0]
    assert f"The original was quantized already: {method.split(',')[0]}." in (tmp_path / "out/README.md").read_text()
    assert not compare_with_source(checkpoint, open_source(path)).problems
    again = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--source", str(path)])
    assert again.exit_code == 0, again.output
    tokens = torch.arange(4, 24)[None]
    with torch.no_grad():
        reference = load_reference(open_source(path), 20, "cpu")(tokens).logits
        got = runtime.load(tmp_path / "out", dtype=torch.float32)(tokens).logits
    assert (got - reference).norm() / reference.norm() < 0.02


def test_int8_by_rows_becomes_the_same_integers_again(tmp_path: Path) -> None:
    path, _ = make(tmp_path / "source", "bitsandbytes")
    converter.convert(path, tmp_path / "out", outliers="none")
    before = load_file(path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "out")
    for name in checkpoint.records:
        assert torch.equal(checkpoint.read(f"{name}.weight"), before[f"{name}.weight"])
        # A product and a quotient by 127 in float32 may not give the number back to the last bit.
        assert torch.allclose(checkpoint.read(f"{name}.SCB"), before[f"{name}.SCB"], rtol=2**-22, atol=0)


def edited(path: Path, **changes: Tensor | None) -> Path:
    saved = load_file(path / "model.safetensors")
    for suffix, tensor in changes.items():
        saved.pop(f"model.layers.0.mlp.up_proj.{suffix}", None)
        if tensor is not None:
            saved[f"model.layers.0.mlp.up_proj.{suffix}"] = tensor
    save_file(saved, path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        (
            "bitsandbytes",
            {"weight_format": torch.tensor(1, dtype=torch.uint8)},
            r"up_proj.weight is \[200, 136\] in layout 'col32', with 200 scales; known are row",
        ),
        ("bitsandbytes", {"weight_format": torch.tensor(3, dtype=torch.uint8)}, "in layout 'col_ampere'"),
        ("bitsandbytes", {"SCB": None}, "already quantized"),
        ("bitsandbytes", {"SCB": torch.ones(7)}, r"SCB is F32 \[7\] for a weight \[200, 136\]"),
        ("fp8", {"weight_scale_inv": torch.ones(2, 3)}, r"weight_scale_inv is F32 \[2, 3\] for a weight"),
        ("compressed-tensors int-quantized", {"weight_scale": torch.ones(200, 1).int()}, "weight_scale is I32"),
        (
            "compressed-tensors int-quantized, groups",
            {"weight_zero_point": torch.zeros(200, 1, dtype=torch.int8)},
            "weight_zero_point has another shape than",
        ),
        ("gptq", {"qzeros": torch.zeros(17, 24).int()}, r"qweight is \[17, 200\], with scales"),
        ("gptq", {"g_idx": torch.full((136,), 99).int()}, "g_idx names groups that are not among 17"),
        ("gptq", {"scales": None}, "already quantized"),
        ("compressed-tensors int-quantized", {"weight_packed": torch.ones(2, 2).int()}, "already quantized"),
    ],
)
def test_what_is_not_known_is_refused(method: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path, _ = make(tmp_path / "source", method)
    with pytest.raises(SourceError, match=words):
        converter.convert(edited(path, **changes), tmp_path / "out", outliers="none")
    assert not (tmp_path / "out" / "config.json").exists()


def tiled(values: Tensor, layout: str) -> Tensor:
    """Put int8 values into tiles, a number at a time, by the offsets that cuBLASLt and bitsandbytes describe."""
    n, k = values.shape
    height = {"col_turing": 8, "col_ampere": 32}[layout]
    rows = -(-n // height) * height
    flat = torch.zeros(rows * k, dtype=torch.int8)
    for row in range(n):
        for column in range(k):
            tile = (column // 32) * rows * 32 + (row // height) * height * 32
            r, c = row % height, column % 32
            if layout == "col_turing":
                place = ((r & 1) * 4 + (c >> 3)) * 32 + ((4 if c & 7 >= 4 else 0) + (r >> 1)) * 4 + (c & 3)
            else:
                place = ((((r & 7) >> 1) * 4 + (r >> 3)) * 2 + (r & 1)) * 32 + c
            flat[tile + place] = values[row, column]
    return flat.view(rows, k)


@pytest.mark.parametrize("form", ["number", "bytes", "word"])
@pytest.mark.parametrize("layout", ["col_turing", "col_ampere"])
def test_the_tiles_of_old_gpus_are_read_as_rows(layout: str, form: str, tmp_path: Path) -> None:
    sizes = {**SIZES, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 30}
    # Its 60 rows fill no tiles of 8 or of 32.
    config = transformers.LlamaConfig(**sizes)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).half().save_pretrained(tmp_path)
    saved: dict[str, Any] = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    values, absmax = quantize_weight(saved[f"{name}.weight"].float())
    number = torch.tensor({"col_turing": 2, "col_ampere": 3}[layout], dtype=torch.uint8)
    spelled = {"number": number, "bytes": torch.tensor(list(layout.encode()), dtype=torch.uint8), "word": layout}
    saved |= {f"{name}.weight": tiled(values, layout), f"{name}.SCB": absmax, f"{name}.weight_format": spelled[form]}
    (tmp_path / "model.safetensors").unlink()
    if form == "word":
        torch.save(saved, tmp_path / "pytorch_model.bin")
    else:
        save_file(saved, tmp_path / "model.safetensors")
    # As some checkpoints of 2023 have it, beside the config.
    (tmp_path / "quantization_config.json").write_text(json.dumps({"quant_method": "bitsandbytes"}))
    source = open_source(tmp_path)
    assert source.tensors[f"{name}.weight"].shape == (60, 64)
    assert torch.equal(source.read(f"{name}.weight"), dequantize_weight(values, absmax))
    assert source.quantized == "bitsandbytes"
    assert source.notices[0].startswith("1 weights of the source are quantized (bitsandbytes)")
