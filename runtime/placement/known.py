"""Sizes of models that are known by name, such as `opt-175b`: their configs, for which no network is needed.

The numbers are those of the `config.json` that each is published with; all else is transformers' default for its type.
`tests/test_known_sizes.py` builds and counts them all.
"""

from typing import Any

import transformers

_OPT = ("hidden_size", "num_hidden_layers", "num_attention_heads")
_BLOOM = ("hidden_size", "n_layer", "n_head")
_T5 = ("d_model", "d_ff", "num_layers", "num_heads", "d_kv")
_GPT2 = ("n_embd", "n_layer", "n_head")
_LLAMA = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_LLAMA_1 = {"vocab_size": 32000, "max_position_embeddings": 2048}
_LLAMA_2 = {"vocab_size": 32000, "max_position_embeddings": 4096}
_LLAMA_3 = {"vocab_size": 128256, "max_position_embeddings": 8192}
_LONG = {"max_position_embeddings": 131072}
_QWEN = {"vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True}
_LARGE_QWEN = {"vocab_size": 152064, "max_position_embeddings": 32768}
_MISTRAL = {"vocab_size": 32768, "max_position_embeddings": 32768, "sliding_window": None}

# Name -> model type, names of the settings, their values, and further settings.
_SIZES: dict[str, tuple[str, tuple[str, ...], tuple[int, ...], dict[str, Any]]] = {
    "opt-125m": ("opt", _OPT, (768, 12, 12), {}),
    "opt-350m": ("opt", _OPT, (1024, 24, 16), {"word_embed_proj_dim": 512, "do_layer_norm_before": False}),
    "opt-1.3b": ("opt", _OPT, (2048, 24, 32), {}),
    "opt-2.7b": ("opt", _OPT, (2560, 32, 32), {}),
    "opt-6.7b": ("opt", _OPT, (4096, 32, 32), {}),
    "opt-13b": ("opt", _OPT, (5120, 40, 40), {}),
    "opt-30b": ("opt", _OPT, (7168, 48, 56), {}),
    "opt-66b": ("opt", _OPT, (9216, 64, 72), {}),
    "opt-175b": ("opt", _OPT, (12288, 96, 96), {}),
    "bloom-560m": ("bloom", _BLOOM, (1024, 24, 16), {}),
    "bloom-1b1": ("bloom", _BLOOM, (1536, 24, 16), {}),
    "bloom-1b7": ("bloom", _BLOOM, (2048, 24, 16), {}),
    "bloom-3b": ("bloom", _BLOOM, (2560, 30, 32), {}),
    "bloom-7b1": ("bloom", _BLOOM, (4096, 30, 32), {}),
    "bloom-176b": ("bloom", _BLOOM, (14336, 70, 112), {}),
    "t5-small": ("t5", _T5, (512, 2048, 6, 8, 64), {}),
    "t5-base": ("t5", _T5, (768, 3072, 12, 12, 64), {}),
    "t5-large": ("t5", _T5, (1024, 4096, 24, 16, 64), {}),
    "t5-3b": ("t5", _T5, (1024, 16384, 24, 32, 128), {}),
    "t5-11b": ("t5", _T5, (1024, 65536, 24, 128, 128), {}),
    "gpt2": ("gpt2", _GPT2, (768, 12, 12), {}),
    "gpt2-medium": ("gpt2", _GPT2, (1024, 24, 16), {}),
    "gpt2-large": ("gpt2", _GPT2, (1280, 36, 20), {}),
    "gpt2-xl": ("gpt2", _GPT2, (1600, 48, 25), {}),
    "gpt-j-6b": ("gptj", (), (), {}),
    "gpt-neox-20b": ("gpt_neox", (), (), {}),
    "llama-7b": ("llama", _LLAMA, (4096, 11008, 32, 32, 32), _LLAMA_1),
    "llama-13b": ("llama", _LLAMA, (5120, 13824, 40, 40, 40), _LLAMA_1),
    "llama-30b": ("llama", _LLAMA, (6656, 17920, 60, 52, 52), _LLAMA_1),
    "llama-65b": ("llama", _LLAMA, (8192, 22016, 80, 64, 64), _LLAMA_1),
    "llama-2-7b": ("llama", _LLAMA, (4096, 11008, 32, 32, 32), _LLAMA_2),
    "llama-2-13b": ("llama", _LLAMA, (5120, 13824, 40, 40, 40), _LLAMA_2),
    "llama-2-70b": ("llama", _LLAMA, (8192, 28672, 80, 64, 8), _LLAMA_2),
    "llama-3-8b": ("llama", _LLAMA, (4096, 14336, 32, 32, 8), _LLAMA_3),
    "llama-3-70b": ("llama", _LLAMA, (8192, 28672, 80, 64, 8), _LLAMA_3),
    "llama-3.1-8b": ("llama", _LLAMA, (4096, 14336, 32, 32, 8), _LLAMA_3 | _LONG),
    "llama-3.1-70b": ("llama", _LLAMA, (8192, 28672, 80, 64, 8), _LLAMA_3 | _LONG),
    "llama-3.1-405b": ("llama", _LLAMA, (16384, 53248, 126, 128, 8), _LLAMA_3 | _LONG),
    "llama-3.2-1b": ("llama", _LLAMA, (2048, 8192, 16, 32, 8), _LLAMA_3 | _LONG | {"tie_word_embeddings": True}),
    "llama-3.2-3b": ("llama", _LLAMA, (3072, 8192, 28, 24, 8), _LLAMA_3 | _LONG | {"tie_word_embeddings": True}),
    "mistral-7b": ("mistral", _LLAMA, (4096, 14336, 32, 32, 8), _MISTRAL),
    "mixtral-8x7b": ("mixtral", _LLAMA, (4096, 14336, 32, 32, 8), {"max_position_embeddings": 32768}),
    "mixtral-8x22b": ("mixtral", _LLAMA, (6144, 16384, 56, 48, 8), {"max_position_embeddings": 65536}),
    "qwen2.5-0.5b": ("qwen2", _LLAMA, (896, 4864, 24, 14, 2), _QWEN),
    "qwen2.5-1.5b": ("qwen2", _LLAMA, (1536, 8960, 28, 12, 2), _QWEN),
    "qwen2.5-3b": ("qwen2", _LLAMA, (2048, 11008, 36, 16, 2), _QWEN),
    "qwen2.5-7b": ("qwen2", _LLAMA, (3584, 18944, 28, 28, 4), _LARGE_QWEN),
    "qwen2.5-14b": ("qwen2", _LLAMA, (5120, 13824, 48, 40, 8), _LARGE_QWEN),
    "qwen2.5-32b": ("qwen2", _LLAMA, (5120, 27648, 64, 40, 8), _LARGE_QWEN),
    "qwen2.5-72b": ("qwen2", _LLAMA, (8192, 29568, 80, 64, 8), _LARGE_QWEN),
}

KNOWN = tuple(_SIZES)


def known_config(name: str) -> Any:
    """Return transformers' config for a name in `KNOWN`."""
    model_type, keys, values, more = _SIZES[name]
    settings = dict(zip(keys, values, strict=True)) | more
    if model_type == "opt":
        settings.setdefault("word_embed_proj_dim", settings["hidden_size"])
        settings["ffn_dim"] = 4 * settings["hidden_size"]
    return transformers.CONFIG_MAPPING[model_type](**settings)
