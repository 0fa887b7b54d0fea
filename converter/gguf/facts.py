"""What llama.cpp is told of a model, made of its config; what it cannot be told is refused, or said.

Only what changes the numbers is written, under the names of gguf-py. The frequencies of Llama 3's rotary scaling are a
tensor of their own, which llama.cpp divides by.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmint8.formats import LLMInt8Error
from llmint8.formats.containers.gguf.library import gguf_py

from .dialects import Dialect

ROPE_FREQUENCIES = "rope_freqs.weight"
_ACTIVATIONS = {"gemma3": ("gelu_pytorch_tanh",)}
# Of Gemma 3 llama.cpp has in its code that every sixth layer sees all of the text, and the rotary base of the others.
_GEMMA_PATTERN, _GEMMA_LOCAL_BASE = 6, 10000.0
_GEMMA_27B_LAYERS = 62


def check_told(dialect: Dialect, config: Any, where: object) -> list[str]:
    """Say what llama.cpp will not do as the model does. Raises LLMInt8Error where that would be another model."""
    for name, wrong in _unsayable(dialect, config):
        if wrong:
            raise LLMInt8Error(f"{where}: {name}, which llama.cpp cannot be told for {dialect.name}")
    window = getattr(config, "sliding_window", None)
    if dialect.name != "gemma3" and window and getattr(config, "use_sliding_window", True):
        return [f"llama.cpp attends to all of the text, where the model sees {window} tokens back"]
    return []


def _unsayable(dialect: Dialect, config: Any) -> Iterator[tuple[str, bool]]:
    known = _ACTIVATIONS.get(dialect.name, ("silu",))
    act = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    yield f"its activation is {act!r} and not {known[0]!r}", act not in known
    kind = rope(config).get("rope_type", "default")
    allowed = ("default", "linear", "yarn", *(("llama3",) if dialect.name == "llama" else ()))
    yield f"its rotary positions are scaled as {kind!r}", kind not in allowed
    if dialect.name == "gemma3":
        layers = range(config.num_hidden_layers)
        pattern = ["sliding_attention" if (layer + 1) % _GEMMA_PATTERN else "full_attention" for layer in layers]
        yield "which of its layers see all of the text is no sixth", list(config.layer_types) != pattern
        width = config.hidden_size // config.num_attention_heads
        scalar = width if config.num_hidden_layers == _GEMMA_27B_LAYERS else config.head_dim
        yield f"query_pre_attn_scalar is {config.query_pre_attn_scalar}", config.query_pre_attn_scalar != scalar
        local = dict(config.rope_parameters or {}).get("sliding_attention", {}).get("rope_theta", _GEMMA_LOCAL_BASE)
        yield f"the rotary base of its local layers is {local}", local != _GEMMA_LOCAL_BASE
        softcaps = config.final_logit_softcapping, config.attn_logit_softcapping
        yield "it has soft caps of logits", any(softcaps)
        yield "it sees what comes later, too", bool(getattr(config, "use_bidirectional_attention", False))


def rope(config: Any) -> dict[str, Any]:
    """Return the rotary parameters; of a model with two kinds of layers those of the layers that see all."""
    found = dict(getattr(config, "rope_parameters", None) or {})
    return dict(found.get("full_attention", found))


def add_facts(writer: Any, dialect: Dialect, config: Any) -> None:
    """Add what llama.cpp has to know to a GGUFWriter of gguf-py."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if dialect.name == "llama":
        writer.add_rope_dimension_count(head_dim)
    if dialect.name == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    rotary = rope(config)
    writer.add_rope_freq_base(float(rotary["rope_theta"]))
    if rotary.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf_py().RopeScalingType(rotary["rope_type"]))
        writer.add_rope_scaling_factor(float(rotary["factor"]))
        original = rotary.get("original_max_position_embeddings")
        if original:
            writer.add_rope_scaling_orig_ctx_len(int(original))


def rope_frequencies(config: Any) -> Tensor | None:
    """Return by what Llama 3's scaling divides each frequency, float32 [head_dim / 2]; None where nothing is scaled."""
    if rope(config).get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = 1.0 / float(rope(config)["rope_theta"]) ** (torch.arange(0, head_dim, 2).float() / head_dim)
    divisors: Tensor = plain / scaled.float()
    return divisors
