"""The config of an OPT model, as transformers has it, from its tensors: metaseq keeps none that could be read."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...containers.tensors import TensorInfo
from ...errors import SourceError

# Table 1 of the paper (arXiv 2205.01068); no tensor depends on the number of heads.
_HEADS = {768: 12, 1024: 16, 2048: 32, 2560: 32, 4096: 32, 5120: 40, 7168: 56, 9216: 72, 12288: 96}
_GUESSED_HEAD = 64
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
# Positions of padding come before those of tokens: OPTLearnedPositionalEmbedding.
_OFFSET = 2


def derive_config(
    where: Path, tensors: Mapping[str, TensorInfo], facts: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return config.json, and notices of what was guessed.

    Args:
        where: the files, for errors.
        tensors: under the names of transformers.
        facts: what a config in the files says; see `parts.FACTS`.

    Raises:
        SourceError: tensors are missing, or do not fit together.

    """

    def shape(name: str, dims: int = 2) -> tuple[int, ...]:
        info = tensors.get(f"model.decoder.{name}")
        if info is None or len(info.shape) != dims:
            raise SourceError(f"{where}: decoder.{name}: missing, or of another shape than OPT's")
        return info.shape

    vocabulary, width = shape("embed_tokens.weight")
    positions, hidden = shape("embed_positions.weight")
    layers = {int(match[1]) for name in tensors if (match := re.match(r"model\.decoder\.layers\.(\d+)\.", name))}
    if not layers or len(layers) != max(layers) + 1:
        gap = next(number for number in range(max(layers, default=0) + 1) if number not in layers)
        raise SourceError(f"{where}: decoder.layers.{gap}: missing; there are {len(layers)} layers")
    for number in sorted(layers):
        rows, columns = shape(f"layers.{number}.self_attn.out_proj.weight")
        if (rows, columns) != (hidden, hidden):
            raise SourceError(
                f"{where}: decoder.layers.{number}.self_attn.out_proj.weight has {columns} of {hidden} columns; are "
                "all model-parallel parts there?"
            )
    heads, notices = _heads(hidden, facts)
    return {
        "activation_function": facts.get("activation_fn", "relu"),
        "architectures": ["OPTForCausalLM"],
        "bos_token_id": 2,
        "do_layer_norm_before": "model.decoder.final_layer_norm.weight" in tensors,
        "dtype": _DTYPES.get(tensors["model.decoder.embed_tokens.weight"].dtype, "float16"),
        "enable_bias": "model.decoder.layers.0.fc1.bias" in tensors,
        "eos_token_id": 2,
        "ffn_dim": shape("layers.0.fc1.weight")[0],
        "hidden_size": hidden,
        "layer_norm_elementwise_affine": "model.decoder.layers.0.self_attn_layer_norm.weight" in tensors,
        "max_position_embeddings": positions - _OFFSET,
        "model_type": "opt",
        "num_attention_heads": heads,
        "num_hidden_layers": len(layers),
        "pad_token_id": 1,
        "vocab_size": vocabulary,
        "word_embed_proj_dim": width,
    }, notices


def _heads(hidden: int, facts: Mapping[str, Any]) -> tuple[int, list[str]]:
    said = facts.get("decoder_attention_heads")
    if isinstance(said, int) and said > 0 and hidden % said == 0:
        return said, []
    if hidden in _HEADS:
        return _HEADS[hidden], []
    guess = max(1, hidden // _GUESSED_HEAD) if hidden % _GUESSED_HEAD == 0 else 1
    return guess, [
        f"num_attention_heads is taken to be {guess}, for no file says it and no OPT has {hidden} features; a "
        "config.json beside the weights is believed"
    ]
